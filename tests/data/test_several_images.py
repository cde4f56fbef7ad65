"""Several images in a sample: from a row of each format that has them to batch, check and page."""

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.audit import LEAKS, audit_source, find_leaks
from data.boxes import CODECS
from data.chat import message
from data.checks import BadSampleError, check_sample
from data.collate import ChatCollator
from data.config import PromptConfig, SourceConfig
from data.corruption import spoilt
from data.ocr import words_on
from data.ocr_images import SourceImages, first_samples
from data.pairs import PairCollator
from data.readers.record import RecordDataset
from data.readers.table import open_records
from data.sample import PLACE, OcrWord, Sample, Turn, placed
from moa.analysis.preview_page import preview_page
from moa.evaluation.fingerprints import sample_digest
from moa.federated.client import hide
from moa.training.further import store_rows
from tests.support.families import CONFIGS
from tests.support.tiny import random_image, tiny_processor

SIZES = {"a.png": (40, 30), "b.png": (20, 50), "c.png": (28, 28)}
CODEC = CODECS["location_tokens"]


def collator(**changes) -> ChatCollator:
    options = {"processor": tiny_processor(), "tasks": ["vqa"], "experts": ["one"], "codec": CODEC}
    return ChatCollator(**options | changes)


def sample(**changes) -> Sample:
    first, *more = (random_image(n, *size) for n, size in enumerate(SIZES.values()))
    own = {"id": "7", "image_id": "p", "image": first, "more_images": tuple(more), "box_image": None}
    own |= {"question": "which is red?", "answers": ("this",), "task": "vqa", "source": "toy"}
    return Sample(**own | changes)


def opened(name: str, folder: Path, rows: list[dict], **changes) -> RecordDataset:
    """A source of rows, beside the images that they may name."""
    folder.mkdir(exist_ok=True)
    for number, (file, size) in enumerate(SIZES.items()):
        random_image(number, *size).save(folder / file)
    path = folder / ("rows.json" if name == "llava" else "rows.jsonl")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(json.dumps(rows) if name == "llava" else lines)
    return open_records(SourceConfig(name="mine", format=name, path=str(path), images=str(folder), **changes), None)


def refused(dataset: RecordDataset) -> str:
    with pytest.raises(BadSampleError) as error:
        dataset[0]
    return str(error.value)


FILES = [*SIZES]
ASKED = "<image>\n<image> Is this\n<image>?"
ROWS = {
    "llava": {"image": FILES, "conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": "no"}]},
    "messages": {"images": FILES, "messages": [{"role": "user", "content": ASKED},
                                              {"role": "assistant", "content": "no"}]},
    "jsonl": {"image": FILES, "question": ASKED, "answers": ["no"], "task": "vqa"},
    "table": {"image": FILES, "question": ASKED, "answers": "no"},
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_several_images_has_them_in_their_places(name, tmp_path):
    dataset = opened(name, tmp_path, [ROWS[name]])
    found = dataset[0]
    assert [image.size for image in found.images] == [*SIZES.values()] and found.image_id == "a.png b.png c.png"
    assert found.question == f"{PLACE}{PLACE}Is this\n{PLACE}?" and found.asked == "<image><image>Is this\n<image>?"
    assert (found.answers, found.box_image, dataset.lengths(0)[0]) == (("no",), None, 3)


@pytest.mark.parametrize("name", ROWS)
def test_a_missing_file_among_several_is_named_with_its_row(name, tmp_path):
    row = {key: ["a.png", "none.png", "c.png"] if value is FILES else value for key, value in ROWS[name].items()}
    said = refused(opened(name, tmp_path, [row]))
    assert re.match(rf"{tmp_path}/rows.jsonl?:.*1?.*: missing image: .*none.png", said)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("files", [["a.png"], [*SIZES, "a.png"]])
def test_more_or_fewer_places_than_images_are_refused_with_both_numbers(name, files, tmp_path):
    row = {key: files if value is FILES else value for key, value in ROWS[name].items()}
    said = refused(opened(name, tmp_path, [row]))
    assert said.startswith(f"{tmp_path}/rows.json") and f"3 times <image> for {len(files)} images" in said


def test_a_conversation_takes_images_in_any_question_and_its_only_one_too(tmp_path):
    turns = [("human", "<image>\nWhat?"), ("gpt", "A cat."), ("human", "And\n<image>"), ("gpt", "A dog.")]
    rows = [{"image": files, "conversations": [{"from": r, "value": v} for r, v in said]}
            for files, said in ((FILES[:2], turns), (FILES[1], [(r, v.replace("<image>\nW", "W")) for r, v in turns]),
                                (FILES[:1], turns[:2]))]  # fmt: skip
    both, later, alone = opened("llava", tmp_path, rows)
    assert (both.question, both.turns) == (f"{PLACE}What?", (Turn(question=f"And\n{PLACE}", answer="A dog."),))
    assert (later.question, later.turns) == ("What?", both.turns) and later.image.size == SIZES["b.png"]
    assert alone.question == "What?"  # ahead of it, wherever it stood
    batch = collator()([later])  # LLaVA-1.5 reads it too
    text = collator().processor.tokenizer.decode(batch.input_ids[0])
    assert text.count("<image>") == 4 and text.index("And") < text.index("<image>")
    prompts = collator(for_generation=True)([later])
    assert prompts.is_blank and not prompts.image_mask.any()


def test_a_table_of_cells_with_lists_is_read_from_csv_too(tmp_path):
    for number, (file, size) in enumerate(SIZES.items()):
        random_image(number, *size).save(tmp_path / file)
    file = tmp_path / "rows.csv"
    file.write_text('image,question,boxes,box_image\n"[""a.png"", ""b.png""]",where?,"[[1, 2, 19, 50]]",1\n')
    found = open_records(SourceConfig(name="mine", format="table", path=str(file), images=str(tmp_path)), None)[0]
    assert [image.size for image in found.images] == [(40, 30), (20, 50)]
    assert (found.boxes, found.box_image, found.size) == (((1, 2, 19, 50),), 1, (20, 50))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"boxes": [[0, 0, 9, 9]]}, "box without image: boxes lie in one of 3 images, given by its number from 0; got"),
        ({"boxes": [[0, 0, 9, 9]], "box_image": 3}, "box without image: .* got 3"),
        ({"boxes": [[0, 0, 30, 9]], "box_image": 1}, "box outside image: .* its image of 20x50"),
        ({"box_image": "b.png"}, "unreadable row: 'box_image' must be the number of an image, from 0, got 'b.png'"),
        ({"ocr": [{"text": "x", "box": [0, 0, 9, 9]}]}, "unreadable row: an OCR word needs `image`, the number"),
        ({"ocr": [{"text": "x", "box": [0, 0, 9, 9], "image": 3}]}, "broken OCR word: 'x': image must be .* got 3"),
        ({"image": []}, "unreadable row: 'image' is an empty list"),
    ],
)
def test_a_box_and_a_word_name_their_image_or_are_refused(changes, complaint, tmp_path):
    row = {"image": FILES, "question": "where?", "task": "vqa", "answers": ["x"]} | changes
    assert re.search(f"^{tmp_path}/rows.jsonl:1: {complaint}", refused(opened("jsonl", tmp_path, [row])))


def test_words_and_boxes_are_in_shares_of_their_own_image(tmp_path):
    words = [{"text": "stop", "box": [20, 15, 40, 30], "image": 0}, {"text": "now", "box": [10, 0, 20, 25], "image": 1}]
    row = {"image": FILES, "question": "where?", "task": "vqa", "ocr": words, "boxes": [[0, 0, 10, 25]], "box_image": 1}
    found = opened("jsonl", tmp_path, [row])[0]
    collate = collator()
    assert collate([found]).ocr_boxes.tolist() == [[[0.5, 0.5, 1, 1], [0.5, 0, 1, 0.5]]]
    text = collate.target(found)
    assert text == "<loc0000><loc0000><loc0016><loc0016>"
    assert CODEC.decode(text, collate.geometry(found)) == pytest.approx((0, 0, 10, 25), abs=1)


def test_an_engines_words_get_the_number_of_their_image():
    def read(image: Image.Image):
        sure = {"box": (0, 0, 9, 9), "confidence": 1.0}
        return None if image.width == 20 else (OcrWord(text=str(image.width), **sure),)

    assert [(w.text, w.image) for w in words_on(sample().images, read)] == [("40", 0), ("28", 2)]
    assert words_on(sample().images[1:2], read) is None


def test_the_routers_text_has_no_places_and_the_task_stands_behind_the_leading_images():
    asked = sample(question=placed("<image> <image>is it\n<image>?"))
    collate = collator()
    assert collate.prompt(asked) == f"{PLACE}{PLACE}[vqa] is it\n{PLACE}?"
    tokenizer = collate.processor.tokenizer
    assert tokenizer.decode(collate([asked]).text_ids[0]) == tokenizer.decode(tokenizer("is it\n?")["input_ids"])
    kinds = [part["type"] for part in collate.conversation(asked)[0]["content"]]
    assert kinds == ["image", "image", "text", "image", "text"]
    ahead = collate.conversation(sample())[0]["content"]  # no place: all of them ahead
    assert [part["type"] for part in ahead] == ["image"] * 3 + ["text"]


def test_a_template_that_moves_images_ahead_gets_them_as_tokens_in_the_text():
    processor = CONFIGS["llava_next"]()[1]
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' }}"
        "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
        "{% for c in m['content'] if c['type'] == 'text' %}{{ '\n' + c['text'] }}{% endfor %}{{ '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )

    def said(question: str) -> str:
        batch = collator(processor=processor, settings=PromptConfig(task_in_prompt=False))([sample(question=question)])
        return re.sub(r"(<image>)+", "<image>", processor.tokenizer.decode(batch.input_ids[0])).replace(" ", "")

    assert said(placed("<image>is<image>or<image>?")).startswith("user:<image>\n\nis<image>or<image>?</s>")
    assert said("is it?").startswith("user:<image>\n<image>\n<image>\n\nisit?</s>")


def test_a_dual_encoder_takes_one_image():
    pairs = PairCollator(processor=tiny_processor(), tasks=["vqa"], experts=["one"], context_length=9)
    assert "toy', sample 7: several images: has 3, and a CLIP compares one image" in str(pairs.error_of(sample()))


def test_a_leaked_image_is_found_among_several_and_a_row_is_counted_once(tmp_path):
    row = {"question": "what?", "task": "vqa", "answers": ["x"]}
    train = opened("jsonl", tmp_path / "train", [{**row, "id": "1", "image": ["b.png", "c.png"]}])
    held = opened(
        "jsonl", tmp_path / "test", [{**row, "id": "1", "image": FILES}, {**row, "id": "2", "image": "a.png"}]
    )
    trained, other = (audit_source(s, s.source, collator()) for s in (train, held))
    find_leaks([trained], other)
    assert {rule: finding.count for rule, finding in other.found.items()} == {LEAKS["contents"]: 1}
    assert "sample 1: image of training: sample 1 of 'mine'" in other.found[LEAKS["contents"]].examples[0]


def test_the_check_and_the_run_name_a_base_of_one_image(tmp_path):
    dataset = opened("jsonl", tmp_path, [ROWS["jsonl"]])
    audit = audit_source(dataset, "mine", collator(one_image="a llava was trained on one a sample"))
    assert audit.found["several images"].examples == [
        "source 'mine', sample rows.jsonl:1: several images: has 3, and a llava was trained on one a sample"
    ]


def test_the_page_shows_every_image_and_boxes_on_their_own(tmp_path):
    page = preview_page([sample(boxes=((0, 0, 20, 50),), box_image=1, answers=())], collator(), "three")
    images = [Image.open(io.BytesIO(base64.b64decode(found))) for found in re.findall(r"base64,(.*?)'", page)]
    assert [image.getpixel((2, 200)) == (0, 158, 115) for image in images] == [False, True, False]
    assert "40 x 30 pixels, seen as 28 x 28, 20 x 50 pixels, seen as 28 x 28, 28 x 28 pixels" in page


def test_every_image_counts_for_ocr_noise_digests_and_hiding(tmp_path):
    dataset = opened("jsonl", tmp_path, [ROWS["jsonl"], {**ROWS["jsonl"], "image": ["c.png"], "question": "what?"}])
    places = first_samples(dataset)
    assert places == ((0, 0), (0, 1), (0, 2))
    source = SourceConfig(name="mine", format="jsonl", path=str(tmp_path / "rows.jsonl"), images=str(tmp_path))
    assert [image.size for image in SourceImages(source, places)] == [*SIZES.values()]
    plain = sample(question=placed("<image><image>or <image>?"))
    noisy = spoilt(plain, "noise", 0.1)
    assert all(a.tobytes() != b.tobytes() for a, b in zip(plain.images, noisy.images, strict=True))
    turned = replace(plain, more_images=plain.more_images[::-1])
    assert len({*map(sample_digest, (plain, noisy, turned, replace(plain, more_images=())))}) == 4
    hidden = hide(plain, {"image"})
    assert (hidden.images, hidden.question) == ((), "or ?")
    check_sample(hidden)


def test_a_question_needs_words():
    with pytest.raises(BadSampleError, match="empty question"):
        check_sample(sample(question=placed("<image> <image><image>")))


def test_a_message_without_places_is_what_it_was():
    assert message("user", "what?", [{"type": "image"}])["content"] == [
        {"type": "image"},
        {"type": "text", "text": "what?"},
    ]
    assert message("assistant", "")["content"] == [{"type": "text", "text": ""}]


def test_one_image_makes_the_batch_that_the_processor_makes():
    """Bit for bit, and nothing is asked of a processor but its one call."""
    processor, one = tiny_processor(), sample(more_images=(), box_image=0)
    batch = collator(processor=processor, for_generation=True)([one, one])
    text = [{"type": "image"}, {"type": "text", "text": "[vqa] which is red?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    plain = processor(text=[prompt] * 2, images=[[one.image]] * 2, return_tensors="pt", add_special_tokens=False)
    assert torch.equal(batch.input_ids, plain["input_ids"]) and torch.equal(batch.pixel_values, plain["pixel_values"])
    assert batch.image_index.tolist() == [0, 1]


def test_rows_in_memory_may_have_several_images_each_stored_once(tmp_path):
    first, second = random_image(0, 40, 30), random_image(1, 20, 50)
    row = {"question": "is <image> <image>?", "answers": "no"}
    file, _ = store_rows([{**row, "image": [first, second]}, {**row, "image": (second, first)}], tmp_path, "vqa")
    found = open_records(SourceConfig(name="mine", format="jsonl", path=str(file)), None)
    assert [[image.size for image in found[i].images] for i in (0, 1)] == [[(40, 30), (20, 50)], [(20, 50), (40, 30)]]
    assert len([*tmp_path.glob("*.png")]) == 2
