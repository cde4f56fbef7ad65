"""Answers from a file instead of a model: submissions, rows of an earlier evaluation, another's output.

[{"question_id": 42, "answer": "red"}]     {"id": "42", "prediction": "red"}, a line each
[{"image_id": 42, "caption": "a red car"}]     and the other forms of moa/benchmarks/table.py
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from data.checks import BadSampleError
from data.mixture import Source, read_sample
from data.sample import Box
from moa.benchmarks.scores import Response
from moa.evaluation.fingerprints import data_digest, sample_digest
from moa.evaluation.result import Result
from moa.evaluation.run import prepare, scored_tasks

BY_QUESTION, BY_IMAGE = ("question_id", "questionId", "id"), ("image_id", "image")
# names of outputs; where a row has two of them, either may be the reference
NAMES = """
    answer prediction caption text response output outputs pred completion generated_text generation generated
    predicted predicted_answer pred_answer model_answer model_output model_response model_prediction hypothesis
"""
TEXTS = tuple(NAMES.split())
# what else may be an output, so that the text beside it is perhaps the reference
OUTPUT = re.compile(
    r"(?!.*(_|\b)(id|name|path|type|time|tokens?|length|version)$)"
    r".*(answer|predict|respon|output|repl(y|ies)|result|generat|complet|gpt|llava|qwen|internvl|gemini)",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Text and box by id; ids are those of questions, or of images where the file has no others."""

    found: dict[str, tuple[str, Box | None]]
    by_image: bool


def read_answers(path: str | Path, text_key: str | None = None) -> Answers:
    """The texts at `text_key`, or at the one key of `TEXTS` that the rows have; ValueError with file and row."""
    rows = list(read_rows(Path(path)))
    if not rows:
        raise ValueError(f"{path}: holds no answers")
    id_key = key_of(rows[0], (*BY_QUESTION, *BY_IMAGE), f"{path}: row 1")
    text_key = text_key or only_text(rows, path)
    found: dict[str, tuple[str, Box | None]] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{path}: row {number}"
        key_of(row, (id_key,), where)
        key = row[id_key]
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise ValueError(f"{where}: {id_key} must be a text or a whole number, got {key!r:.80}")
        if str(key) in found:
            raise ValueError(f"{where}: {id_key} {key} is not unique")
        found[str(key)] = text_in(row, text_key, where), box_in(row, where)
    return Answers(found=found, by_image=id_key in BY_IMAGE)


def only_text(rows: Sequence[Any], path: str | Path) -> str:
    """The key of `TEXTS` that some row has; ValueError where that is none, or where others may be the output."""
    keys = [key for key in TEXTS if any(isinstance(row, dict) and key in row for row in rows)]
    first = rows[0] if keys and isinstance(rows[0], dict) else {}
    texts = [key for key, value in first.items() if isinstance(value, str)]
    keys += [key for key in texts if key not in keys and OUTPUT.match(key)]
    if len(keys) > 1:
        raise ValueError(
            f"{path}: rows have {' and '.join(keys)}, and one of them may be the reference; name the "
            f"model's output: text_key={keys[-1]}"
        )
    return key_of(rows[0], keys or TEXTS, f"{path}: row 1")


def key_of(row: Any, keys: Sequence[str], where: str) -> str:
    found = [key for key in keys if isinstance(row, dict) and key in row]
    if not found:
        raise ValueError(f"{where}: has none of {', '.join(keys)}")
    return found[0]


def text_in(row: dict[str, Any], key: str, where: str) -> str:
    """The text, which can be written as UTF-8; ValueError else."""
    value = row.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be a text, got {value!r:.80}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{where}: {key} has half of a surrogate pair, which is no character")
    return value


def box_in(row: dict[str, Any], where: str) -> Box | None:
    box = row.get("predicted_box")
    if box is None:
        return None
    try:
        x0, y0, x1, y1 = map(float, box)
    except (TypeError, ValueError, OverflowError):
        x0 = x1 = y0 = y1 = math.nan
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        raise ValueError(f"{where}: predicted_box must be four finite numbers, got {box!r:.80}")
    return x0, y0, x1, y1


def read_rows(path: Path) -> Iterator[Any]:
    """The rows of a JSON list, or of JSON lines whatever the file is called; with or without a BOM."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start})") from None
    lines = not text.lstrip().startswith("[")
    parts = [line for line in text.split("\n") if line.strip()] if lines else [text]
    for number, part in enumerate(parts, start=1):
        try:
            value = json.loads(part)
        except (ValueError, RecursionError) as error:
            form = "one object a line, or one list of objects"
            raise ValueError(f"{path}: row {number}: is not JSON ({error}); {form}") from None
        yield from [value] if lines else value


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
    """The result of a file of answers on a data set; answers to questions that it does not have are counted."""
    responses, skipped = list[Response](), list[BadSampleError]()
    unanswered, used, read = list[str](), set[str](), list[str]()
    for index in track(range(len(dataset)), name, disable=not progress, transient=True):
        sample = read_sample(dataset, index, name)
        read.append(sample_digest(sample))
        item = prepare(sample, [], benchmark, scored=True)
        if isinstance(item, BadSampleError):
            skipped.append(item)
            continue
        key = item.image_id if answers.by_image else item.id
        if key in used and not answers.by_image:
            raise ValueError(
                f"{name}: two questions have the id {key!r}, so no answer by id can be told from the "
                "other's; give each row of the data set an id of its own"
            )
        if key in answers.found:
            used.add(key)
        else:
            unanswered.append(key)
        text, box = answers.found.get(key, ("", None))
        responses.append(Response(sample=item.with_images([]), text=text.strip(), box=box))
    if skipped and (on_bad_sample == "error" or not responses):
        raise skipped[0]
    if unanswered and (missing == "error" or len(unanswered) == len(responses)):
        raise ValueError(
            f"{name}: {len(unanswered)} of {len(responses)} questions have no answer, such as {unanswered[0]}; "
            "missing=empty counts them as empty answers"
        )
    return Result(
        name=name,
        tasks=scored_tasks(responses, benchmark),
        skipped=skipped,
        data=data_digest(read),
        settings={"num_unanswered": len(unanswered), "num_unused": len(answers.found) - len(used)},
    )
