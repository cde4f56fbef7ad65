"""Answers as the benchmarks' own servers take them: one JSON list, one row a question.

VQA v2, OK-VQA, TextVQA, ST-VQA    {"question_id": 42, "answer": "red"}
VizWiz                             {"image": "VizWiz_test_00000001.jpg", "answer": "red"}
DocVQA                             {"questionId": 42, "answer": "red"}
GQA                                {"questionId": "07333408", "prediction": "red"}
COCO captions                      {"image_id": 42, "caption": "a red car"}
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from moa.benchmarks.scores import Prediction


def vqa_row(prediction: Prediction) -> dict[str, Any]:
    return {"question_id": number("question id", prediction.sample.id), "answer": prediction.text}


def vizwiz_row(prediction: Prediction) -> dict[str, Any]:
    return {"image": prediction.sample.image_id, "answer": prediction.text}


def rrc_row(prediction: Prediction) -> dict[str, Any]:
    return {"questionId": number("question id", prediction.sample.id), "answer": prediction.text}


def gqa_row(prediction: Prediction) -> dict[str, Any]:
    return {
        "questionId": prediction.sample.id,
        "prediction": prediction.text.rstrip(".").lower(),
    }


def caption_row(prediction: Prediction) -> dict[str, Any]:
    return {"image_id": number("image id", prediction.sample.image_id), "caption": prediction.text}


def number(what: str, text: str) -> int:
    """An id as the integer that servers want; ValueError for any other."""
    if not text.isdecimal():
        raise ValueError(f"{what} {text!r} is no whole number")
    return int(text)


def submission_rows(
    row: Callable[[Prediction], dict[str, Any]], predictions: Sequence[Prediction]
) -> list[dict[str, Any]]:
    """The rows of all predictions; ValueError for an id that no server takes, or that stands twice."""
    rows = [row(prediction) for prediction in predictions]
    keys = Counter(next(iter(made.values())) for made in rows)
    twice = [key for key, count in keys.items() if count > 1]
    if twice:
        name = next(iter(rows[0]))
        raise ValueError(f"{len(twice)} values of {name} stand more than once, such as {twice[0]}")
    return rows
