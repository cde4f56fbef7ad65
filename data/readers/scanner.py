"""A JSON file from front to back with one window of it in memory, and the offsets of what it holds.

The bytes are read as latin-1 text: one character a byte, so that a position in the text is an offset
in the file; strings are therefore to be decoded again by who uses them. (ijson streams too, but does
not say where an element begins.)
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

WINDOW = 1 << 22  # bytes in memory; more only where a single value is larger
CLOSING = {"[": "]", "{": "}"}
DECODER = json.JSONDecoder()


@dataclass(frozen=True, kw_only=True)
class Element:
    """One element of a JSON list or object; strings in `key` and `value` are latin-1 of UTF-8."""

    key: str | None
    start: int
    end: int
    value: Any


class Scanner:
    """A cursor over a JSON file that keeps one window of it in memory."""

    def __init__(self, file: BinaryIO, path: Path, advance: Callable[[int], Any] = lambda _: None):
        self.file, self.path, self.advance = file, path, advance
        self.text, self.offset, self.cursor, self.ended = "", 0, 0, False
        self._more()
        if self.text.startswith("\xef\xbb\xbf"):  # a byte order mark
            self.cursor = 3

    def peek(self) -> str:
        """The next character that is no blank, or nothing at the end of the file."""
        while True:
            while self.cursor < len(self.text) and self.text[self.cursor] in " \t\r\n":
                self.cursor += 1
            if self.cursor < len(self.text) or self.ended:
                return self.text[self.cursor : self.cursor + 1]
            self._more()

    def take(self, choices: str) -> str:
        found = self.peek()
        if not found or found not in choices:
            raise self.error(f"expected one of {choices}, found {found or 'the end of the file'}")
        self.cursor += 1
        return found

    def value(self) -> Element:
        """The JSON value at the cursor."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.cursor)
            except json.JSONDecodeError as error:
                cut = error.pos > len(self.text) - 16 or error.msg.startswith("Unterminated")
                if self.ended or not cut:
                    raise self.error(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:  # an endless number, endless brackets
                raise self.error(str(error)) from None
            else:
                if end + 3 <= len(self.text) or self.ended:  # else a number may go on: 1 of 1e+9
                    start, self.cursor = self.cursor, end
                    offset = self.offset
                    return Element(key=None, start=offset + start, end=offset + end, value=value)
            self._more()

    def elements(self) -> Iterator[Element]:
        """The elements of the list or object at the cursor, one at a time."""
        opening = self.take("[{")
        closing = CLOSING[opening]
        if self.peek() == closing:
            self.take(closing)
            return
        while True:
            key = None
            if opening == "{":
                self.take('"')
                self.cursor -= 1
                key = self.value().value
                self.take(":")
            found = self.value()
            yield Element(key=key, start=found.start, end=found.end, value=found.value)
            if self.take(f",{closing}") == closing:
                return

    def find(self, name: str) -> None:
        """Put the cursor before the value of member `name` of the object at the cursor.

        ValueError, with the names that were found, where there is no such member.
        """
        passed: list[str] = []
        self.take("{")
        while self.peek() != "}":
            key = str(self.value().value)
            self.take(":")
            if key == name:
                return
            passed.append(key)
            self.skip()
            if self.take(",}") == "}":
                break
        raise ValueError(f"{self.path}: lacks {name!r}; it has {', '.join(passed) or 'nothing'}")

    def skip(self) -> None:
        """Pass over one value; a long list or object is never held whole."""
        if self.peek() in CLOSING:
            for _ in self.elements():
                pass
        else:
            self.value()

    def error(self, message: str, position: int | None = None) -> ValueError:
        place = self.offset + (self.cursor if position is None else position)
        return ValueError(f"{self.path}: not JSON at byte {place}: {message}")

    def _more(self) -> None:
        """Drop what lies before the cursor and read on; more at once where a value is large."""
        rest = self.text[self.cursor :]
        new = self.file.read(max(WINDOW, len(rest)))
        self.advance(len(new))
        self.ended = not new
        self.offset += self.cursor
        self.text, self.cursor = rest + new.decode("latin-1"), 0


def member_of(path: Path, name: str) -> Any:
    """One small member of the object that a file holds, wherever it is."""
    with path.open("rb") as file:
        scanner = Scanner(file, path)
        scanner.find(name)
        return scanner.value().value
