"""Pickle files of plain values, read without running anything that they name.

A pickle is a program: it may name any function of the machine and call it. Here every name is
refused, so that only lists, tuples, dicts, texts, numbers, booleans and None can come out.
"""

import pickle
from pathlib import Path
from typing import Any, NoReturn


class PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"names {module}.{name}; only plain containers are read")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("refers to an object outside; only plain containers are read")


def load_plain(path: Path) -> Any:
    """The value of a pickle file, of Python 2 too; ValueError for anything but plain containers."""
    with path.open("rb") as file:
        try:
            return PlainUnpickler(file, encoding="latin1").load()
        except Exception as error:  # a broken pickle fails in any way; none of it has run
            raise ValueError(f"{path}: not a pickle of plain containers: {error}") from None
