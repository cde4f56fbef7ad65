"""How a config dataclass is filled from a file and the command line, and described by `--help`.

An override replaces what stands at its key, so that `experts={lora: {rank: 8}}` leaves one expert.
A list entry is named by its number or its `name`: `stages.router.steps=100`.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
import tokenize
import typing
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")
Override = str | tuple[str, Any]  # "key.sub=YAML text" of a user, or a key and its value as it is
BOOL = "tag:yaml.org,2002:bool"


class Loader(yaml.SafeLoader):
    """YAML with the booleans of its version 1.2: `gates=off` is a word, not false."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag != BOOL]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver(BOOL, re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))


def load(cls: type[T], path: str | Path | None, overrides: Sequence[Override] = ()) -> T:
    """Defaults of `cls`, then the YAML file, then `key.sub=value`, as a checked dataclass.

    Raises ValueError naming the file or override, the key, and near or possible choices.
    """
    raw = read_yaml(path) if path is not None else {}
    for override in overrides:
        apply_override(raw, override)
    where = f"{path}: " if path is not None else ""
    schema = OmegaConf.structured(cls)
    if wrong := wrong_container(schema, raw):
        raise ValueError(f"{where}{wrong}")
    try:
        return typing.cast(T, OmegaConf.to_object(OmegaConf.merge(schema, raw)))
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        key = full_key(raw, error.full_key) if error.full_key else ""
        raise ValueError(f"{where}{key}{': ' if key else ''}{message}") from None


def wrong_container(schema: Any, raw: Any, path: str = "") -> str | None:
    """The first key that holds a list for a mapping or the reverse, which OmegaConf leaves unnamed."""
    if isinstance(schema, DictConfig) and isinstance(raw, dict):
        known = (key for key in raw if key in schema)
        found = (wrong_container(schema[k], raw[k], f"{path}.{k}" if path else k) for k in known)
        return next(filter(None, found), None)
    if isinstance(schema, ListConfig) and isinstance(raw, dict):
        return f"{path}: must be a list of entries, got a mapping of {list(raw)}"
    if isinstance(schema, DictConfig) and isinstance(raw, list):
        return f"{path}: must be a mapping, got a list"
    return None


def read_yaml(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such config file")
    try:
        raw = yaml.load(Path(path).read_text(), Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if raw is not None and not isinstance(raw, dict):
        raise ValueError(f"{path}: a config is a mapping of keys, got {type(raw).__name__}")
    return raw or {}


def apply_override(raw: dict[str, Any], override: Override) -> None:
    """Put the value of `key.sub=value` into nested mappings and lists, in place."""
    key, value = read_override(override) if isinstance(override, str) else override
    override = override if isinstance(override, str) else key
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[entry(node, part, override)]
    node[entry(node, last, override)] = value


def read_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override!r}: an override is written key.sub=value")
    try:
        return key, yaml.load(
            re.sub(r"([{,]\s*\w+):(?=\S)", r"\1: ", text), Loader
        )  # {a:1}: {a: 1}
    except yaml.YAMLError as error:
        raise ValueError(f"{override!r}: the value is not valid YAML: {error}") from None


def entry(node: Any, part: str, override: str) -> Any:
    """The index or key of `part` in a list (by number or `name`) or a mapping."""
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise ValueError(f"{override!r}: nothing lies below {node!r}, so it has no {part!r}")
    names = [item.get("name") if isinstance(item, dict) else None for item in node]
    found = [i for i, name in enumerate(names) if name == part]
    if part.isdigit() and int(part) < len(node):
        found = [int(part)]
    if len(found) != 1:
        choices = [*range(len(node)), *(name for name in names if name)]
        raise ValueError(f"{override!r}: {part!r} is not one entry; choices: {choices}")
    return found[0]


def full_key(raw: Any, tail: str) -> str:
    """The whole path of a key that OmegaConf names from within a list entry only."""
    first = re.split(r"[.\[]", tail)[0]

    def search(node: Any, path: str, in_entry: bool) -> str | None:
        pairs = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in pairs:
            here = f"{path}.{key}" if path else str(key)
            if in_entry and str(key) == first:
                return here + tail[len(first) :]
            inside = in_entry or isinstance(node, list)
            if isinstance(value, dict | list) and (found := search(value, here, inside)):
                return found
        return None

    return tail if first in raw else search(raw, "", False) or tail


def to_yaml(config: Any) -> str:
    """The resolved config as YAML that `load` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, width=100)


def describe(cls: type) -> str:
    """Every setting of a config class: dotted key, default, type, one line of doc."""
    lines = []
    for key, kind, default, doc in settings(cls, ""):
        lines.append(f"{key}={default}" if default is not None else f"{key}  (required)")
        lines += textwrap.wrap(f"{doc}{' ' if doc else ''}[{kind}]", 96, initial_indent="    ",
                               subsequent_indent="    ")  # fmt: skip
    return "\n".join(lines)


def settings(cls: type, prefix: str) -> list[tuple[str, str, str | None, str]]:
    """`(key, type, default as YAML or None, doc)` of each field, nested classes opened."""
    docs, hints, rows = field_comments(cls), typing.get_type_hints(cls), []
    for item in dataclasses.fields(cls):
        hint, key = hints[item.name], prefix + item.name
        inner = [t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)]
        if inner and hint is inner[0]:
            rows += settings(typing.cast(type, hint), f"{key}.")
            continue
        rows.append((key, type_name(hint), default_of(item), docs.get(item.name, "")))
        if inner and key in ("experts", "stages", "data.sources", "sources"):
            mark = "NAME" if typing.get_origin(hint) is dict else "N"
            rows += settings(typing.cast(type, inner[0]), f"{key}.{mark}.")
    return rows


def default_of(item: dataclasses.Field) -> str | None:
    if item.default_factory is not dataclasses.MISSING:
        value = item.default_factory()
    elif item.default is not dataclasses.MISSING:
        value = item.default
    else:
        return None
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("...\n").strip()


def type_name(hint: Any) -> str:
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return " | ".join(map(str, choices))
    if hint is type(None):
        return "null"
    if (
        choices
        and isinstance(typing.get_origin(hint), type)
        and hint.__class__ is not type(int | str)
    ):
        outer = typing.get_origin(hint).__name__
        return f"{outer} of {', '.join(map(type_name, choices))}"
    return " | ".join(map(type_name, choices)) if choices else getattr(hint, "__name__", str(hint))


def field_comments(cls: type) -> dict[str, str]:
    """Field -> its comment: on the same line, or on the lines directly above."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(StringIO(source).readline)
    comments = {t.start[0]: t.string[1:].strip() for t in tokens if t.type == tokenize.COMMENT}
    body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    docs: dict[str, str] = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above = node.lineno - 1
            doc = comments.get(node.lineno) or comments.get(node.end_lineno or node.lineno)
            if doc is None and above in comments and not _code_on(source, above):
                doc = comments[above]
            docs[node.target.id] = doc or ""
    return docs


def _code_on(source: str, line: int) -> bool:
    return not source.splitlines()[line - 1].lstrip().startswith("#")
