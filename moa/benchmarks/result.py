"""The scores of one data set, as objects, as plain data for JSON files, and as a table."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from data.checks import BadSampleError
from moa.benchmarks.scores import Prediction, Scores, with_error


@dataclass(frozen=True, kw_only=True)
class Result:
    """The scores of one data set. `tasks` holds each task's predictions and their scores."""

    name: str
    tasks: dict[str, tuple[list[Prediction], Scores]]
    skipped: list[BadSampleError] = field(default_factory=list)
    seconds: float = (
        0.0  # of generating, by the process that took longest; of all the work for CLIP
    )
    num_tokens: int = 0  # of all processes
    num_processes: int = 1
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def predictions(self) -> list[Prediction]:
        return [prediction for predictions, _ in self.tasks.values() for prediction in predictions]

    @property
    def sample_scores(self) -> list[float]:
        """The primary score of every prediction, in the order of `predictions`."""
        return [v for _, scores in self.tasks.values() for v in scores.values[scores.primary]]

    @property
    def score(self) -> dict[str, float | None]:
        """The mean of all samples' primary scores with its standard error."""
        return with_error(self.sample_scores, [p.sample for p in self.predictions])

    def record(self) -> dict[str, Any]:
        """Everything but the predictions, as plain data for a JSON file."""
        samples = [prediction.sample for prediction in self.predictions]
        return {
            "name": self.name,
            "n": len(samples),
            "num_images": len({sample.image_id for sample in samples}),
            "num_duplicate_ids": len(samples) - len({(s.task, s.id) for s in samples}),
            "num_with_ocr_words": sum(bool(sample.ocr) for sample in samples),
            "score": self.score,
            "tasks": {task: task_record(*found) for task, found in self.tasks.items()},
            "by_tag": by_tag(self.predictions, self.sample_scores),
            "num_skipped": len(self.skipped),
            "skipped": dict(Counter(error.rule for error in self.skipped)),
            "skipped_samples": [str(error) for error in self.skipped],
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.num_tokens / max(self.seconds, 1e-9), 1),
            "num_processes": self.num_processes,
            "settings": self.settings,
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One record per prediction, for a JSON-lines file."""
        for prediction, score in zip(self.predictions, self.sample_scores, strict=True):
            yield prediction_record(prediction, score)


def task_record(predictions: Sequence[Prediction], scores: Scores) -> dict[str, Any]:
    samples = [prediction.sample for prediction in predictions]
    metrics: dict[str, Any] = {
        name: with_error(values, samples) for name, values in scores.values.items()
    }
    metrics |= {name: {"value": value, "se": None} for name, value in scores.corpus.items()}
    return {
        "n": len(samples),
        "primary": scores.primary,
        "metrics": metrics,
        "failures": {reason: len(where) for reason, where in scores.failures.items()},
        "notes": scores.notes,
    }


def by_tag(predictions: Sequence[Prediction], scores: Sequence[float]) -> dict[str, Any]:
    """Mean score and number of the samples with each tag: where the errors are."""
    found: dict[str, list[float]] = {}
    for prediction, score in zip(predictions, scores, strict=True):
        for tag in prediction.sample.tags:
            found.setdefault(tag, []).append(score)
    return {tag: {"value": sum(v) / len(v), "n": len(v)} for tag, v in sorted(found.items())}


def prediction_record(prediction: Prediction, score: float) -> dict[str, Any]:
    sample, gates = prediction.sample, prediction.gates
    mean = None if gates is None else [sum(column) / len(gates) for column in zip(*gates)]  # noqa: B905
    return {
        "id": sample.id,
        "image_id": sample.image_id,
        "task": sample.task,
        "source": sample.source,
        "expert": sample.expert,
        "question": sample.question,
        "answers": list(sample.answers),
        "prediction": prediction.text,
        "score": score,
        "boxes": [list(box) for box in sample.boxes],
        "predicted_box": None if prediction.box is None else list(prediction.box),
        "ocr": None if sample.ocr is None else [word.text for word in sample.ocr],
        "gates": None if mean is None else [round(gate, 5) for gate in mean],
        "tags": list(sample.tags),
    }


def table(results: Sequence[Result]) -> Table:
    """One row per data set and task: the primary score with its error, and what failed."""
    grid = Table(title="Evaluation", title_justify="left", header_style="bold")
    for column in ("data set", "task", "metric", "score", "± s.e.", "n", "failed", "skipped"):
        grid.add_column(column, justify="left" if column in ("data set", "task") else "right")
    for result in results:
        for task, (predictions, scores) in result.tasks.items():
            record = task_record(predictions, scores)
            primary = record["metrics"][scores.primary]
            error = "-" if primary["se"] is None else f"{primary['se']:.3f}"
            failed, skipped = sum(record["failures"].values()), len(result.skipped)
            grid.add_row(result.name, task, scores.primary, f"{primary['value']:.3f}", error,
                         str(len(predictions)), str(failed), str(skipped))  # fmt: skip
    return grid


def comparison(rows: Mapping[str, Mapping[str, dict[str, float | None]]]) -> Table:
    """One row per model, one column per data set; a dash where a model was not scored on it."""
    # as narrow as it can be: seven data sets fit a terminal of 80 columns
    grid = Table(
        title="Scores in per cent ± standard error (clustered by picture)",
        title_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    grid.add_column("", no_wrap=True)
    names = list(dict.fromkeys(name for scores in rows.values() for name in scores))
    for name in names:
        grid.add_column(name, justify="right")
    for row, scores in rows.items():
        grid.add_row(row, *(cell(scores.get(name)) for name in names))
    return grid


def cell(score: dict[str, float | None] | None) -> str:
    if score is None:
        return "-"
    error = "" if score["se"] is None else f"±{100 * score['se']:.0f}"
    return f"{100 * (score['value'] or 0):.0f}{error}"
