"""What a benchmark is: how the model is asked, how its answers are scored, how they are handed in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data.sample import Sample
from moa.benchmarks.scores import Prediction, Scores

# what LLaVA-1.5 and those after it were asked with, and what their published numbers assume
SHORT_ANSWER = "Answer the question using a single word or phrase."


def needs_answer(sample: Sample) -> str | None:
    """What the sample lacks to be scored against its answers, None if nothing."""
    return None if any(map(str.strip, sample.answers)) else "a reference answer"


def needs_ten_answers(sample: Sample) -> str | None:
    found = len(sample.answers)
    return None if found >= 10 else f"ten reference answers, and has {found}"


def needs_box(sample: Sample) -> str | None:
    return None if sample.boxes else "a true box"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One published evaluation; a file of this package makes one.

    `instruction` says how to answer, behind the question and its OCR words; a sample that brings
    its own keeps it. `needs` says what a sample lacks to be scored. `submission` is the row that the
    benchmark's own server or code takes, None where there is none.
    """

    score: Callable[[Sequence[Prediction]], Scores]
    instruction: str = ""
    needs: Callable[[Sample], str | None] = needs_answer
    submission: Callable[[Prediction], dict[str, Any]] | None = None
