"""YAML as people write settings: words and numbers of its version 1.2, and a limit on its size.

`off` and `no` are words, `1e-4` is a number, `12:30` and `2024-01-01` are words. A key that is given
twice is an error. Aliases may not refer to themselves, nor make more than MAX_VALUES values.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MAX_VALUES, MAX_DEPTH = 100_000, 64
TAG = "tag:yaml.org,2002:"
FLOAT = (
    r"[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)|[-+]?\.(?:inf|Inf|INF)"
    r"|\.(?:nan|NaN|NAN)"
)
WORDS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][\d_]*|0x[\da-fA-F]+|0o[0-7]+)", "-+0123456789"),
    ("float", FLOAT, "-+.0123456789"),
)


class Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if tag in (f"{TAG}null", f"{TAG}merge")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    num_values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.num_values += 1
        event = self.peek_event()
        if self.num_values > MAX_VALUES:
            raise ConstructorError(None, None, f"more than {MAX_VALUES:,} values", None)
        if getattr(event, "tag", None) not in (None, "!", f"{TAG}str"):
            raise ConstructorError(None, None, f"tag {event.tag} is not used here", event.start_mark)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, ScalarNode)]
        keys = [key for key in keys if key != "<<"]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ConstructorError(None, None, f"key {twice!r} is given twice", node.start_mark)
        return node


for _name, _rule, _first in WORDS:
    Loader.add_implicit_resolver(TAG + _name, re.compile(rf"(?:{_rule})\Z"), list(_first))


def parse_yaml(text: str) -> Any:
    """The value of a text; ValueError, in one line, for what is not valid or too large."""
    loader = None
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        check_size(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{error.problem or error.context}{where}") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    finally:
        if loader is not None:
            loader.dispose()


def check_size(node: Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many values and levels a node is when aliases are followed; `known` holds those of others."""
    if id(node) not in known:
        known[id(node)] = None  # being counted
        inside = [check_size(inner, known) for inner in children(node)]
        known[id(node)] = 1 + sum(s for s, _ in inside), 1 + max((n for _, n in inside), default=0)
    found = known[id(node)]
    if found is None:
        broken = "an alias refers to itself"
    elif found[0] > MAX_VALUES:
        broken = f"aliases make more than {MAX_VALUES:,} values"
    elif found[1] > MAX_DEPTH:
        broken = f"nested deeper than {MAX_DEPTH} levels"
    else:
        return found
    raise ConstructorError(None, None, broken, node.start_mark)


def children(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [inner for pair in node.value for inner in pair]
    return node.value if isinstance(node, SequenceNode) else []


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a file, empty for an empty one; ValueError naming the file."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such config file")
    try:
        raw = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not valid YAML: not text in UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if raw is not None and not isinstance(raw, dict):
        raise ValueError(f"{path}: a config is a mapping of keys, got {type(raw).__name__}")
    return raw or {}
