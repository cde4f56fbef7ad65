"""The scores of one data set, as objects, as plain data for JSON files, and as a table."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from data.checks import BadSampleError
from moa.benchmarks.scores import Prediction, Scores, mean, with_error
from moa.metrics.standard_error import clustered_standard_error


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
    data: str = ""  # digest of the samples that were read, those that were skipped included
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


ScoresByName = Mapping[str, dict[str, float | None]]  # data set -> {"value", "se"}
Rows = Sequence[Mapping[str, Any]]  # of a NAME.jsonl
WIDTH = 80


def table(results: Sequence[Result], title: str) -> Group:
    """One row per data set and task: the primary score with its error, and what failed."""
    grid = plain_table()
    for column in ("data set", "task", "metric"):
        grid.add_column(column, overflow="fold")
    for column in ("score", "± s.e.", "n", "failed", "skipped"):
        grid.add_column(column, justify="right", no_wrap=True)
    for result in results:
        for task, (predictions, scores) in result.tasks.items():
            record = task_record(predictions, scores)
            primary = record["metrics"][scores.primary]
            error = "-" if primary["se"] is None else f"{primary['se']:.3f}"
            failed, skipped = sum(record["failures"].values()), len(result.skipped)
            grid.add_row(Text(result.name), Text(task), scores.primary, f"{primary['value']:.3f}", error,
                         str(len(predictions)), str(failed), str(skipped))  # fmt: skip
    return Group("", Text(title, style="bold"), grid)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a table of several models shows of one data set, new or from its files."""

    name: str
    score: dict[str, float | None]
    metrics: list[str]  # that the score is the mean of
    rows: Rows


def measured(result: Result) -> Measured:
    return measured_in(result.record(), [*result.rows()])


def measured_in(record: Mapping[str, Any], rows: Rows) -> Measured:
    metrics = list(dict.fromkeys(task["primary"] for task in record["tasks"].values()))
    return Measured(name=record["name"], score=record["score"], metrics=metrics, rows=rows)


def plain_table() -> Table:
    """As narrow as it can be: no frame, and one blank between columns."""
    return Table(box=SIMPLE_HEAD, show_edge=False, collapse_padding=True, pad_edge=False)


def comparison(
    rows: Mapping[str, ScoresByName],
    title: str = "Scores in per cent ± standard error (clustered by image)",
    sign: str = "",
) -> Group:
    """One row per model, one column per data set; a dash where a model was not scored on it.

    As many tables as it takes for each to be no wider than a terminal.
    """
    names = list(dict.fromkeys(name for scores in rows.values() for name in scores))
    cells = {
        name: [name, *(cell(scores.get(name), sign) for scores in rows.values())] for name in names
    }
    widths = {name: max(map(len, column)) + 1 for name, column in cells.items()}
    grids = []
    for chunk in chunks(widths, WIDTH - max(map(len, rows), default=0)):
        grids.append(plain_table())
        grids[-1].add_column("", overflow="fold")
        for name in chunk:
            grids[-1].add_column(Text(name), justify="right", no_wrap=True)
        for number, row in enumerate(rows, start=1):
            grids[-1].add_row(Text(row), *(cells[name][number] for name in chunk))
    return Group("", Text(title, style="bold"), *grids)


def chunks(widths: Mapping[str, int], most: int) -> list[list[str]]:
    """The names in their order, in groups of no more than `most` letters, or of one name."""
    groups: list[list[str]] = []
    for name, width in widths.items():
        if not groups or sum(widths[n] for n in groups[-1]) + width > most:
            groups.append([])
        groups[-1].append(name)
    return groups


def differences(rows: Mapping[str, Mapping[str, Rows]]) -> dict[str, ScoresByName]:
    """Every other model's scores minus the first one's, over the questions that both were asked."""
    (_, first), *others = rows.items()
    return {
        label: {
            name: found
            for name, own in scored.items()
            if (found := paired_difference(first.get(name, ()), own)) is not None
        }
        for label, scored in others
    }


def paired_difference(first: Rows, second: Rows) -> dict[str, float | None] | None:
    """Mean of `second` - `first` and its standard error, clustered by picture; None without a pair."""
    before = dict(zip(questions_of(first), first, strict=True))
    pairs = [
        (row["image_id"], row["score"] - before[key]["score"])
        for key, row in zip(questions_of(second), second, strict=True)
        if key in before
    ]
    if not pairs:
        return None
    images, values = zip(*pairs, strict=True)
    return {"value": mean(values), "se": clustered_standard_error(values, images)}


def questions_of(rows: Rows) -> list[tuple[Any, ...]]:
    """What makes a row the same question to another model; the last entry counts repetitions."""
    seen: Counter[tuple[Any, ...]] = Counter()
    keys = []
    for row in rows:
        asked = (row["task"], row["id"], row["image_id"], row["question"], *row["answers"])
        seen[asked] += 1
        keys.append((*asked, seen[asked]))
    return keys


def metrics_line(results: Sequence[Measured]) -> str:
    """The metric that each data set's score is the mean of."""
    named = {result.name: "+".join(result.metrics) for result in results}
    return "metrics: " + ", ".join(f"{name} {metric}" for name, metric in named.items())


def cell(score: dict[str, float | None] | None, sign: str = "") -> str:
    if score is None:
        return "-"
    error = "" if score["se"] is None else f"±{100 * score['se']:.0f}"
    return f"{100 * (score['value'] or 0):{sign}.0f}{error}"
