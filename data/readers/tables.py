"""Tables with named columns: Hugging Face `datasets` (hub, folder, Parquet), CSV and TSV.

`columns` maps a sample's fields to the table's columns: {question: query, answers: label, ...}. Without
it a column is read by a field's own name. open_clip's CSV is {image: filepath, answers: title}.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from data.pictures import Picture, named_picture
from data.readers.fields import box_of
from data.readers.record import Record, Records
from data.readers.rows import Row, require_file
from moa.config import SourceConfig

FIELDS = ("id", "image_id", "image", "question", "answers", "boxes", "task", "split")
SAVED = ("dataset_info.json", "dataset_dict.json")  # what save_to_disk leaves in a folder
LOADERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}


class TableRows:
    """The rows of an Arrow table on the disk; the first row is 1, and pictures stay encoded."""

    def __init__(self, table: Any, path: str):
        from datasets import Image

        self.path = path
        for column, feature in table.features.items():
            if isinstance(feature, Image):
                table = table.cast_column(column, Image(decode=False))
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Row:
        return Row(self.table[index], f"{self.path}: row {index + 1}")


def open_table(path: str, split: str | None = None) -> Any:
    """A `datasets` table: a file, a folder of `save_to_disk`, or a data set as the hub has them.

    That is a folder with its files (a clone), or a hub name, each with `:subset` where it has some.
    """
    import datasets

    place = Path(path)
    if place.suffix in LOADERS:
        options = {"delimiter": "\t"} if place.suffix == ".tsv" else {}
        files = {"data_files": str(require_file(place)), "split": "train"}  # all there is
        return datasets.load_dataset(LOADERS[place.suffix], **files, **options)
    if any((place / name).is_file() for name in SAVED):
        return chosen_split(datasets.load_from_disk(path), path, split)
    name, _, subset = path.partition(":")
    try:
        return chosen_split(datasets.load_dataset(name, subset or None), path, split)
    except (ConnectionError, FileNotFoundError, OSError, ValueError) as error:
        if Path(name).is_dir():
            raise ValueError(f"{path}: no data set: {str(error).splitlines()[0]}") from None
        raise ValueError(
            f"{path}: neither a file or folder here, nor a data set that can be had from the hub"
            f" ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from None


def chosen_split(found: Any, path: str, split: str | None) -> Any:
    """One split of a data set that has several."""
    if not isinstance(found, dict):
        return found
    if split not in found:
        raise ValueError(f"{path}: no split {split!r}; it has {', '.join(found)}")
    return found[split]


def read_table(source: SourceConfig) -> Records:
    assert source.path
    table = open_table(source.path, source.split)
    columns = check_columns(source, table.column_names)
    parse = partial(
        parse_table, columns=columns, names=label_names(table.features), images=source.images
    )
    return Records(rows=TableRows(table, source.path), parse=parse)


def check_columns(source: SourceConfig, found: list[str]) -> dict[str, str]:
    """Field -> column, of the fields that the table has."""
    columns = source.columns or {field: field for field in FIELDS if field in found}
    for field, column in columns.items():
        if field not in FIELDS:
            raise ValueError(f"columns.{field}: no such field; choices: {', '.join(FIELDS)}")
        if column not in found:
            raise ValueError(
                f"columns.{field}: {source.path} has no column {column!r}; it has {', '.join(found)}"
            )
    if not columns:
        raise ValueError(f"columns: name some of {', '.join(found)} for {', '.join(FIELDS)}")
    return dict(columns)


def label_names(features: Any) -> dict[str, Callable[[int], str]]:
    """How a number becomes a name, for the columns that are class labels."""
    return {c: f.int2str for c, f in features.items() if hasattr(f, "int2str")}


def parse_table(
    row: Row,
    columns: dict[str, str],
    names: dict[str, Callable[[int], str]],
    images: str | None,
) -> Record:
    found = {
        field: names[column](row.value[column]) if column in names else row.value[column]
        for field, column in columns.items()
    }
    number = row.where.rpartition(" ")[2]
    image = found.get("image")
    return Record(
        id=str(found.get("id", number)),
        image_id=str(found.get("image_id", image if isinstance(image, str) else number)),
        picture=named_picture(image, images) if isinstance(image, str) else picture_of(image),
        question=str(found.get("question") or ""),
        answers=answers_of_cell(found.get("answers")),
        boxes=tuple(box_of(box) for box in found.get("boxes") or ()),
        task=found.get("task"),
        split=found.get("split"),
    )


def answers_of_cell(value: Any) -> tuple[str, ...]:
    """A cell with one answer or a list of them."""
    if value is None:
        return ()
    return tuple(map(str, value)) if isinstance(value, list) else (str(value),)


def picture_of(value: Any) -> Picture | None:
    """The picture of a cell as `datasets` stores it: {"bytes", "path"}, or nothing."""
    if value is None:
        return None
    if isinstance(value, dict) and value.get("bytes"):
        return bytes(value["bytes"])
    if isinstance(value, dict) and value.get("path"):
        return Path(value["path"])
    raise ValueError(f"no picture in {str(value):.60}")
