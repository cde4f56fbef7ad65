"""Which layers of a model a list of target names or expressions means."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

T = TypeVar("T")


def is_target(module: nn.Module) -> bool:
    """A linear layer whose forward runs: nn.MultiheadAttention reads its output projection's
    weight instead, so an expert around that layer would never be used."""
    return isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)


def select(patterns: Sequence[str], modules: Mapping[str, T], key: str) -> dict[str, T]:
    """The modules, in their order, whose whole path one of the patterns is or matches.

    Raises ValueError naming `key` for a pattern that matches nothing, with near names.
    """
    found: set[str] = set()
    for pattern in patterns:
        try:
            matches = {name for name in modules if name == pattern or re.fullmatch(pattern, name)}
        except re.error as error:
            raise ValueError(f"{key}: {pattern!r} is no regular expression: {error}") from None
        if not matches:
            raise ValueError(no_match(pattern, modules, key))
        found |= matches
    return {name: module for name, module in modules.items() if name in found}


def no_match(pattern: str, names: Iterable[str], key: str) -> str:
    literal = re.sub(r"[\\^$*+?()\[\]|]", "", pattern)
    near = difflib.get_close_matches(literal, list(names), n=3, cutoff=0.3)
    return (
        f"{key}: {pattern!r} matches no linear layer; it must be a full path or a regular "
        f"expression for the whole path. Near names: {', '.join(near) or 'none'}"
    )
