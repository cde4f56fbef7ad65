"""How a config dataclass is filled from a file and the command line, and described by `--help`.

An override replaces the value at its key, so that `experts={lora: {rank: 8}}` leaves one expert.
In a mapping of records, such as `stages`, the key of an entry is the record's `name`.
"""

import ast
import dataclasses
import inspect
import json
import math
import os
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Callable, Sequence
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from moa.cli.ranges import FINITE, OF_RUN, PATH, Range, Wrong
from moa.cli.ranges import check as check  # for classes of settings
from moa.cli.strict_yaml import parse_yaml, read_yaml

T = TypeVar("T")
Override = str | tuple[str, Any]  # "key.sub=YAML text" of a user, or a key and its value as it is
ROOT = "root"  # key of a stored config: the folder that its relative paths are taken from
# What takes an entry out of a mapping of records: null in a layer, over an entry of those below.
REMOVED = type("Removed", (), {"__repr__": lambda self: "null"})()
EACH = "*"  # in a layer: every entry of a mapping of those below
DEFAULT = "default"  # at EACH in a section of a layer: it starts anew from its defaults
Leaf = Callable[[Any, Sequence[Any], Any, str], Any]


def load(cls: type[T], path: str | Path | Sequence[str | Path] | None, overrides: Sequence[Override] = ()) -> T:
    """Defaults of `cls`, then the YAML files in turn, then `key.sub=value`, as a checked dataclass. Raises ValueError
    naming the file or override, the key, and near or possible choices."""
    raw: dict[str, Any] = {}
    paths = [path] if isinstance(path, str | Path) else path or ()
    for file in paths:
        layer = read_yaml(expanded(file))
        if isinstance(layer.get(ROOT), str):
            layer = visit(cls, layer, "", anchor_at(layer[ROOT]))
        layer = visit(cls, layer, "", with_defaults)
        raw = laid_over(raw, layer)
    for override in overrides:
        apply_override(raw, override)
    try:
        checked = visit(cls, raw, "", check_value)
        try:
            return to_object(cls, checked)
        except Wrong:
            visit(cls, checked, "", check_object)  # slower: finds the whole key
            raise
    except Wrong as error:
        where = ", ".join(map(str, paths))
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def laid_over(below: Any, above: Any) -> Any:
    """Mappings joined key by key, in the order of the lower one; anything else is replaced. A mapping at `*` is laid
    over every mapping of the lower one first: `experts: {"*": {rank: 4}, vqa: {rank: 8}}`."""
    if above is None and isinstance(below, dict):
        return REMOVED
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    entries, each = [key for key, value in below.items() if isinstance(value, dict)], above.get(EACH)
    if isinstance(each, dict) and entries:
        below = below | {key: laid_over(below[key], each) for key in entries}
        above = {key: value for key, value in above.items() if key != EACH}
    joined = {key: laid_over(below.get(key), value) for key, value in above.items()}
    return {**below, **joined}


def with_defaults(kind: Any, marks: Sequence[Any], value: Any, key: str) -> Any:
    """`{"*": default, kind: top_k}` of a layer as all defaults of the section with `kind` over them. Settings with the
    mark OF_RUN are left out, so that those below stay. Sections without such settings have no `"*"`."""
    if not (dataclasses.is_dataclass(kind) and isinstance(value, dict) and value.get(EACH) == DEFAULT):
        return value
    hints = type_hints(typing.cast(type, kind))
    stay = {name for name, hint in hints.items() if OF_RUN in unwrapped(hint)[1]}
    if not stay:
        return value  # an unknown key
    fresh = {name: inner for name, inner in as_mapping(typing.cast(type, kind)()).items() if name not in stay}
    return fresh | {name: inner for name, inner in value.items() if name != EACH}


def to_object(cls: type[T], raw: dict[Any, Any]) -> T:
    """OmegaConf's types, choices and known keys, then the class's own rules; Wrong for what breaks them."""
    try:
        return typing.cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), raw)))
    except OmegaConfBaseException as error:
        key = re.sub(r"\[(\w+)\]", r".\1", str(error.full_key or ""))
        message = str(error).splitlines()[0]
        if isinstance(error, ConfigKeyError) and "Did you mean" not in message:
            kind: Any = error.object_type or cls
            message += f"; choices: {', '.join(item.name for item in dataclasses.fields(kind))}"
        raise Wrong(key, message) from None


def visit(hint: Any, value: Any, key: str, leaf: Leaf) -> Any:
    """`value` with `leaf(type, marks, value, key)` in the place of each of its parts, the inner first. Marks are what
    `Annotated` adds to the type. Unknown keys stay as they are."""
    kind, marks = unwrapped(hint)

    def inside(inner: Any, part: Any, found: Any) -> Any:
        return visit(inner, found, f"{key}.{part}" if key else str(part), leaf)

    if isinstance(value, dict) and dataclasses.is_dataclass(kind):
        hints = type_hints(typing.cast(type, kind))
        value = {k: inside(hints[k], k, v) if k in hints else v for k, v in value.items()}
    elif isinstance(value, dict) and typing.get_origin(kind) is dict:
        value = {k: inside(typing.get_args(kind)[1], k, v) for k, v in value.items()}
    elif isinstance(value, list) and typing.get_origin(kind) is list:
        value = [inside(typing.get_args(kind)[0], i, v) for i, v in enumerate(value)]
    return leaf(kind, marks, value, key)


@cache
def type_hints(cls: typing.Hashable) -> dict[str, Any]:
    return typing.get_type_hints(typing.cast(Any, cls), include_extras=True)


def unwrapped(hint: Any) -> tuple[Any, Sequence[Any]]:
    """A type without `| None` and `Annotated`, and the marks of the latter."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return unwrapped(kinds[0]) if len(kinds) == 1 else (hint, ())
    if typing.get_origin(hint) is Annotated:
        return unwrapped(hint.__origin__)[0], hint.__metadata__
    return hint, ()


def check_value(kind: Any, marks: Sequence[Any], value: Any, key: str) -> Any:
    """The value, with `~` of a path in full; Wrong where it is not of its type or range."""
    if value is REMOVED:  # for the mapping that it is an entry of
        return value
    outer = dict if dataclasses.is_dataclass(kind) else typing.get_origin(kind)
    if outer in (dict, list) and value is not None:
        if not isinstance(value, outer):
            raise Wrong(key, wrong_container(kind, outer, value))
        return named(kind, value, key)  # its parts have been checked
    check_texts(value, key)
    if kind in (int, float):
        check_range(next((m for m in marks if isinstance(m, Range)), FINITE), value, key)
    return full_paths(value, key) if PATH in marks else value


def wrong_container(kind: Any, outer: type, value: Any) -> str:
    """The rule that a value breaks which is not a mapping or not a list."""
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, dict) and "name" in first and is_by_name(kind):
        name = first["name"]
        return f"is a mapping by name: write '{name}:' instead of '- name: {name}'"
    one, two = ("mapping", "{...}") if outer is dict else ("list", "[...]")
    return f"must be a {one}, {two}, got {shortened(value)}"


def is_by_name(kind: Any) -> bool:
    """Whether a type is a mapping of records that have their key as their `name`."""
    inner = typing.get_args(kind)[1:] if typing.get_origin(kind) is dict else ()
    return any(isinstance(cls, type) and "name" in type_hints(cls) for cls in inner)


def named(kind: Any, value: Any, key: str) -> Any:
    """A mapping of records without those that null took out, each with its key as its name."""
    if not (typing.get_origin(kind) is dict and dataclasses.is_dataclass(typing.get_args(kind)[1])):
        return {k: None if v is REMOVED else v for k, v in value.items()} if isinstance(value, dict) else value
    value = {name: entry for name, entry in value.items() if entry is not REMOVED}
    for name, entry in value.items():
        if entry is None:
            raise Wrong(f"{key}.{name}", "is null, which takes an entry out, and there is none of this name")
        if name == "":
            raise Wrong(key, "a name must not be empty")
        if name == EACH:
            raise Wrong(f"{key}.{name}", "is every entry of the files below, and there is none")
    if not is_by_name(kind):
        return value
    for name, entry in value.items():
        if isinstance(entry, dict) and "name" in entry:
            raise Wrong(f"{key}.{name}.name", f"leave it out: {name!r} is the name already")
    return {n: {**e, "name": n} if isinstance(e, dict) else e for n, e in value.items()}


def shortened(value: Any) -> str:
    return textwrap.shorten(repr(value), 80, placeholder=" ...")


def check_object(kind: Any, marks: Sequence[Any], value: Any, key: str) -> Any:
    """Wrong, with its whole key, for a mapping that is not an object of its class; the inner were."""
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        try:
            to_object(typing.cast(type, kind), value)
        except Wrong as error:
            raise error.within(key) from None
    return value


def check_range(allowed: Range, value: Any, key: str) -> None:
    """Of numbers, also as text; whatever is none is left to OmegaConf's own check."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except ValueError:
        return
    if rule := allowed.broken_by(number):
        raise Wrong(key, f"must be {rule}, got {str(value)[:40]}")


def check_texts(value: Any, key: str) -> None:
    """Wrong for a text that OmegaConf would replace, and for one that no file can hold."""
    if isinstance(value, str):
        if "${" in value:
            raise Wrong(key, f"settings are not interpolated; write {value!r} without ${{")
        if not value.isascii() and value.encode(errors="replace").decode() != value:
            raise Wrong(key, f"{value!r} holds half a character (a lone surrogate)")
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            check_texts(inner, key)


def full_paths(value: Any, key: str) -> Any:
    """Paths with their `~` in full: a text, or the texts in a mapping or list."""
    if isinstance(value, dict):
        return {name: full_paths(inner, f"{key}.{name}") for name, inner in value.items()}
    if isinstance(value, list):
        return [full_paths(inner, key) for inner in value]
    if not isinstance(value, str):
        return value
    if not value.strip() or "\0" in value:
        raise Wrong(key, f"must name a file or folder, got {value!r}")
    try:
        return expanded(value)
    except ValueError as error:
        raise Wrong(key, str(error)) from None


def expanded(path: str | Path) -> str:
    """A path with `~` in full, and under `assets/` the installed one where the working folder lacks it."""
    full = os.path.expanduser(path)
    if full.startswith("~"):
        raise ValueError(f"no home folder for {full!r}; write ./{full} for a folder of this name")
    if full.startswith("assets/") and not os.path.exists(full):
        installed = Path(__file__).parents[2] / full
        return str(installed) if installed.exists() else full
    return full


def anchor_at(root: str) -> Leaf:
    """Takes relative paths from `root`, where something is there; the working directory has the rest."""

    def anchored(kind: Any, marks: Sequence[Any], value: Any, key: str) -> Any:
        if PATH not in marks:
            return value
        if isinstance(value, dict):
            return {name: anchored(kind, marks, inner, key) for name, inner in value.items()}
        there = os.path.join(root, value) if isinstance(value, str) else ""
        return there if there and os.path.exists(there) else value

    return anchored


def apply_override(raw: dict[str, Any], override: Override) -> None:
    key, value = read_override(override) if isinstance(override, str) else override
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ValueError(f"{override!r}: {part} is {shortened(node)}, which has no keys; give it whole")
    node[last] = laid_over(node.get(last), None) if value is None else value


def read_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override!r}: an override is written key.sub=value")
    try:
        return key, spaced(parse_yaml(text))
    except ValueError as error:
        raise ValueError(f"{override!r}: the value is not valid YAML: {error}") from None


def spaced(value: Any) -> Any:
    """`{a:1}` as `{a: 1}`: to YAML the former is a key `a:1` without a value."""
    if isinstance(value, list):
        return [spaced(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for key, inner in value.items():
        if inner is None and isinstance(key, str) and re.match(r"\w+:\S", key):
            key, _, text = key.partition(":")
            inner = parse_yaml(text)
        found[key] = spaced(inner)
    return found


def to_yaml(config: Any) -> str:
    """The resolved config as YAML that `load` reads back."""
    return yaml.safe_dump(as_mapping(config), sort_keys=False, width=100)


def as_mapping(value: Any, *, entry: bool = False) -> Any:
    """A config as nested mappings; an `entry` of a mapping leaves its name to the key."""
    if dataclasses.is_dataclass(value):
        names = [item.name for item in dataclasses.fields(value) if not (entry and item.name == "name")]
        return {name: as_mapping(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {key: as_mapping(inner, entry=True) for key, inner in value.items()}
    return [as_mapping(inner) for inner in value] if isinstance(value, list) else value


def describe(cls: type) -> str:
    """Every setting of a config class: dotted key, default, its comment, type and range."""
    lines = []
    for key, kind, default, doc in settings(cls, ""):
        lines.append(f"{key}={default}" if default is not None else f"{key}  (required)")
        lines += textwrap.wrap(f"{doc}{' ' if doc else ''}[{kind}]", 96, initial_indent="    ",
                               subsequent_indent="    ")  # fmt: skip
    return "\n".join(lines)


def settings(cls: type, prefix: str) -> list[tuple[str, str, str | None, str]]:
    """`(key, type, default as YAML or None, doc)` of each field, nested classes opened."""
    docs, rows = field_comments(cls), list[tuple[str, str, str | None, str]]()
    hints = type_hints(cls)
    for item in dataclasses.fields(cls):
        hint, key = hints[item.name], prefix + item.name
        inner = [t for t in (hint, *typing.get_args(hint)) if isinstance(t, type) and dataclasses.is_dataclass(t)]
        if inner and hint is inner[0]:
            rows += settings(typing.cast(type, hint), f"{key}.")
            continue
        rows.append((key, type_name(hint), default_of(item), docs.get(item.name, "")))
        if inner and key in ("experts", "stages", "data.sources", "sources", "federated.clients"):
            within = settings(typing.cast(type, inner[0]), f"{key}.NAME.")
            rows += [row for row in within if row[0] != f"{key}.NAME.name"]
    return rows


def default_of(item: dataclasses.Field) -> str | None:
    if item.default_factory is not dataclasses.MISSING:
        value = item.default_factory()
    elif item.default is not dataclasses.MISSING:
        value = item.default
    else:
        return None
    if isinstance(value, str) and not value.isprintable():
        return json.dumps(value, ensure_ascii=False)
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("...\n").strip()


def type_name(hint: Any) -> str:
    choices, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin is Annotated:
        limits = [str(mark) for mark in hint.__metadata__ if isinstance(mark, Range)]
        return ", ".join(filter(None, [type_name(hint.__origin__), *limits]))
    if origin is Literal:
        return " | ".join(map(str, choices))
    if hint is type(None):
        return "null"
    if choices and origin not in (Union, types.UnionType):
        return f"{getattr(origin, '__name__', origin)} of {', '.join(map(type_name, choices))}"
    return " | ".join(map(type_name, choices)) if choices else getattr(hint, "__name__", str(hint))


def field_comments(cls: type) -> dict[str, str]:
    """Field -> its comments: on the lines above that hold nothing else, and those beside its parts."""
    docs = dict[str, str]()
    for base in filter(dataclasses.is_dataclass, cls.__bases__):
        docs |= field_comments(base)
    source = textwrap.dedent(inspect.getsource(cls))
    found = [t for t in tokenize.generate_tokens(StringIO(source).readline) if t.type == tokenize.COMMENT]
    comments = {t.start[0]: re.sub(r"\s*#?\s*(fmt: skip|noqa.*)$", "", t.string[1:].strip()) for t in found}
    alone = {t.start[0] for t in found if t.line.lstrip().startswith("#")}
    for node in typing.cast(ast.ClassDef, ast.parse(source).body[0]).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first, last = node.lineno, node.end_lineno or node.lineno
            while first - 1 in alone:
                first -= 1
            lines = (comments.get(line, "") for line in range(first, last + 1))
            docs[node.target.id] = " ".join(filter(None, lines))
    return docs
