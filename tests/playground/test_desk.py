"""The mixing desk apart from its page: limits, presets, answers side by side, a zip that PEFT loads."""

import io
import threading

import pytest
from PIL import ExifTags, Image

from data.sample import OcrWord
from moa.loaded import load
from moa.playground.desk import MOST_BYTES, Desk, SupersededError, bars, check_text, data_url, open_upload, overlay
from tests.evaluation.test_eval import make_run
from tests.support.tiny import random_image


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("desk")
    return Desk(model=load(make_run(folder), device="cpu"), folder=folder)


def file_of(image: Image.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "broken image"),
        (b"%PDF-1.7 no image", "broken image"),
        (file_of(random_image(0))[:90], "broken image"),
        (bytes(MOST_BYTES + 1), "at most 20 MB, got 20.0 MB"),
        (file_of(Image.new("1", (6000, 6000))), "at most 25,000,000 pixels, got 6000x6000"),
    ],
)
def test_what_is_no_image_or_too_large_is_refused_by_its_reason(data, message):
    with pytest.raises(ValueError, match=message):
        open_upload(data)
    assert open_upload(file_of(random_image(0))).size == random_image(0).size
    turned, file = Image.Exif(), io.BytesIO()
    turned[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (30, 20)).save(file, "JPEG", exif=turned)
    assert open_upload(file.getvalue()).size == (20, 30)  # a photo stands as its camera was held


def test_a_question_of_ten_thousand_characters_or_none_is_refused():
    with pytest.raises(ValueError, match="at most 2,000 characters, got 10,000"):
        check_text("x" * 10_000)
    with pytest.raises(ValueError, match="it is empty"):
        check_text(" ")


def test_presets_are_gates_that_the_rules_of_the_same_name_have(desk):
    presets = desk.presets()
    assert presets["uniform"] == {"vqa": 0.5, "grounding": 0.5}
    assert presets["grounding alone"] == {"vqa": 0.0, "grounding": 1.0}
    assert presets["forget vqa"] == {"vqa": -1.0, "grounding": 0.0}
    assert presets["all off"] == {"vqa": 0.0, "grounding": 0.0}


def test_an_answer_that_nobody_waits_for_ends_and_the_desk_goes_on(desk):
    heard = []

    def on_text(text):
        heard.append(text)
        if len(heard) == 2:
            raise SupersededError

    image = random_image(1)
    asked = [image], "what?", "vqa", "router"
    with pytest.raises(SupersededError):
        desk.answer(*asked, on_text)
    assert len(heard) == 2 and not desk.busy.locked()
    assert desk.answer(*asked).gates == desk.model.ask(image, *asked[1:3]).gates


@pytest.mark.slow
def test_two_visitors_at_once_get_the_answers_that_each_gets_alone(desk):
    asked = [([random_image(i)], f"what is {i}?", None, gates) for i in range(2) for gates in ("router", {"vqa": -1.0})]
    alone, found = [desk.answer(*each) for each in asked], {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: desk.answer(*asked[i])})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == alone


def test_a_failed_export_leaves_no_file_and_the_next_one_can_start(desk, monkeypatch):
    def full(model, out, gates, **options):
        out.mkdir()
        (out / "part").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moa.loaded.LoadedModel.merge", full)
    before = sorted(desk.folder.iterdir())
    with pytest.raises(OSError, match="No space left"):
        desk.export({"vqa": 1.0})
    assert sorted(desk.folder.iterdir()) == before and not desk.merging.locked()
    with desk.merging, pytest.raises(ValueError, match="another merge is under way"):
        desk.export({"vqa": 1.0})


def test_an_expert_removed_meanwhile_is_named(desk):
    expert = desk.folder / "run" / "checkpoints" / "step-000001" / "experts" / "vqa"
    expert.rename(expert.with_name("gone"))
    try:
        with pytest.raises(ValueError, match="vqa"):
            desk.export({"vqa": 1.0})
    finally:
        expert.with_name("gone").rename(expert)


def test_words_and_boxes_are_drawn_at_the_images_size_on_the_page_and_quoted(desk):
    word = OcrWord(text="<b>&", box=(10.0, 20.0, 30.0, 40.0), confidence=0.5)
    drawn = overlay((360, 180), [word], {"#123456": (300.0, 90.0, 0.0, 0.0)})
    assert 'x="20.0" y="40.0" width="40.0" height="40.0"' in drawn  # 360 pixels are shown as 720
    assert 'x="0.0" y="0.0" width="600.0" height="180.0"' in drawn and "#123456" in drawn
    assert "<b>" not in drawn and "&lt;b&gt;&amp;" in drawn
    assert "<i>" not in bars({"<i>x": 0.5}).replace("<i><b style", "") and bars(None) == ""
    assert data_url(random_image(0)).startswith("data:image/jpeg;base64,")


def test_samples_are_the_images_of_the_validation_sets(desk):
    assert [(s.task, s.size, len(s.images)) for s in desk.samples()] == [
        ("vqa", (40, 30), 1),
        ("grounding", (40, 30), 1),
    ]
    assert desk.most_images == 1  # a LLaVA-1.5
