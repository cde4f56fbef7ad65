"""DocVQA, InfographicVQA and ST-VQA: words in documents and scenes, by ANLS."""

from collections.abc import Sequence

from moa.benchmarks.benchmark import SHORT_ANSWER, Benchmark
from moa.benchmarks.scores import Prediction, Scores, empty_answers
from moa.benchmarks.submission import rrc_row, vqa_row
from moa.metrics.text import anls, exact_match


def score(predictions: Sequence[Prediction]) -> Scores:
    pairs = [(p.text, p.sample.answers) for p in predictions]
    return Scores(
        primary="ANLS",
        values={
            "ANLS": [anls(text, answers) for text, answers in pairs],
            "exact_match": [exact_match(text, answers) for text, answers in pairs],
        },
        failures=empty_answers(predictions),
        notes={"rule": "the RRC server's: threshold 0.5, which itself counts"},
    )


DOCVQA = Benchmark(score=score, instruction=SHORT_ANSWER, submission=rrc_row)
STVQA = Benchmark(score=score, instruction=SHORT_ANSWER, submission=vqa_row)
