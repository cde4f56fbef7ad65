"""The names of the formats, found without importing a reader: `@reads("NAME"` in the files of this folder."""

import re
from functools import cache
from pathlib import Path

LINE = re.compile(r'^@(?:reads|parses)\("(\w+)"', re.MULTILINE)


@cache
def readers() -> dict[str, str]:
    """Format -> the module of its reader."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return {name: f"data.readers.{f.stem}" for f in files for name in LINE.findall(f.read_text())}
