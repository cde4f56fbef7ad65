"""Answers from a file instead of a model: submissions, rows of an earlier evaluation, another's output.

[{"question_id": 42, "answer": "red"}]     {"id": "42", "prediction": "red"}, a line each
[{"image_id": 42, "caption": "a red car"}]     and the other forms of submission.py
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from data.checks import BadSampleError
from data.mixture import Source, read_sample
from data.sample import Box
from moa.benchmarks.result import Result
from moa.benchmarks.run import prepared, scores_of, without_picture
from moa.benchmarks.scores import Prediction

BY_QUESTION, BY_IMAGE = ("question_id", "questionId", "id"), ("image_id", "image")
TEXTS = ("answer", "prediction", "caption", "text")


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Text and box by id; ids are those of questions, or of pictures where the file has no others."""

    found: dict[str, tuple[str, Box | None]]
    by_image: bool


def read_answers(path: str | Path) -> Answers:
    """ValueError, with file and row, for a row without id or text, and for ids that stand twice."""
    rows = list(read_rows(Path(path)))
    if not rows:
        raise ValueError(f"{path}: holds no answers")
    id_key = key_of(rows[0], (*BY_QUESTION, *BY_IMAGE), f"{path}: row 1")
    text_key = key_of(rows[0], TEXTS, f"{path}: row 1")
    found: dict[str, tuple[str, Box | None]] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{path}: row {number}"
        key_of(row, (id_key,), where)
        if not isinstance(row.get(text_key), str):
            raise ValueError(f"{where}: {text_key} must be a text, got {row.get(text_key)!r}")
        found[str(row[id_key])] = row[text_key], box_in(row, where)
    if len(found) < len(rows):
        twice = [key for key, n in Counter(str(row[id_key]) for row in rows).items() if n > 1]
        raise ValueError(f"{path}: {len(twice)} values of {id_key} stand twice, such as {twice[0]}")
    return Answers(found=found, by_image=id_key in BY_IMAGE)


def box_in(row: dict[str, Any], where: str) -> Box | None:
    box = row.get("predicted_box")
    if box is None:
        return None
    try:
        x0, y0, x1, y1 = map(float, box)
        return x0, y0, x1, y1
    except (TypeError, ValueError):
        raise ValueError(f"{where}: predicted_box must be four numbers, got {box!r}") from None


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON list, or of JSON lines whatever the file is called."""
    text = path.read_text(encoding="utf-8")
    lines = not text.lstrip().startswith("[")
    parts = [line for line in text.splitlines() if line.strip()] if lines else [text]
    for number, part in enumerate(parts, start=1):
        try:
            value = json.loads(part)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: row {number}: not JSON: {error}") from None
        yield from [value] if lines else value


def key_of(row: Any, keys: Sequence[str], where: str) -> str:
    found = [key for key in keys if isinstance(row, dict) and key in row]
    if not found:
        raise ValueError(f"{where}: has none of {', '.join(keys)}")
    return found[0]


def score_answers(
    name: str,
    dataset: Source,
    answers: Answers,
    benchmark: str | None = None,
    *,
    missing: str = "error",
    on_bad_sample: str = "error",
    progress: bool = True,
) -> Result:
    """The result of a file of answers on a data set.

    A question without an answer stops it, or (`missing` "empty") counts as an empty answer. Answers to
    questions that the data set does not have are counted.
    """
    by_task: dict[str, list[Prediction]] = {}
    skipped: list[BadSampleError] = []
    unanswered: list[str] = []
    used: set[str] = set()
    for index in track(range(len(dataset)), name, disable=not progress, transient=True):
        item = prepared(read_sample(dataset, index, name), [], benchmark, scored=True)
        if isinstance(item, BadSampleError):
            skipped.append(item)
            continue
        key = item.image_id if answers.by_image else item.id
        if key in answers.found:
            used.add(key)
        else:
            unanswered.append(key)
        text, box = answers.found.get(key, ("", None))
        prediction = Prediction(sample=without_picture(item), text=text.strip(), box=box)
        by_task.setdefault(benchmark or item.task, []).append(prediction)
    check_answers(name, by_task, skipped, unanswered, missing, on_bad_sample)
    return Result(
        name=name,
        tasks={task: (found, scores_of(task, found, True)) for task, found in by_task.items()},
        skipped=skipped,
        settings={"num_unanswered": len(unanswered), "num_unused": len(answers.found) - len(used)},
    )


def check_answers(
    name: str,
    by_task: dict[str, list[Prediction]],
    skipped: list[BadSampleError],
    unanswered: list[str],
    missing: str,
    on_bad_sample: str,
) -> None:
    if skipped and (on_bad_sample == "error" or not by_task):
        raise skipped[0]
    count = sum(map(len, by_task.values()))
    if unanswered and (missing == "error" or len(unanswered) == count):
        raise ValueError(
            f"{name}: {len(unanswered)} of {count} questions have no answer, such as {unanswered[0]}; "
            "missing=empty counts them as empty answers"
        )
