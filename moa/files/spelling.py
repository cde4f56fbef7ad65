"""Names of weights and layers, as several versions of transformers spell them.

language_model.model.layers.0.self_attn.q_proj    before 4.52, and in most checkpoints
model.language_model.layers.0.self_attn.q_proj    in memory today
layers.0.self_attn.q_proj                         plain: without the words that differ
"""

from collections.abc import Iterable, Sequence

RENAMED = {"model", "language_model"}


def plain(name: str) -> str:
    """A name without the words by which versions of transformers differ."""
    name = name.replace("vision_tower.vision_model.", "vision_tower.")
    return ".".join(word for word in name.split(".") if word not in RENAMED)


def match_spelling(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """Of names that mean one weight or layer, the first one's spelling -> the second's; none where it is ambiguous."""
    own, theirs = set(names), set(others)
    found = {name: name for name in own & theirs}
    left, right = _by_plain(own - theirs), _by_plain(theirs - own)
    for name, spelled in left.items():
        if len(spelled) == len(right.get(name, [])) == 1:
            found[spelled[0]] = right[name][0]
    return found


def _by_plain(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(plain(name), []).append(name)
    return groups


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The known names with the same numbers and end that share the longest sequence of words with a name."""
    scores = {
        other: _common_words(name.split("."), other.split("."))
        for other in known
        if signature(other) == signature(name)
    }
    return [other for other, score in scores.items() if score == max(scores.values())]


def signature(name: str) -> tuple[str, ...]:
    """What renaming keeps: the numbers of a path, and its last two words."""
    parts = name.split(".")
    return (*(part for part in parts if part.isdigit()), *parts[-2:])


def _common_words(one: Sequence[str], two: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(two) + 1)
    for word in one:
        above = row[:]
        for j, other in enumerate(two):
            row[j + 1] = above[j] + 1 if word == other else max(above[j + 1], row[j])
    return row[-1]
