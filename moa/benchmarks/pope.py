"""POPE: is there such a thing in the picture, yes or no."""

from collections.abc import Sequence

from data.sample import Sample
from moa.benchmarks.benchmark import SHORT_ANSWER, Benchmark
from moa.benchmarks.scores import Prediction, Scores, empty_answers
from moa.metrics.text import yes_no_scores, yes_or_no


def needs_label(sample: Sample) -> str | None:
    return None if sample.answers[:1] in (("yes",), ("no",)) else "the answer yes or no"


def score(predictions: Sequence[Prediction]) -> Scores:
    """Accuracy, and precision, recall, F1 and the share of "yes" over the whole file.

    Papers report each of the three files (random, popular, adversarial) and the mean of their F1.
    """
    said = [yes_or_no(p.text) for p in predictions]
    true = [p.sample.answers[0] for p in predictions]
    corpus = yes_no_scores(said, true)
    del corpus["accuracy"]
    return Scores(
        primary="accuracy",
        values={"accuracy": [float(a == b) for a, b in zip(said, true, strict=True)]},
        corpus=corpus,
        failures=empty_answers(predictions),
        notes={"rule": "POPE's evaluate.py: no by No, no or not in the first sentence, else yes"},
    )


POPE = Benchmark(score=score, instruction=SHORT_ANSWER, needs=needs_label)
