"""Tables with named columns: Hugging Face `datasets` (hub, folder, Parquet), CSV and TSV, JSON.

`columns` maps a sample's fields to the table's columns: {question: query, answers: label, ...}. Without
it a column is read by a field's own name. open_clip's CSV is {image: filepath, answers: title}.
A cell of `image` may be a list of images, in a CSV one that JSON writes.
CSV and JSON are read here, since `datasets` guesses what their cells mean: 007 becomes 7.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data.checks import BadSampleError
from data.config import SourceConfig
from data.images import StoredImage, named_image
from data.readers.fields import boxes_of, cell_text, cell_texts, frame_of, number_of
from data.readers.record import Record, Records, reason
from data.readers.rows import CsvRows, Row, Rows, json_rows, require_file
from data.readers.table import FILE, reads
from data.sample import placed

FIELDS = ("id", "image_id", "image", "question", "answers", "boxes", "box_image", "frame", "task", "split")
SAVED = ("dataset_info.json", "dataset_dict.json")  # what save_to_disk leaves in a folder
DELIMITERS = {".csv": ",", ".tsv": "\t"}
# Columns that hold images, by the names that are in use; one that is not read is a slip
IMAGE_COLUMNS = {
    *("image", "images", "img", "picture", "photo", "file_name", "filename", "filepath", "path"),
    *("image_path", "img_path", "image_file", "image_name", "image_url", "picture_path"),
}
PROBED = 100  # rows of a JSON file, which are asked for the names of its columns


class TableRows:
    """The rows of an Arrow table on the disk; the first row is 1, and images stay encoded."""

    def __init__(self, table: Any, path: str):
        self.path = path
        for column, feature in table.features.items():
            if (plain := undecoded(feature)) != feature:
                table = table.cast_column(column, plain)
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Row:
        where = f"{self.path}: row {index + 1}"
        try:
            return Row(self.table[index], where)
        except Exception as error:  # a cell that Arrow cannot turn into a value, such as bad UTF-8
            raise BadSampleError(where, "unreadable row", reason(error)) from None


def undecoded(feature: Any) -> Any:
    """The feature with every image or sound in it left as it is stored."""
    if isinstance(feature, dict):
        return {key: undecoded(inner) for key, inner in feature.items()}
    if hasattr(feature, "feature"):
        return replace(feature, feature=undecoded(feature.feature))
    return replace(feature, decode=False) if hasattr(feature, "decode") else feature


def open_table(path: str, split: str | None = None) -> Any:
    """A `datasets` table: Parquet, a folder of `save_to_disk`, or a data set as the hub has them.

    That is a folder with its files (a clone), or a hub name, each with `:subset` where it has some.
    """
    import datasets

    place, (name, _, subset) = Path(path), path.partition(":")
    parquet = place.suffix == ".parquet" and str(require_file(place))
    try:
        if parquet:
            return datasets.load_dataset("parquet", data_files=parquet, split="train")
        if any((place / file).is_file() for file in SAVED):
            found, guessed = datasets.load_from_disk(path), False
        else:
            found = datasets.load_dataset(name, subset or None)
            guessed = any(table.info.builder_name == "csv" for table in found.values())
    except Exception as error:  # datasets raises errors of its own, of Arrow and of the hub
        cause = error.__cause__ or error
        said = f"{type(cause).__name__}: {[*str(cause).splitlines(), 'no reason given'][0]}"
        if Path(name).exists():
            raise ValueError(f"{path}: no data set that can be read: {said}") from None
        neither = "neither a file or folder here, nor a data set that can be had from the hub"
        raise ValueError(f"{path}: {neither} ({said})") from None
    if guessed:
        guess = "holds CSV files, whose cells would be guessed (007 as 7)"
        raise ValueError(f"{path}: {guess}; give the path of one")
    if isinstance(found, dict) and split not in found:
        raise ValueError(f"{path}: no split {split!r}; it has {', '.join(found)}")
    return found[split] if isinstance(found, dict) else found


@reads("table", needs=FILE, may=("images", "columns"))
def read_table(source: SourceConfig) -> Records:
    assert source.path
    rows, found, features = table_rows(source.path, source.split)
    columns = check_columns(source, found)
    folder = source.images or (source.path if Path(source.path).is_dir() else None)
    parse = partial(parse_table, columns=columns, features=features, folder=folder)
    return Records(rows=rows, parse=parse)


def table_rows(path: str, split: str | None) -> tuple[Rows, list[str], dict[str, Any]]:
    """The rows, the names of their columns, and their features in `datasets`."""
    suffix = Path(path).suffix.lower()
    if suffix in DELIMITERS:
        cells = CsvRows(path, DELIMITERS[suffix])
        return cells, cells.columns, {}
    if suffix in (".json", ".jsonl"):
        rows = json_rows(path)
        return rows, keys_of(rows), {}
    table = open_table(path, split)
    return TableRows(table, path), table.column_names, table.features


def keys_of(rows: Rows) -> list[str]:
    """The keys that the first rows have; rows that cannot be read have none."""
    found: dict[str, None] = {}
    for index in range(min(len(rows), PROBED)):
        with suppress(BadSampleError):
            value = rows[index].value
            found |= dict.fromkeys(value if isinstance(value, dict) else ())
    return [*found]


def check_columns(source: SourceConfig, found: list[str]) -> dict[str, str]:
    """Field -> column; of a column that the table or a row lacks, the field is empty."""
    columns = source.columns or {field: field for field in FIELDS}
    if source.columns is None and not {*FIELDS} & {*found}:
        raise ValueError(f"columns: name some of {', '.join(found)} for {', '.join(FIELDS)}")
    for field, column in (source.columns or {}).items():
        if field not in FIELDS:
            raise ValueError(f"columns.{field}: no such field; choices: {', '.join(FIELDS)}")
        if column not in found:
            rest = f"has no column {column!r}; it has {', '.join(found)}"
            raise ValueError(f"columns.{field}: {source.path} {rest}")
    check_unread(source, columns, found)
    return dict(columns)


def check_unread(source: SourceConfig, columns: dict[str, str], found: list[str]) -> None:
    """ValueError for a column that is nearly a field, or seems to hold the images of rows without any."""
    if source.columns is None:
        for column in found:
            if column not in FIELDS and (field := column.strip().lower()) in FIELDS:
                advice = f"rename it, or name the columns: {{{field}: {column!r}, ...}}"
                problem = f"{source.path} has {column!r}, which is read as {field!r} alone"
                raise ValueError(f"columns: {problem}: {advice}")
    if columns.get("image") in found:
        return
    names = IMAGE_COLUMNS if source.columns is None else {"image"}
    if unread := [column for column in found if column.lower() in names]:
        raise ValueError(
            f"columns: nothing reads the column {unread[0]!r}, so that the rows would be text alone: "
            f"name it as columns.image={unread[0]} beside the others, or remove it from the table"
        )


def labelled(value: Any, feature: Any) -> Any:
    """The cell with the numbers of class labels as their names, also in a list."""
    if hasattr(feature, "int2str") and value is not None:
        return feature.int2str(value)
    if hasattr(feature, "feature") and isinstance(value, list):
        return [labelled(inner, feature.feature) for inner in value]
    return value


def parse_table(row: Row, columns: dict[str, str], features: dict[str, Any], folder: str | None) -> Record:
    if not isinstance(row.value, dict):
        raise ValueError(f"a row must be an object, got {row.value!r:.60}")
    found = {f: labelled(row.value.get(c), features.get(c)) for f, c in columns.items()}
    cell, boxes = cell_of_images(found.get("image")), boxes_of(found.get("boxes"))
    images = listed(cell)
    there = [f for f in ("id", "image_id", "question", "task", "split") if found.get(f) is not None]
    said = {field: cell_text(found[field], columns[field]) for field in there}
    number = re.findall(r"\d+", row.where)[-1]
    answers = cell_texts(found.get("answers"), columns.get("answers", "answers"))
    own: dict[str, Any] = {"id": number, "image_id": " ".join(names_of(images)) or number}
    own |= {"frame": frame_of(found.get("frame"), boxes), "box_image": number_of(found.get("box_image"), "box_image")}
    if isinstance(cell, list) and "question" in said:
        said["question"] = placed(said["question"])
    return Record(
        answers=answers, boxes=boxes, **fields_of([image_of(image, folder) for image in images]), **own | said
    )


def cell_of_images(value: Any) -> Any:
    """An image, a list of images, or nothing; a text may be a list that JSON writes."""
    if isinstance(value, str) and value.startswith("["):
        with suppress(ValueError):  # else a name like another
            return json.loads(value)
    return value


def listed(cell: Any) -> list[Any]:
    return [] if cell is None else cell if isinstance(cell, list) else [cell]


def fields_of(images: Sequence[StoredImage]) -> dict[str, Any]:
    """The images as fields of a record."""
    return {"image": images[0] if images else None, "more_images": tuple(images[1:])}


def names_of(images: Sequence[Any]) -> list[str]:
    """The images' names; none where one of them has none."""
    return [*images] if all(isinstance(image, str) for image in images) else []


def image_of(value: Any, images: str | None) -> StoredImage:
    """An image of a cell: a name in the folder `images`, or as `datasets` stores it."""
    if isinstance(value, dict) and value.get("bytes"):
        return bytes(value["bytes"])
    name = value.get("path") if isinstance(value, dict) else value
    if isinstance(name, str) and name:
        return named_image(name, images)
    raise ValueError(f"no image in {value!r:.60}")
