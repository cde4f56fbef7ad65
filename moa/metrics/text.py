"""Short answers: equality, edit distance, numbers with a tolerance, option letters, yes or no.

Each follows the code that the published numbers were made with; its name is in the docstring.
"""

import re
from collections.abc import Sequence


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals an answer up to case, blanks and a final period."""
    return float(_plain(prediction).rstrip(".") in {_plain(a).rstrip(".") for a in answers})


def levenshtein(first: str, second: str) -> int:
    """The least number of insertions, deletions and substitutions between two strings."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        above, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest answer, 0 below `threshold`.

    Biten et al. 2019 (arXiv 1907.00490) as the RRC server of DocVQA and ST-VQA computes it: the
    distance is between lower-cased texts with single blanks, divided by the longer text as it was
    written. A similarity of just `threshold` counts; the paper's equation 1 would drop it.
    """
    best = max(_similarity(prediction, answer) for answer in answers)
    return best if best >= threshold else 0.0


def _similarity(first: str, second: str) -> float:
    longest = max(len(first.upper()), len(second.upper()))  # as the server: "ß" counts as two
    return 1.0 if longest == 0 else 1 - levenshtein(_plain(first), _plain(second)) / longest


def relaxed_accuracy(prediction: str, answers: Sequence[str], tolerance: float = 0.05) -> float:
    """1 if the prediction is within 5 % of a numeric answer, or equals an answer up to case.

    Masry et al. 2022 (arXiv 2203.10244), 5.1, as pix2struct's metrics.py has it, which all later
    evaluations took over: "12%" is 0.12, "1,000" is not a number, an answer of 0 must be met literally,
    and years are numbers like any other (2010 passes for 2015).
    """
    return float(any(_relaxed_match(prediction, answer, tolerance) for answer in answers))


def _relaxed_match(prediction: str, answer: str, tolerance: float) -> bool:
    found, true = _number(prediction), _number(answer)
    if found is not None and true:
        return abs(found - true) / abs(true) <= tolerance
    return prediction.lower() == answer.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def gqa_match(prediction: str, answer: str) -> float:
    """1 if the prediction, without final periods and in lower case as LLaVA converts it, is the answer."""
    return float(prediction.rstrip(".").lower() == answer)


LETTERS = ("A", "B", "C", "D", "E")


def option_letter(prediction: str, num_options: int = len(LETTERS)) -> str | None:
    """The option that an answer names, None if it names none or one that the question lacks.

    The rule of LLaVA's eval_science_qa.py: "B", "B. because ...", or one "The answer is B."; the
    last needs any one character after the letter, since its period is a regular expression's.
    """
    letter = prediction[:1]
    if letter not in LETTERS or prediction[1:3] not in ("", ". "):
        found = re.findall(r"The answer is ([A-Z]).", prediction)
        letter = found[0] if len(found) == 1 else ""
    return letter if letter in LETTERS[:num_options] else None


def yes_or_no(prediction: str) -> str:
    """ "no" if the first sentence has No, no or not, else "yes", also for "NO": POPE's evaluate.py splits at blanks."""
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def yes_no_scores(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of "yes", and its share; 0 for 0 / 0, where POPE's own code stops."""
    pairs = list(zip(predictions, labels, strict=True))
    hits = sum(found == true == "yes" for found, true in pairs)
    found_yes = sum(found == "yes" for found, _ in pairs)
    true_yes = sum(true == "yes" for _, true in pairs)
    precision, recall = _share(hits, found_yes), _share(hits, true_yes)
    return {
        "accuracy": _share(sum(found == true for found, true in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "F1": _share(2 * precision * recall, precision + recall),
        "yes_ratio": _share(found_yes, len(pairs)),
    }


def _share(part: int | float, whole: int | float) -> float:
    return part / whole if whole else 0.0
