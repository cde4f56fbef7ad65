"""Damaged files of every format, and of every kind of image: a right sample, or one line that names the file.

MOA_FUZZ=200 python -m pytest tests/files/test_fuzz_files.py     # 200 times as many inputs
"""

import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.checks import BadSampleError
from data.images import open_image
from data.readers.record import RecordDataset, texts_in
from data.sample import Sample
from tests.data.test_images import stored
from tests.data.test_malformed import paths
from tests.data.test_readers import no_caches, opened, written  # noqa: F401 - a fixture
from tests.support.formats import CASES
from tests.support.tiny import random_image

TIMES = int(os.environ.get("MOA_FUZZ", "1"))
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def inputs(number: int) -> Callable:
    return settings(max_examples=number * TIMES, deadline=None, suppress_health_check=CHECKS)


TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["", " ", "\ud800", "a\udfffb", "<image>", "<image><image>", "\0", "../a.png", "/etc/passwd",
                     "a" * 300, "\u2028", "\n", "[[1, 2, 3, 4]]", "NaN", "1e999", "\x1b[31m", "http://x/y.png"]),
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 100), st.floats(), st.sampled_from([10**400, -(10**400), 2**63, 2**31, 1e308, 0.5, -0.0])
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(TEXTS, inner, max_size=3),
        st.dictionaries(st.sampled_from(["answer", "text", "type", "role", "content", "from", "value", "image",
                                         "box", "bytes", "path", "width", "boxes", "ocr", "frame", "system"]),
                        inner, max_size=4),
    ),
    max_leaves=8,
)  # fmt: skip
BOXES = st.lists(st.lists(NUMBERS, min_size=3, max_size=5), max_size=3)
DEEP = st.integers(1, 3).map(lambda n: json.loads("[" * 200 * n + "]" * 200 * n))


def check_sample_of(dataset: RecordDataset, index: int, folder: Path) -> None:
    """The invariant: a sample that any step behind can use, or one line."""
    try:
        sample = dataset[index]
    except BadSampleError as error:
        said = str(error)
        assert said.startswith(str(folder)) and "\n" not in said, said
        said.encode()
        assert error.detail or error.rule == "empty question"
        assert len(said) < 2000
        return
    assert_usable(sample)


def assert_usable(sample: Sample) -> None:
    for value in vars(sample).values():
        for text in texts_in(value):
            text.encode()
    assert all(isinstance(text, str) for text in (sample.id, sample.question, *sample.answers))
    assert sample.image is None or sample.image.mode == "RGB"
    for x0, y0, x1, y1 in sample.boxes:
        assert 0 <= x0 < x1 <= sample.size[0] and 0 <= y0 < y1 <= sample.size[1]
    for word in sample.ocr or ():
        assert all(map(math.isfinite, word.box)) and 0 <= word.confidence <= 1


def read_all(name: str, folder: Path) -> None:
    try:
        dataset = opened(name, folder)
    except ValueError as error:
        assert str(folder) in str(error) and "\n" not in str(error), str(error)
        return
    for index in range(len(dataset)):
        check_sample_of(dataset, index, folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str], Path]:
    """A fresh copy of a format's files, in a folder that is used again."""
    root = tmp_path_factory.mktemp("formats")

    def fresh(name: str) -> Path:
        whole, copy = root / f"{name}.whole", root / name
        if not whole.exists():
            written(name, whole)
        shutil.rmtree(copy, ignore_errors=True)
        return Path(shutil.copytree(whole, copy))

    return fresh


def rows_of(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.suffix in (".json", ".jsonl"))


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("webdataset", "table", "image_folder", "flickr30k",
                                                                "flickr30k_entities")])  # fmt: skip
@inputs(12)
@given(data=st.data())
def test_a_row_with_any_value_anywhere_is_a_sample_or_one_line(name, folders, data):
    folder = folders(name)
    file = data.draw(st.sampled_from(rows_of(folder)), "file")
    text = file.read_text()
    lines = text.splitlines() if text.startswith("{") and "\n{" in text else [text]
    box = {"whole": json.loads(lines[0])}
    for _ in range(data.draw(st.integers(1, 2), "changes")):
        places = [path for path in paths(box) if path]
        *outer, key = data.draw(st.sampled_from(places), "place")
        at: Any = box
        for step in outer:
            at = at[step]
        if isinstance(at, dict) and data.draw(st.integers(0, 4), "add") == 0 and at is not box:
            key = data.draw(TEXTS, "key")
        at[key] = data.draw(st.one_of(VALUES, BOXES, DEEP), "value")
    file.write_text("\n".join([json.dumps(box["whole"]), *lines[1:]]))
    read_all(name, folder)


@pytest.mark.parametrize("name", [n for n in CASES if n != "image_folder"])
@inputs(8)
@given(seed=st.integers(0, 2**32))
def test_a_file_with_any_bytes_damaged_is_samples_or_one_line(name, folders, seed):
    folder, chance = folders(name), random.Random(seed)
    images = (".jpg", ".png")
    file = chance.choice(sorted(f for f in folder.rglob("*") if f.is_file() and f.suffix not in images))
    file.write_bytes(damaged(file.read_bytes(), chance))
    read_all(name, folder)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, put in, left out or repeated; or the end cut off."""
    found = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        at, length = chance.randrange(len(found) + 1), chance.choice([1, 1, 2, 4, 30])
        new = chance.choice([b"\xff", b"\0", b"\n", b'"', b",", b"[", b"}", b"\xed\xa0\x80", b"\x80",
                             chance.randbytes(length), bytes(found[at : at + length])])  # fmt: skip
        found[at : at + chance.choice([0, length])] = new
    return bytes(found[: chance.choice([None, None, None, chance.randrange(len(found) + 1)])])


CSV_CELLS = st.one_of(TEXTS, st.integers(-5, 99).map(str), st.sampled_from(['"', '""', "'", "[[1,2,3,4]]"]))


@inputs(40)
@given(
    header=st.permutations(["id", "image", "question", "answers", "boxes", "frame", "task"]),
    rows=st.lists(st.lists(CSV_CELLS, min_size=6, max_size=8), max_size=3),
    raw=st.booleans(),
)
def test_any_csv_is_samples_or_one_line_a_row(header, rows, raw):
    import csv

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        random_image(0).save(folder / "a.png")
        with (folder / "t.csv").open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
            writer = csv.writer(file)
            for cells in (header, *rows):
                if raw:
                    file.write(",".join(cells) + "\n")
                else:
                    writer.writerow(cells)
        CASES_OF_CSV = {"path": "t.csv", "images": ".", "columns": None}
        try:
            dataset = opened("table", folder, **CASES_OF_CSV)
        except ValueError as error:
            assert "t.csv" in str(error) and "\n" not in str(error)
            return
        for index in range(len(dataset)):
            check_sample_of(dataset, index, folder)
        if not raw and len(dataset) == len(rows):  # what was written comes back
            for index, cells in enumerate(rows):
                if len(cells) == len(header) and "".join(cells).isprintable():
                    assert dataset.records.rows[index].value == {
                        k: v or None for k, v in zip(header, cells, strict=True)
                    }


@inputs(40)
@given(boxes=st.lists(st.lists(NUMBERS, min_size=4, max_size=4), min_size=1, max_size=2),
       frame=st.one_of(st.none(), st.lists(NUMBERS, min_size=2, max_size=2)), words=st.booleans())  # fmt: skip
def test_any_box_lies_in_its_image_or_is_named(boxes, frame, words):
    row: dict[str, Any] = {"image": "a.png", "question": "q", "task": "vqa", "frame": frame}
    row |= {"ocr": [{"text": "w", "box": box} for box in boxes]} if words else {"boxes": boxes}
    with tempfile.TemporaryDirectory() as place:
        random_image(0).save(Path(place) / "a.png")
        (Path(place) / "rows.jsonl").write_text(json.dumps(row))
        dataset = opened("jsonl", Path(place))
        check_sample_of(dataset, 0, Path(place))


FILES = ("JPEG", "BMP", "PPM", "ICO", "TGA", "PCX", "JPEG2000", "DDS", "SGI", "WEBP", "GIF", "TIFF", "PNG")


@pytest.mark.parametrize("kind", FILES)
@inputs(12)
@given(seed=st.integers(0, 2**32))
def test_an_image_with_any_bytes_damaged_is_an_image_or_one_line(kind, seed):
    chance = random.Random(seed)
    content = damaged(stored(random_image(seed % 3, 24, 17), kind), chance)
    try:
        assert open_image(content, "row 1").mode == "RGB"
    except BadSampleError as error:
        assert str(error).startswith("row 1: ") and "\n" not in str(error)
