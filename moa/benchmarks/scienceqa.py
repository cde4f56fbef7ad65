"""ScienceQA, and A-OKVQA with choices: the letter of one of the options that the question lists."""

from collections.abc import Sequence

from data.sample import Sample
from moa.benchmarks.benchmark import Benchmark
from moa.benchmarks.scores import Prediction, Scores
from moa.metrics.text import LETTERS, option_letter


def needs_letter(sample: Sample) -> str | None:
    known = sample.answers[:1] and sample.answers[0] in LETTERS
    return None if known else f"the letter of an option ({', '.join(LETTERS)}) as its answer"


def score(predictions: Sequence[Prediction]) -> Scores:
    """Accuracy; an answer that names no option is wrong and counted, never guessed for.

    The accuracy on questions with a picture, which papers report too, stands under the tag `picture`.
    """
    letters = [option_letter(p.text) for p in predictions]
    unparsed = [i for i, letter in enumerate(letters) if letter is None]
    hits = [
        float(letter == p.sample.answers[0]) for letter, p in zip(letters, predictions, strict=True)
    ]
    return Scores(
        primary="accuracy",
        values={"accuracy": hits},
        failures={"no option named": unparsed} if unparsed else {},
        notes={"rule": "LLaVA's eval_science_qa.py: a letter, 'B. ...', or 'The answer is B.'"},
    )


SCIENCEQA = Benchmark(
    score=score,
    instruction="Answer with the option's letter from the given choices directly.",
    needs=needs_letter,
)
