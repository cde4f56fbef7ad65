"""One question about one image: the answer, box and gates that the evaluation of the run has."""

import numpy as np
import pytest
from PIL import Image

from data.boxes import BoxCodec
from moa.evaluation.predict import load, predict, predict_batch
from moa.evaluation.settings import with_eval
from moa.evaluation.sources import score_sources
from tests.evaluation.test_eval import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("predict"))


@pytest.fixture(scope="module")
def model(run):
    return load(run, device="cpu")


def test_an_answer_is_that_of_the_evaluation_with_its_gates_by_expert(model):
    (result,) = score_sources(model.network, with_eval(model.config, only=["vqa"]))
    responses = [r for r in result.responses if not r.sample.ocr]  # the rows' own OCR words
    pairs = [(r.sample.image, r.sample.question) for r in responses]
    found = predict_batch(model, pairs, "vqa")
    assert [p.answer for p in found] == [r.text for r in responses] and len(found) > 1
    assert list(found[0].gates) == ["vqa", "grounding"]
    assert list(found[0].gates.values()) == pytest.approx(responses[0].gates[0])
    assert predict(model, *pairs[0], task="vqa").answer == found[0].answer  # alone as in a batch


@pytest.mark.slow
def test_a_file_its_pixels_and_an_array_of_them_have_one_answer(run, model):
    file = run.parent / "0.png"
    pixels = Image.open(file).convert("RGB")
    found = [predict(model, image, "what?") for image in (file, str(file), pixels, np.array(pixels))]
    assert found[0] == found[1] == found[2] == found[3]


def test_a_box_is_in_pixels_of_the_given_image(model, monkeypatch):
    """The codec finds the box in the text; here every text has the same one, the whole image."""
    monkeypatch.setattr(BoxCodec, "decode", lambda codec, text, geometry: geometry.seen)
    image = Image.new("RGB", (40, 30), "red")
    assert predict(model, image, "where?", "grounding").box == (0.0, 0.0, 40.0, 30.0)


@pytest.mark.slow
def test_without_experts_the_base_answers(run, model):
    base = load(run.parent / "base", like=run, device="cpu")
    image = run.parent / "0.png"
    found = predict(base, image, "what?", "vqa")
    assert found.gates is None
    assert found.answer == predict(model, image, "what?", "vqa", gates="off").answer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "dance"}, "task=dance: unknown; choices: vqa, grounding"),
        ({"gates": "oracle"}, "gates=oracle: a question alone names no expert"),
        ({"gates": "vaq"}, "gates=vaq: unknown; choices: router"),
        ({"image": "gone.png"}, "image: missing image: gone.png"),
        ({"image": 3}, "image: must be a path, a PIL image or an array, got int"),
        ({"image": np.zeros((4, 4))}, r"uint8 \[height, width, 3\], got float64 of shape"),
        ({"question": " "}, "empty question"),
    ],
)
def test_what_cannot_be_answered_is_named(run, model, changes, message):
    asked = {"image": run.parent / "0.png", "question": "what?"} | changes
    with pytest.raises(ValueError, match=message):
        predict(model, **asked)
