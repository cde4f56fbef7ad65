"""Visual questions of one's own, with few or many human answers: soft accuracy."""

from collections import Counter
from collections.abc import Sequence

from moa.benchmarks.benchmark import Benchmark
from moa.benchmarks.scores import Prediction, Scores, empty_answers
from moa.metrics.text import exact_match
from moa.metrics.vqa import vqa_accuracy, vqa_rule


def score(predictions: Sequence[Prediction]) -> Scores:
    """VQA accuracy, and beside it the plain exact match; `notes` says which rule how many samples had."""
    pairs = [(p.text, p.sample.answers) for p in predictions]
    rules = Counter(vqa_rule(answers) for _, answers in pairs)
    return Scores(
        primary="vqa_accuracy",
        values={
            "vqa_accuracy": [vqa_accuracy(text, answers) for text, answers in pairs],
            "exact_match": [exact_match(text, answers) for text, answers in pairs],
        },
        failures=empty_answers(predictions),
        notes={"rule": ", ".join(f"{rule}: {count}" for rule, count in sorted(rules.items()))},
    )


VQA = Benchmark(score=score)
