"""A-OKVQA by direct answers (with choices: see scienceqa.py).

The authors leave the questions out whose `difficult_direct_answer` is true.
"""

from collections.abc import Sequence

from moa.benchmarks.benchmark import SHORT_ANSWER, Benchmark, needs_ten_answers
from moa.benchmarks.scores import Prediction, Scores, empty_answers
from moa.metrics.vqa import aokvqa_direct


def score(predictions: Sequence[Prediction]) -> Scores:
    hits = [aokvqa_direct(p.text, p.sample.answers) for p in predictions]
    return Scores(
        primary="direct_answer",
        values={"direct_answer": hits},
        failures=empty_answers(predictions),
        notes={"rule": "eval_predictions.py: equal as written, three matches are full marks"},
    )


AOKVQA = Benchmark(score=score, instruction=SHORT_ANSWER, needs=needs_ten_answers)
