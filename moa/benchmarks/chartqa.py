"""ChartQA: numbers within five per cent, everything else literally.

Papers report the human and the augmented questions and the mean of the two: two sources.
"""

from collections.abc import Sequence

from moa.benchmarks.benchmark import SHORT_ANSWER, Benchmark
from moa.benchmarks.scores import Prediction, Scores, empty_answers
from moa.metrics.text import relaxed_accuracy


def score(predictions: Sequence[Prediction]) -> Scores:
    hits = [relaxed_accuracy(p.text, p.sample.answers) for p in predictions]
    return Scores(
        primary="relaxed_accuracy",
        values={"relaxed_accuracy": hits},
        failures=empty_answers(predictions),
        notes={"rule": "pix2struct's relaxed_correctness: years too may be 5 % off"},
    )


CHARTQA = Benchmark(score=score, instruction=SHORT_ANSWER)
