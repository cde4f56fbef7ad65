"""Skills added up and subtracted as text: "caption + 2 * ocr_vqa - toxic" -> one adapter, by scripts.merge.

What is added is merged, as each expert answers every input: by `regmean` where all of them have statistics of their
inputs, else as the weighted mean. What is subtracted comes off the result at its own number.
"""

import re
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from moa.card import local_fingerprint
from moa.merging.run import merge_experts
from moa.merging.settings import MergeExperts, StoreConfig
from moa.merging.store.place import NAME, Entry, open_place

NUMBER = r"\d+\.?\d*|\.\d+"
TERM = re.compile(rf"\s*([+-])\s*(?:({NUMBER})\s*\*\s*)?({NAME}(?:@[0-9a-f]+)?)\s*(?=[+-]|$)")


def compose(settings: StoreConfig, console: Console) -> None:
    place, terms = open_place(settings.store), parse(settings.expression or "")
    found = {term: place.get(term) for term in terms}
    entries = {entry.name: entry for entry, _ in found.values()}
    bases = {"base": local_fingerprint(settings.base)} | {
        name: entry.base_fingerprint for name, entry in entries.items()
    }
    known = {name: own for name, own in bases.items() if own}
    if len(set(known.values())) > 1:
        several = ", ".join(f"{name} {own}" for name, own in known.items())
        raise ValueError(f"expression: of several bases: {several}; find base=BASE lists the experts of one")
    weights = dict(zip(entries, terms.values(), strict=True))
    chosen, why = choose(weights, entries)
    if settings.method is not None:
        chosen, why = {"method": settings.method, "weights": weights}, "which was given"
    console.print(f"{settings.expression}: {chosen['method']}, {why}", soft_wrap=True, highlight=False)
    chosen |= {key: getattr(settings, key) for key in ("base", "rank", "out", "verify")}
    merge_experts(MergeExperts(adapters=[str(folder) for _, folder in found.values()], **chosen), console)


def parse(expression: str) -> dict[str, float]:
    """NAME or NAME@VERSION -> its signed number; ValueError that shows what is no term."""
    text = expression.strip()
    text = text if text.startswith(("+", "-")) else f"+{text}"
    terms, names, place = dict[str, float](), set[str](), 0
    while place < len(text):
        match = TERM.match(text, place)
        if match is None:
            choices = "+ NAME, - NAME, + 0.5 * NAME, + NAME@VERSION"
            raise ValueError(f"expression: {text[place:].strip()!r} does not begin with a term; choices: {choices}")
        sign, number, term = match.groups()
        name, place = term.partition("@")[0], match.end()
        if name in names:
            raise ValueError(f"expression: {name} is in it twice; add its numbers up, as in 2 * {name}")
        if not float(number or 1):
            raise ValueError(f"expression: 0 * {name} adds nothing; leave it out")
        names.add(name)
        terms[term] = float(f"{sign}{number or 1}")
    return terms


def choose(weights: Mapping[str, float], entries: Mapping[str, Entry]) -> tuple[dict[str, Any], str]:
    """Method and weights for scripts.merge, and the reason in words."""
    total = sum(weight for weight in weights.values() if weight > 0)
    added = [name for name, weight in weights.items() if weight > 0]
    if len(added) < 2:
        return {"method": "linear", "weights": dict(weights)}, "as no two experts are added"
    shares = {name: weight / total if weight > 0 else weight for name, weight in weights.items()}
    if lacking := [name for name in added if entries[name].statistics is None]:
        return {"method": "linear", "weights": shares}, f"as {lacking[0]} has no statistics of its inputs"
    more = {"added": [name for name in weights if name not in added]}
    return {"method": "regmean", "weights": shares, **more}, "as all have statistics of their inputs"
