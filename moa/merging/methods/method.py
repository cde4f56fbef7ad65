"""What a merging method is: a function of tensors, and what the command line must know about it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

SPACES = {
    "core": "the small matrices in the experts' common directions: exact, whatever the factors",
    "rows": "common output directions, original input coordinates, as KnOTS",
    "dense": "the updates' own entries, streamed by blocks of rows; the result is cut to the rank",
    "factor": "A and B apart, as PEFT does: cross terms, and the result depends on the factoring",
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of a method table.

    `function(stack, weights, **options)` returns the merged matrix [rows, cols] of a Stack: of the core matrices, of
    the dense updates, or, in `factor` space, once of all A and once of all B. A `joint` method takes (stack of A,
    stack of B, weights) and returns both. The keyword arguments of a function are the method's options.
    """

    function: Callable[..., Any]
    default_weights: Literal["mean", "ones"]  # where the user gives none: 1/N each, or 1 each
    paper: str
    spaces: tuple[str, ...] = ("core",)  # the first is the default
    is_sum: bool = False  # the result is a weighted sum of the updates, so some mixture equals it
    joint: bool = False
    # (every site's stack, **options) -> what the function gets as `shared`: statistics over the whole model
    prepare: Callable[..., Any] | None = None


def check_choice(key: str, value: str, choices: tuple[str, ...], of: str = "options") -> None:
    """ValueError with the choices, unless the value of `of`.`key` is one of them."""
    if value not in choices:
        raise ValueError(f"{of}.{key}: must be one of {list(choices)}, got {value!r}")
