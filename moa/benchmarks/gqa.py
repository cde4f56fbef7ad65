"""GQA: literal accuracy, and apart for open questions and those with two possible answers.

Consistency needs answers to questions outside the balanced split, validity and plausibility the
choices file of the authors, grounding their attention maps: none of these is computed here.
"""

from collections.abc import Sequence

from moa.benchmarks.benchmark import SHORT_ANSWER, Benchmark
from moa.benchmarks.scores import Prediction, Scores, empty_answers, mean
from moa.benchmarks.submission import gqa_row
from moa.metrics.text import gqa_match

# types.structural of the question file -> the half of the score that eval.py counts it under
HALVES = {"query": "open", "verify": "binary", "logical": "binary", "choose": "binary",
          "compare": "binary"}  # fmt: skip


def score(predictions: Sequence[Prediction]) -> Scores:
    """Accuracy; `open` and `binary` beside it where the samples' tags name the structural type."""
    hits = [gqa_match(p.text, p.sample.answers[0]) for p in predictions]
    halves: dict[str, list[float]] = {}
    for prediction, hit in zip(predictions, hits, strict=True):
        for half in {HALVES[tag] for tag in prediction.sample.tags if tag in HALVES}:
            halves.setdefault(half, []).append(hit)
    return Scores(
        primary="accuracy",
        values={"accuracy": hits},
        corpus={half: mean(found) for half, found in sorted(halves.items())},
        failures=empty_answers(predictions),
        notes={"rule": "eval.py's equality, after LLaVA's lower case and final periods"},
    )


GQA = Benchmark(score=score, instruction=SHORT_ANSWER, submission=gqa_row)
