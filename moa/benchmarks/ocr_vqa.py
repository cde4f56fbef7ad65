"""Questions about words in the picture (OCR-VQA and its like): exact match and ANLS."""

from collections.abc import Sequence

from moa.benchmarks.benchmark import Benchmark
from moa.benchmarks.scores import Prediction, Scores, empty_answers
from moa.metrics.text import anls, exact_match


def score(predictions: Sequence[Prediction]) -> Scores:
    """Exact match, and ANLS for words read nearly right."""
    pairs = [(p.text, p.sample.answers) for p in predictions]
    return Scores(
        primary="exact_match",
        values={
            "exact_match": [exact_match(text, answers) for text, answers in pairs],
            "ANLS": [anls(text, answers) for text, answers in pairs],
        },
        failures=empty_answers(predictions),
    )


OCR_VQA = Benchmark(score=score)
