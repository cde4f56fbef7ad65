"""What a benchmark takes (responses) and what it yields (named values with their standard errors)."""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

from data.sample import Box, Sample
from moa.metrics.intervals import clustered_standard_error


@dataclass(frozen=True, kw_only=True)
class Response:
    """A model's answer: text, the box found in it, gates; `rank` (from 1) of the truth where it orders candidates."""

    sample: Sample
    text: str
    box: Box | None = None
    rank: int | None = None
    gates: list[list[float]] | None = None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The metrics of one task. `primary` names the one score, in [0, 1], that tables compare.

    `values` holds one number a sample for each metric that is a mean over samples; `corpus` holds the
    metrics that only a whole set has. `failures` lists, by reason, the positions of the answers that
    could not count; `notes` names the rules and tools that the values depend on.
    """

    primary: str
    values: dict[str, list[float]]
    corpus: dict[str, float] = field(default_factory=dict)
    failures: dict[str, list[int]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[str, float]]:
        """(name, value), the primary first."""
        names = [self.primary, *(name for name in self.values if name != self.primary)]
        yield from ((name, mean(self.values[name])) for name in names)
        yield from self.corpus.items()


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def with_error(values: Sequence[float], samples: Sequence[Sample]) -> dict[str, float | None]:
    """The mean and its standard error, clustered by image."""
    return {"value": mean(values), "se": clustered_standard_error(values, [sample.image_id for sample in samples])}


def empty_answers(responses: Sequence[Response]) -> dict[str, list[int]]:
    """The positions of empty answers, as a failure by reason; nothing if there are none."""
    empty = [i for i, response in enumerate(responses) if not response.text.strip()]
    return {"empty answer": empty} if empty else {}


def unscored(responses: Sequence[Response]) -> Scores:
    """For splits whose references are secret: the share of answers that are not empty."""
    return Scores(
        primary="answered",
        values={"answered": [float(bool(response.text.strip())) for response in responses]},
        failures=empty_answers(responses),
        notes={"rule": "not scored: hand the submission file in"},
    )


def classification_scores(responses: Sequence[Response]) -> Scores:
    """Top-1, top-5, and the mean over classes of top-1, by which CLIP's paper reports Caltech-101 and Aircraft."""
    ranks = ranks_of(responses)
    hits, classes = recall_at(ranks, 1), [r.sample.answers[0] for r in responses]
    return Scores(
        primary="top_1",
        values={"top_1": hits, "top_5": recall_at(ranks, 5)},
        corpus={"mean_per_class": mean_per_class_accuracy(hits, classes)},
    )


def retrieval_scores(responses: Sequence[Response]) -> Scores:
    """R@1, R@5 and R@10 of one direction, over all that is searched, such as Karpathy's 1,000 or 5,000 images."""
    ranks = ranks_of(responses)
    return Scores(
        primary="R@1",
        values={f"R@{k}": recall_at(ranks, k) for k in (1, 5, 10)},
        corpus={"median_rank": float(median(ranks))},
        notes={"ties": "a wrong candidate with the same score stands before the right one"},
    )


def ranks_of(responses: Sequence[Response]) -> list[int]:
    ranks = [response.rank for response in responses if response.rank is not None]
    assert len(ranks) == len(responses), "made by moa.evaluation.dual_encoder"
    return ranks


def recall_at(ranks: Sequence[int], k: int) -> list[float]:
    """Per query, 1 if the rank is at most k; the mean is R@k."""
    return [float(rank <= k) for rank in ranks]


def mean_per_class_accuracy(hits: Sequence[float], classes: Sequence[Hashable]) -> float:
    """The mean of the accuracies of the classes that occur, as CLIP reports Caltech-101, pets, Flowers and Aircraft."""
    found: dict[Hashable, list[float]] = defaultdict(list)
    for hit, name in zip(hits, classes, strict=True):
        found[name].append(hit)
    means = [sum(values) / len(values) for values in found.values()]
    return sum(means) / len(means) if means else float("nan")
