"""Every merging method by name, and the options that a user may give it."""

import difflib
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from moa.merging.methods import factorwise, linear, sparse, spectral
from moa.merging.methods.method import Method

METHODS: dict[str, Method] = {
    **linear.METHODS,
    **sparse.METHODS,
    **spectral.METHODS,
    **factorwise.METHODS,
}


def find_method(name: str, space: str | None = None) -> Method:
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3) or "none"
        raise ValueError(f"method: no such method {name!r}; near: {near}; method=list prints all")
    if space is not None and space not in METHODS[name].spaces:
        choices = list(METHODS[name].spaces)
        raise ValueError(f"space: method {name} is not defined in {space!r}; choices: {choices}")
    return METHODS[name]


def method_options(name: str) -> dict[str, Any]:
    """The options of a method and their defaults: the keyword arguments of its function."""
    parameters = inspect.signature(METHODS[name].function).parameters.values()
    return {
        p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "shared"
    }


def check_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The method's options with the given ones put in; ValueError names an unknown or odd one."""
    known = method_options(method)
    for key, value in options.items():
        if key not in known:
            choices = sorted(known) or "none"
            raise ValueError(f"options.{key}: method {method} has no such option; it has {choices}")
        number = isinstance(known[key], float) and isinstance(value, int | float)
        if not number and type(value) is not type(known[key]):
            kind = type(known[key]).__name__
            raise ValueError(f"options.{key}: must be a {kind}, got {value!r}")
        if number and not -sys.float_info.max <= value <= sys.float_info.max:  # NaN is not
            raise ValueError(f"options.{key}: must be finite, got {str(value)[:40]}")
    return {**known, **options}
