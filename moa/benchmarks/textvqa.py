"""TextVQA and VizWiz: ten human answers, by EvalAI's processor.

Published TextVQA numbers of LLaVA-1.5 have OCR words in the prompt; without them they are ten points
lower. The result file says which.
"""

from collections.abc import Sequence

from moa.benchmarks.benchmark import SHORT_ANSWER, Benchmark, needs_ten_answers
from moa.benchmarks.scores import Prediction, Scores, empty_answers
from moa.benchmarks.submission import vizwiz_row, vqa_row
from moa.metrics.vqa import vqa_evalai

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


def score(predictions: Sequence[Prediction]) -> Scores:
    return Scores(
        primary="vqa_evalai",
        values={"vqa_evalai": [vqa_evalai(p.text, p.sample.answers) for p in predictions]},
        failures=empty_answers(predictions),
        notes={"rule": "EvalAI's answer processor: always normalised, on both sides"},
    )


TEXTVQA = Benchmark(
    score=score, instruction=SHORT_ANSWER, needs=needs_ten_answers, submission=vqa_row
)
VIZWIZ = Benchmark(
    score=score,
    instruction=f"{UNANSWERABLE}\n{SHORT_ANSWER}",
    needs=needs_ten_answers,
    submission=vizwiz_row,
)
