"""Questions with one short answer (counting, yes or no): exact match."""

from collections.abc import Sequence

from moa.benchmarks.benchmark import Benchmark
from moa.benchmarks.scores import Prediction, Scores, empty_answers
from moa.metrics.text import exact_match


def score(predictions: Sequence[Prediction]) -> Scores:
    """The share of answers that equal a reference up to case, blanks and a final period."""
    hits = [exact_match(p.text, p.sample.answers) for p in predictions]
    return Scores(
        primary="exact_match", values={"exact_match": hits}, failures=empty_answers(predictions)
    )


EXACT = Benchmark(score=score)
