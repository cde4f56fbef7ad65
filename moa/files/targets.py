"""Which layers of a model a list of target names or expressions means."""

import difflib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeGuard, TypeVar

import regex  # re with a limit on the time that an expression may take
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

T = TypeVar("T")
ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the output's
SECONDS = 2.0  # for one path: an honest expression takes microseconds
_compiled: Any = lru_cache(4096)(regex.compile)


def fits(pattern: str, path: str, where: str) -> bool:
    """Whether a regular expression matches a whole path; ValueError naming `where` for one that is none."""
    try:
        return _compiled(pattern).fullmatch(path, timeout=SECONDS) is not None
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{where}: {pattern[:80]!r} is not a regular expression: {error}") from None
    except TimeoutError:
        raise ValueError(
            f"{where}: {pattern[:80]!r} took over {SECONDS:g} s for {path}: repetitions inside repetitions; "
            "write it without them"
        ) from None


def finds(pattern: str, path: str, where: str) -> bool:
    """Whether a regular expression matches anywhere in a path."""
    return fits(f".*(?:{pattern}).*", path, where)


def is_target(module: nn.Module) -> TypeGuard[nn.Linear]:
    """A linear layer whose forward runs: nn.MultiheadAttention reads its output projection's weight instead."""
    return isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)


def select(patterns: Sequence[str], modules: Mapping[str, T], key: str) -> dict[str, T]:
    """The modules, in their order, whose whole path a pattern is or matches; ValueError for a pattern without any."""
    found: set[str] = set()
    for pattern in patterns:
        if pattern == ALL_LINEAR:
            found |= modules.keys()
            continue
        matches = {name for name in modules if name == pattern or fits(pattern, name, key)}
        if not matches:
            literal = regex.sub(r"[\\^$*+?()\[\]|]", "", pattern)
            near = ", ".join(difflib.get_close_matches(literal, list(modules), n=3, cutoff=0.3))
            rule = "it must be a full path or a regular expression for the whole path"
            raise ValueError(f"{key}: {pattern!r} matches no linear layer; {rule}. Near names: {near or 'none'}")
        found |= matches
    return {name: module for name, module in modules.items() if name in found}
