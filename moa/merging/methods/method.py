"""What a merging method is: names of functions of tensors, and what the command line reads of them."""

import ast
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

ROOM = "moa.merging"  # a function's path is MODULE.NAME within it, such as methods.sparse.elect


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
    file = Path(__file__).parents[1] / f"{module.replace('.', '/')}.py"
    body = ast.parse(file.read_text(encoding="utf-8")).body
    found = next(n for n in body if isinstance(n, ast.FunctionDef) and n.name == name)
    pairs = zip(found.args.kwonlyargs, found.args.kw_defaults, strict=True)
    options = {a.arg: ast.literal_eval(d) for a, d in pairs if d is not None and a.arg != "shared"}
    return (ast.get_docstring(found) or "").partition("\n")[0], options


SPACES = {
    "core": "the small matrices in the experts' common directions: exact, whatever the factors",
    "rows": "common output directions, original input coordinates, as KnOTS",
    "dense": "the updates' own entries, streamed by blocks of rows; the result is cut to the rank",
    "factor": "A and B apart, as PEFT does: cross terms, and the result depends on the factoring",
}
Weights = Literal["mean", "ones"]  # where the user gives none: 1/N each, or 1 each


@dataclass(frozen=True)
class Method:
    """A row of the method table.

    Its function(stack, weights, **options) returns the merged matrix [rows, cols] of a Stack: of the core matrices, the
    dense updates, or, in `factor` space, once of all A and once of all B. A `joint` method takes (stack of A, stack of
    B, weights) and returns both. A sparse method has no `module`, but `thin`, which drops values of each update, and
    `combine`, which makes one matrix of what is left.
    """

    module: str  # of its function, in this folder; empty for a sparse method
    weights: Weights
    paper: str
    _: KW_ONLY
    name: str = ""  # of the row, and of the function
    thin: str = ""
    combine: str = ""
    spaces: tuple[str, ...] = ("core",)  # the first is the default
    is_sum: bool = False  # the result is a weighted sum of the updates, so some mixture equals it
    joint: bool = False
    reads_inputs: bool = False  # needs the statistics of each expert's inputs
    # (every site's stack, **options) -> what the function gets as `shared`: statistics over the whole model
    prepare: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)  # where the functions have others

    @property
    def parts(self) -> list[str]:
        names = [f"{self.module}.{self.name}"] if self.module else [self.thin, self.combine]
        return [f"methods.{name}" for name in names]

    @property
    def function(self) -> Callable[..., Any]:
        functions = [import_function(part) for part in self.parts]
        if self.module:
            return functions[0]
        own = frozenset(read_function(self.parts[0])[1]) | ({"shared"} if self.prepare else set())
        return partial(import_function("methods.sparse.thin_and_combine"), *functions, own, **self.defaults)

    @property
    def about(self) -> str:
        first, *then = [read_function(part)[0].rstrip(".") for part in self.parts]
        return ", then ".join([first, *(text[0].lower() + text[1:] for text in then)]) + "."

    @property
    def options(self) -> dict[str, Any]:
        """Options and their defaults: the keyword arguments of its functions."""
        found = [read_function(part)[1] for part in self.parts]
        return {key: value for part in found for key, value in part.items()} | dict(self.defaults)


def check_choice(key: str, value: str, choices: tuple[str, ...], of: str = "options") -> None:
    """ValueError with the choices, unless the value of `of`.`key` is one of them."""
    if value not in choices:
        raise ValueError(f"{of}.{key}: must be one of {list(choices)}, got {value!r}")


def check_share(key: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"options.{key}: must be in (0, 1], got {value}")
