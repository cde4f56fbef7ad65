"""Every format under damage: whatever is wrong with a file, the error names it, and nothing else is raised."""

import json
import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.checks import BadSampleError
from data.images import open_image
from data.readers.record import RecordDataset
from tests.data.test_readers import error_of, no_caches, opened, written  # noqa: F401 - a fixture
from tests.support.formats import CASES

STAMPS = count(1)  # a file's index is kept until its time changes
VALUES = (None, [], "x", float("nan"))
WITH_FILES = [name for name in CASES if name not in ("webdataset", "table")]  # images in files


def paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The place of every value, in the first entry of each list."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value[:1])
    for key, inner in pairs if isinstance(value, dict | list) else ():
        yield from paths(inner, (*path, key)) if isinstance(inner, dict | list) else [(*path, key)]


def damaged(value: Any) -> Iterator[Any]:
    """The value with one place missing, or of another kind."""
    for path in paths(value):
        for wrong in VALUES if path else (*VALUES, 3):
            yield changed(value, path, lambda at, key, wrong=wrong: at.__setitem__(key, wrong))
        if path:
            yield changed(value, path, lambda at, key: at.__delitem__(key))


def changed(value: Any, path: tuple, change: Callable[[Any, Any], None]) -> Any:
    box = {"whole": deepcopy(value)}
    at: Any = box
    for key in ("whole", *path)[:-1]:
        at = at[key]
    change(at, ("whole", *path)[-1])
    return box["whole"]


def read_all(dataset: RecordDataset) -> None:
    for index in range(len(dataset)):
        try:
            dataset[index]
        except BadSampleError:
            dataset.records.rows[index]  # the row itself can be had, or is what is broken


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("webdataset", "table")])
def test_no_missing_key_and_no_wrong_type_ends_in_anything_but_a_named_error(name, tmp_path):
    folder = written(name, tmp_path / "data")
    for file in [f for f in folder.rglob("*") if f.suffix in (".json", ".jsonl")]:
        text = file.read_text()
        is_one = not text.startswith("{") or "\n{" not in text
        rows = [text] if is_one else text.splitlines()
        for first in damaged(json.loads(rows[0])):
            file.write_text("\n".join([json.dumps(first), *rows[1:]]))
            os.utime(file, (next(STAMPS),) * 2)
            try:
                read_all(opened(name, folder))
            except ValueError as error:
                assert str(folder) in str(error)
        file.write_text(text)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def text(file: Path) -> None:
    file.write_text("not an image")


@pytest.mark.parametrize("damage", [empty, truncated, text, Path.unlink])
@pytest.mark.parametrize("name", WITH_FILES)
def test_a_image_that_cannot_be_read_is_a_bad_sample_of_every_format(name, damage, tmp_path):
    dataset = opened(name, written(name, tmp_path / "data"))
    image = dataset.records.read(0)[0].image
    assert isinstance(image, Path)
    damage(image)
    error = error_of(dataset, 0)
    rule = "missing image" if damage is Path.unlink else "broken image"
    assert error.rule == rule and image.stem in str(error)


@pytest.mark.parametrize("name", CASES)
def test_a_image_that_would_fill_the_memory_is_refused_by_every_format(name, tmp_path, monkeypatch):
    dataset = opened(name, written(name, tmp_path / "data"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert error_of(dataset, 0).rule == "image too large"


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"text"])
def test_bytes_that_are_no_image_are_named_by_their_row(content):
    with pytest.raises(BadSampleError, match="shard: row 3: broken image: image in the file"):
        open_image(content, "shard: row 3")
