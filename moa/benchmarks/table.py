"""Every benchmark for models that generate: a row each, by the name that a config gives it.

`TASKS` are for data of one's own: where neither source nor format names a benchmark, a sample is scored by that of its
task, or by exact match if its task has another name. A metric's published rule is documented at the metric.

Published TextVQA numbers of LLaVA-1.5 have OCR words in the prompt, and are ten points lower without. A-OKVQA leaves
out the questions whose `difficult_direct_answer` is true. ChartQA is the mean of two sources here.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from data.sample import Sample
from moa.benchmarks.scores import Response, Scores, empty_answers, mean, mean_per_class_accuracy
from moa.metrics import text, vqa
from moa.metrics.boxes import grounding_scores
from moa.metrics.captions import caption_scores

ScoreFunction = Callable[[Sequence[Response]], Scores]
Row = Callable[[Response], dict[str, Any]]

# the prompt of LLaVA-1.5 and later models, which their published numbers assume
SHORT_ANSWER = "Answer the question using a single word or phrase."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
LETTER = "Answer with the option's letter from the given choices directly."


# -- What a sample needs to be scored; the answer is what it lacks, or None -------------------------


def needs_answer(sample: Sample) -> str | None:
    return None if any(map(str.strip, sample.answers)) else "a reference answer"


def needs_ten_answers(sample: Sample) -> str | None:
    found = len(sample.answers)
    return None if found >= 10 else f"ten reference answers, and has {found}"


def needs_box(sample: Sample) -> str | None:
    return None if sample.boxes else "a true box"


def needs_yes_or_no(sample: Sample) -> str | None:
    return None if sample.answers[:1] in (("yes",), ("no",)) else "the answer yes or no"


def needs_letter(sample: Sample) -> str | None:
    known = sample.answers[:1] and sample.answers[0] in text.LETTERS
    return None if known else f"the letter of an option ({', '.join(text.LETTERS)}) as its answer"


# -- Submissions: one JSON list, a row a question, as the benchmark's own server reads it -----------


def number(what: str, value: str) -> int:
    """An id as the integer that servers want; ValueError for any other."""
    if not value.isdecimal():
        raise ValueError(f"{what} {value!r} is not a whole number")
    return int(value)


def row(key: str, answer: str = "answer", *, image: bool = False) -> Row:
    """The id of the question (or image) as a whole number under `key`, and the text under `answer`."""
    what = "image id" if image else "question id"
    return lambda r: {key: number(what, r.sample.image_id if image else r.sample.id), answer: r.text}


def vizwiz_row(r: Response) -> dict[str, Any]:
    return {"image": r.sample.image_id, "answer": r.text}


def gqa_row(r: Response) -> dict[str, Any]:
    return {"questionId": r.sample.id, "prediction": r.text.rstrip(".").lower()}


def submission_rows(make: Row, responses: Sequence[Response]) -> list[dict[str, Any]]:
    """The rows of all responses; ValueError for an id that no server takes, or that is not unique."""
    rows = [*map(make, responses)]
    keys = Counter(next(iter(made.values())) for made in rows)
    if twice := [key for key, count in keys.items() if count > 1]:
        name = next(iter(rows[0]))
        raise ValueError(f"{len(twice)} values of {name} are not unique, such as {twice[0]}")
    return rows


# -- Scores -----------------------------------------------------------------------------------------

SAME = (text.exact_match, text.relaxed_accuracy, vqa.vqa_accuracy, vqa.vqa_evalai, vqa.vqa_official)
METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    **{metric.__name__: metric for metric in SAME},
    **{"ANLS": text.anls, "direct_answer": vqa.aokvqa_direct},
}


def mean_of(*names: str, rule: str = "") -> ScoreFunction:
    """Scores by these metrics of (answer, references), the first one primary; `rule` goes to the notes."""

    def score(responses: Sequence[Response]) -> Scores:
        values = {n: [METRICS[n](r.text, r.sample.answers) for r in responses] for n in names}
        notes = {"rule": rule} if rule else {}
        return Scores(primary=names[0], values=values, failures=empty_answers(responses), notes=notes)

    return score


def own_vqa(responses: Sequence[Response]) -> Scores:
    """VQA accuracy for few or many human answers; the notes count the samples under each rule."""
    rules = Counter(vqa.vqa_rule(r.sample.answers) for r in responses)
    counts = ", ".join(f"{rule}: {count}" for rule, count in sorted(rules.items()))
    return mean_of("vqa_accuracy", "exact_match", rule=counts)(responses)


# types.structural of GQA's question file -> the half of the score that its eval.py counts it under
HALVES = {"query": "open"} | dict.fromkeys(("verify", "logical", "choose", "compare"), "binary")


def gqa(responses: Sequence[Response]) -> Scores:
    """Accuracy, with `open` and `binary` by tag; consistency and the like need files beyond the balanced split."""
    hits = [text.gqa_match(r.text, r.sample.answers[0]) for r in responses]
    halves: dict[str, list[float]] = {}
    for response, hit in zip(responses, hits, strict=True):
        for half in {HALVES[tag] for tag in response.sample.tags if tag in HALVES}:
            halves.setdefault(half, []).append(hit)
    return Scores(
        primary="accuracy",
        values={"accuracy": hits},
        corpus={half: mean(found) for half, found in sorted(halves.items())},
        failures=empty_answers(responses),
        notes={"rule": "eval.py's equality, after LLaVA's lower case and final periods"},
    )


def pope(responses: Sequence[Response]) -> Scores:
    """Accuracy, and precision, recall, F1 and the share of "yes" over one file; papers have the mean F1 of three."""
    found = [text.yes_or_no(r.text) for r in responses]
    true = [r.sample.answers[0] for r in responses]
    corpus = text.yes_no_scores(found, true)
    del corpus["accuracy"]
    return Scores(
        primary="accuracy",
        values={"accuracy": [float(a == b) for a, b in zip(found, true, strict=True)]},
        corpus=corpus,
        failures=empty_answers(responses),
        notes={"rule": "POPE's evaluate.py: no by No, no or not in the first sentence, else yes"},
    )


def option_letters(responses: Sequence[Response]) -> Scores:
    """ScienceQA, and A-OKVQA with choices: accuracy of the letter of one of the options.

    An answer that names no option is wrong and counted. The accuracy with an image is under the tag `picture`.
    """
    letters = [text.option_letter(r.text) for r in responses]
    unparsed = [i for i, letter in enumerate(letters) if letter is None]
    hits = [float(n == r.sample.answers[0]) for n, r in zip(letters, responses, strict=True)]
    return Scores(
        primary="accuracy",
        values={"accuracy": hits},
        failures={"no option named": unparsed} if unparsed else {},
        notes={"rule": "LLaVA's eval_science_qa.py: a letter, 'B. ...', or 'The answer is B.'"},
    )


def class_names(responses: Sequence[Response]) -> Scores:
    """Accuracy of the class that is named, and its mean over classes; another text than a class's name is counted."""
    hits = [text.exact_match(r.text, r.sample.answers) for r in responses]
    known = [text.exact_match(r.text, r.sample.choices) or not r.sample.choices for r in responses]
    unnamed = [i for i, named in enumerate(known) if not named]
    return Scores(
        primary="accuracy",
        values={"accuracy": hits},
        corpus={"mean_per_class": mean_per_class_accuracy(hits, [r.sample.answers[0] for r in responses])},
        failures={"no class named": unnamed} if unnamed else {},
    )


def captions(responses: Sequence[Response], *, meteor: bool = False) -> Scores:
    """The primary score is CIDEr-D / 10, clipped to [0, 1]; the raw corpus metrics are beside it."""
    found = caption_scores([r.text for r in responses], [r.sample.answers for r in responses], meteor=meteor)
    return Scores(
        primary="CIDEr/10",
        values={
            "CIDEr/10": [min(max(value / 10, 0.0), 1.0) for value in found.cider],
            "exact_match": [text.exact_match(r.text, r.sample.answers) for r in responses],
        },
        corpus=found.corpus,
        failures=empty_answers(responses),
        notes={
            "tokenizer": found.tokenizer,
            "document_frequencies": f"from the references of these {len(responses)} samples",
            **{metric: f"absent: {reason}" for metric, reason in found.absent.items()},
        },
    )


def grounding(responses: Sequence[Response]) -> Scores:
    """Acc@0.5 by both conventions, and the mean IoU; an answer without a readable box has IoU 0."""
    unparsable = [i for i, response in enumerate(responses) if response.box is None]
    return Scores(
        primary="Acc@0.5",
        values=grounding_scores([r.box for r in responses], [r.sample.boxes for r in responses]),
        failures={"no readable box": unparsable} if unparsable else {},
        notes={"Acc@0.5": "hit at IoU >= 0.5, in pixels of the original image", "Acc@>0.5": "hit at IoU > 0.5"},
    )


# -- The table --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """`instruction` follows the question and its OCR words, unless the sample has its own."""

    score: ScoreFunction
    instruction: str = ""
    needs: Callable[[Sample], str | None] = needs_answer
    submission: Row | None = None  # None where the benchmark has no server


def short(score: ScoreFunction, **row: Any) -> Benchmark:
    return Benchmark(score=score, **{"instruction": SHORT_ANSWER, **row})


EXACT = Benchmark(score=mean_of("exact_match"))
TEN: dict[str, Any] = {"needs": needs_ten_answers}
EVALAI = mean_of("vqa_evalai", rule="EvalAI's answer processor: always normalised, on both sides")
RRC = mean_of("ANLS", "exact_match", rule="the RRC server's: threshold 0.5, which itself counts")
OFFICIAL = mean_of("vqa_official", rule="vqaEval.py: normalised only where the ten answers differ")
DIRECT = mean_of("direct_answer", rule="eval_predictions.py: equal as written, three matches are full marks")
RELAXED = mean_of("relaxed_accuracy", rule="pix2struct's relaxed_correctness: years too may be 5 % off")

TASKS = ("vqa", "caption", "grounding", "ocr_vqa", "count", "yes_no", "classification")
BENCHMARKS: dict[str, Benchmark] = {
    "vqa": Benchmark(score=own_vqa),
    "caption": Benchmark(score=captions),
    "grounding": Benchmark(score=grounding, needs=needs_box),
    "ocr_vqa": Benchmark(score=mean_of("exact_match", "ANLS")),
    "count": EXACT,
    "yes_no": EXACT,
    "classification": Benchmark(score=class_names),
    "vqav2": short(OFFICIAL, submission=row("question_id"), **TEN),
    "okvqa": short(OFFICIAL, submission=row("question_id"), **TEN),
    "aokvqa": short(DIRECT, **TEN),
    "aokvqa_choice": short(option_letters, instruction=LETTER, needs=needs_letter),
    "textvqa": short(EVALAI, submission=row("question_id"), **TEN),
    "vizwiz": short(EVALAI, instruction=f"{UNANSWERABLE}\n{SHORT_ANSWER}", submission=vizwiz_row, **TEN),
    "docvqa": short(RRC, submission=row("questionId")),
    "stvqa": short(RRC, submission=row("question_id")),
    "chartqa": short(RELAXED),
    "gqa": short(gqa, submission=gqa_row),
    "scienceqa": short(option_letters, instruction=LETTER, needs=needs_letter),
    "pope": short(pope, needs=needs_yes_or_no),
    "refcoco": Benchmark(score=grounding, needs=needs_box),
    "coco_captions": Benchmark(score=partial(captions, meteor=True), submission=row("image_id", "caption", image=True)),
}  # fmt: skip

# format of a source -> what scores it; formats that are not listed hold tasks of any kind
BY_FORMAT: dict[str, str] = {
    **{name: name for name in BENCHMARKS if name not in TASKS},
    "karpathy": "coco_captions",
    "flickr30k": "coco_captions",
    "flickr30k_entities": "refcoco",
    "ocrvqa": "ocr_vqa",
}


def benchmark_called(name: str) -> Benchmark:
    """The benchmark of this name; exact match for a task of one's own that has another name."""
    return BENCHMARKS.get(name, EXACT)
