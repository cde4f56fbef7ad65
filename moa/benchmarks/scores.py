"""What a benchmark takes (responses) and what it yields (named values with their standard errors)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from data.sample import Box, Sample
from moa.metrics.intervals import clustered_standard_error


@dataclass(frozen=True, kw_only=True)
class Response:
    """A model's response to a sample: the text, the box that the codec found in it, the gates.

    `rank` (from 1) is that of the truth among all candidates, of a model that orders them.
    """

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
