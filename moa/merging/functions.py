"""Functions by name, so that a table of them is read, listed and checked without importing what they need.

A path is MODULE.NAME within this room, such as methods.sparse.elect.
"""

import ast
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

ROOM = "moa.merging"


@cache
def import_function(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"{ROOM}.{module}"), name)


@cache
def read_function(path: str) -> tuple[str, dict[str, Any]]:
    """The first line of a function's docstring, and its keyword-only arguments that have defaults.

    From the source, so that torch is not imported; defaults must be literals. `shared` is not an option: a method
    gets it from its `prepare`.
    """
    module, _, name = path.rpartition(".")
    file = Path(__file__).parent / f"{module.replace('.', '/')}.py"
    body = ast.parse(file.read_text(encoding="utf-8")).body
    found = next(n for n in body if isinstance(n, ast.FunctionDef) and n.name == name)
    pairs = zip(found.args.kwonlyargs, found.args.kw_defaults, strict=True)
    options = {a.arg: ast.literal_eval(d) for a, d in pairs if d is not None and a.arg != "shared"}
    return (ast.get_docstring(found) or "").partition("\n")[0], options
