"""Every sample of a data set before a run meets it: what is broken, repeated, or leaked.

    rows --processes--> findings by rule, hashes of ids and images --> duplicates, leaks

A single row is judged by the run's own reader and collator, so that what passes here passes there.
What only shows between rows is kept as hashes: memory grows by 32 bytes a row.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np

from data.checks import BadSampleError, Rule, name_of
from data.collate import Collator
from data.mixture import Source, read_sample
from data.sample import Sample
from data.workers import map_in_workers

CHUNK = 500  # rows that a process reports at once
KEPT = 100  # examples of each rule
# of an image: the number of its row, and hashes of the row's id, of the image's id and of its pixels
HASHES = np.dtype([(name, np.uint64) for name in ("numbers", "ids", "image_ids", "contents")])
DUPLICATE = "duplicate id"
LEAKS = {"image_ids": "image of training, by image id", "contents": "image of training"}
REASONS = (*get_args(Rule), DUPLICATE, *LEAKS.values())


@dataclass
class Finding:
    """How many rows break a rule, and the first of them in words."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Audit:
    """What was found in the first `rows` rows of a source; unreadable rows have no hashes."""

    name: str
    rows: int = 0
    found: dict[str, Finding] = field(default_factory=dict)  # by rule
    images: np.ndarray = field(default_factory=lambda: np.zeros(0, HASHES))  # of readable rows

    def note(self, rule: str, examples: Sequence[str], count: int = 1) -> None:
        known = self.found.setdefault(rule, Finding())
        known.count += count
        known.examples.extend(examples[: KEPT - len(known.examples)])


class LengthCheck:
    """Finds samples that are too long, with as little tokenising as possible.

    No tokenizer makes more tokens of a text than it has bytes: where template, image and bytes
    fit, the sample fits. What a template and an image take is found once for each image size.
    """

    def __init__(self, collator: Collator):
        self.collator = collator
        self.fixed: dict[tuple[tuple[tuple[int, int], ...], bool], int] = {}

    def __call__(self, sample: Sample) -> BadSampleError | None:
        collator = self.collator
        try:
            if not sample.turns and self._bound(sample) <= collator.max_length:
                return None  # further turns would bring their share of the template
            count = collator.num_tokens(sample)
        except BadSampleError as error:
            return error
        if count <= collator.max_length:
            return None
        detail = f"{count} tokens; max_length={collator.max_length} would cut the answer"
        return BadSampleError(name_of(sample), "too long", detail)

    def _bound(self, sample: Sample) -> int:
        kind = tuple(image.size for image in sample.images), bool(sample.system)
        if kind not in self.fixed:
            bare = replace(sample, question="?", answers=("?",), ocr=None, instruction="")
            self.fixed[kind] = self.collator.num_tokens(bare)
        return self.fixed[kind] + len(self.collator.text(sample).encode())


def audit_rows(rows: range, source: Source, name: str, collator: Collator) -> Audit:
    """The findings of some rows, each by itself."""
    audit, too_long = Audit(name=name, rows=len(rows)), LengthCheck(collator)
    readable: list[tuple[int, int, int, int]] = []
    for index in rows:
        item = read_sample(source, index, name)
        if isinstance(item, BadSampleError):
            audit.note(item.rule, [str(item)])
            continue
        error = collator.error_of(item) or too_long(item)
        if error is not None:
            audit.note(error.rule, [str(error)])
        readable += [(index, *hashes) for hashes in hashes_of(item)]
    audit.images = np.array(readable, HASHES)
    return audit


def hashes_of(sample: Sample) -> list[tuple[int, int, int]]:
    """Of the id, the image's id and the pixels of each image; text alone has the image of no other."""
    name, image_id = hash64(sample.id.encode()), hash64(sample.image_id.encode())
    if sample.image is None:
        own = hash64(f"{sample.source}:{sample.id}".encode())
        return [(name, own, own)]
    pixels = [f"{image.width}x{image.height}:".encode() + image.tobytes() for image in sample.images]
    return [(name, image_id, hash64(content)) for content in pixels]


def hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def audit_source(
    source: Source,
    name: str,
    collator: Collator,
    *,
    limit: int | None = None,
    workers: int = 1,
    advance: Callable[[int], Any] = lambda rows: None,
) -> Audit:
    """All rows, or the first `limit`, and ids that come more than once; `advance` gets how many rows were read."""
    total = len(source) if limit is None else min(limit, len(source))
    parts = [range(first, min(first + CHUNK, total)) for first in range(0, total, CHUNK)]
    whole, images = Audit(name=name), list[np.ndarray]()
    shared = {"source": source, "name": name, "collator": collator}
    for part in map_in_workers(audit_rows, parts, shared, workers, "fork"):
        whole.rows += part.rows
        for rule, finding in part.found.items():
            whole.note(rule, finding.examples, finding.count)
        images.append(part.images)
        advance(part.rows)
    whole.images = np.concatenate([whole.images, *images])
    find_duplicates(whole)
    return whole


def find_duplicates(audit: Audit) -> None:
    """Note the rows whose id an earlier row has; samples are counted from 1, as lines are."""
    numbers, first = np.unique(audit.images["numbers"], return_index=True)
    ids = audit.images["ids"][first]
    order = np.argsort(ids, kind="stable")
    same = ids[order][1:] == ids[order][:-1]
    pairs = [numbers[order[at : at + 2]] + 1 for at in np.flatnonzero(same)[:KEPT]]
    examples = [f"source {audit.name!r}, samples {a} and {b}: {DUPLICATE}" for a, b in pairs]
    if examples:
        audit.note(DUPLICATE, examples, int(same.sum()))


def find_leaks(training: Sequence[Audit], held_out: Audit) -> None:
    """Note the rows of a data set that is scored whose image is in one that is trained on."""
    for key, rule in LEAKS.items():
        for trained in training:
            leaked = held_out.images[np.isin(held_out.images[key], trained.images[key])]
            examples = []
            rows, first = np.unique(leaked["numbers"], return_index=True)
            for image in leaked[first][:KEPT]:
                other = trained.images[np.argmax(trained.images[key] == image[key])]
                leak = f"source {held_out.name!r}, sample {int(image['numbers']) + 1}: {rule}"
                examples.append(f"{leak}: sample {int(other['numbers']) + 1} of {trained.name!r}")
            if examples:
                held_out.note(rule, examples, len(rows))
