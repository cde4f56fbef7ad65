"""VQA v2 and OK-VQA: ten human answers, by the evaluation code of VQA v2."""

from collections.abc import Sequence

from moa.benchmarks.benchmark import SHORT_ANSWER, Benchmark, needs_ten_answers
from moa.benchmarks.scores import Prediction, Scores, empty_answers
from moa.benchmarks.submission import vqa_row
from moa.metrics.vqa import vqa_official


def score(predictions: Sequence[Prediction]) -> Scores:
    """`vqa_official`; the answer types (yes/no, number, other) stand among the tags."""
    return Scores(
        primary="vqa_official",
        values={"vqa_official": [vqa_official(p.text, p.sample.answers) for p in predictions]},
        failures=empty_answers(predictions),
        notes={"rule": "vqaEval.py: normalised only where the ten answers differ"},
    )


VQAV2 = Benchmark(
    score=score, instruction=SHORT_ANSWER, needs=needs_ten_answers, submission=vqa_row
)
