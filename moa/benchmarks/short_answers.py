"""Benchmarks of short answers: the mean of a metric of (answer, references), a row each.

A metric's published rule, quirks included, is at the metric (moa/metrics/). Published TextVQA numbers of LLaVA-1.5 have
OCR words in the prompt, and are ten points lower without; the result file says which. A-OKVQA leaves out the questions
whose `difficult_direct_answer` is true. ChartQA is reported as the mean of its human and its augmented questions.
These are two sources.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from moa.benchmarks.benchmark import SHORT_ANSWER, Benchmark, needs_ten_answers
from moa.benchmarks.scores import Prediction, Scores, empty_answers
from moa.benchmarks.submission import rrc_row, vizwiz_row, vqa_row
from moa.metrics.text import anls, exact_match, relaxed_accuracy
from moa.metrics.vqa import aokvqa_direct, vqa_accuracy, vqa_evalai, vqa_official, vqa_rule

METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "ANLS": anls,
    "direct_answer": aokvqa_direct,
    "exact_match": exact_match,
    "relaxed_accuracy": relaxed_accuracy,
    "vqa_accuracy": vqa_accuracy,
    "vqa_evalai": vqa_evalai,
    "vqa_official": vqa_official,
}
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


def mean_of(*names: str, rule: str = "") -> Callable[[Sequence[Prediction]], Scores]:
    """Scores by these metrics, the first one primary; `rule` stands in the notes."""

    def score(predictions: Sequence[Prediction]) -> Scores:
        return Scores(
            primary=names[0],
            values={
                name: [METRICS[name](p.text, p.sample.answers) for p in predictions]
                for name in names
            },
            failures=empty_answers(predictions),
            notes={"rule": rule} if rule else {},
        )

    return score


def own_vqa(predictions: Sequence[Prediction]) -> Scores:
    """VQA accuracy for few or many human answers; the notes count the samples under each rule."""
    rules = Counter(vqa_rule(p.sample.answers) for p in predictions)
    told = ", ".join(f"{rule}: {count}" for rule, count in sorted(rules.items()))
    return mean_of("vqa_accuracy", "exact_match", rule=told)(predictions)


EXACT = Benchmark(score=mean_of("exact_match"))
OCR_VQA = Benchmark(score=mean_of("exact_match", "ANLS"))
VQA = Benchmark(score=own_vqa)
VQAV2 = Benchmark(
    score=mean_of("vqa_official", rule="vqaEval.py: normalised only where the ten answers differ"),
    instruction=SHORT_ANSWER,
    needs=needs_ten_answers,
    submission=vqa_row,
)
EVALAI = mean_of("vqa_evalai", rule="EvalAI's answer processor: always normalised, on both sides")
TEXTVQA = Benchmark(
    score=EVALAI, instruction=SHORT_ANSWER, needs=needs_ten_answers, submission=vqa_row
)
VIZWIZ = Benchmark(
    score=EVALAI,
    instruction=f"{UNANSWERABLE}\n{SHORT_ANSWER}",
    needs=needs_ten_answers,
    submission=vizwiz_row,
)
RRC = mean_of("ANLS", "exact_match", rule="the RRC server's: threshold 0.5, which itself counts")
DOCVQA = Benchmark(score=RRC, instruction=SHORT_ANSWER, submission=rrc_row)
STVQA = Benchmark(score=RRC, instruction=SHORT_ANSWER, submission=vqa_row)
CHARTQA = Benchmark(
    score=mean_of(
        "relaxed_accuracy", rule="pix2struct's relaxed_correctness: years too may be 5 % off"
    ),
    instruction=SHORT_ANSWER,
)
AOKVQA = Benchmark(
    score=mean_of(
        "direct_answer",
        rule="eval_predictions.py: equal as written, three matches are full marks",
    ),
    instruction=SHORT_ANSWER,
    needs=needs_ten_answers,
)
