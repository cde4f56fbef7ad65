"""The scores of one data set, as objects, as plain data for JSON files, and as tables."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from data.checks import BadSampleError
from moa.benchmarks.scores import Response, Scores, mean, with_error
from moa.metrics.intervals import clustered_standard_error

Score = dict[str, float | None]  # {"value", "se"}
ScoresByName = Mapping[str, Score]  # by data set
Rows = Sequence[Mapping[str, Any]]  # of a NAME.jsonl
ASKED = ("id", "image_id", "task", "source", "expert", "question")  # of a sample, in a row
WIDTH = 80  # of a terminal
NORMAL = 1.96  # standard errors on either side of a 95 % interval


@dataclass(frozen=True, kw_only=True)
class Result:
    """The scores of one data set. `tasks` holds each task's responses and their scores."""

    name: str
    tasks: dict[str, tuple[list[Response], Scores]]
    skipped: list[BadSampleError] = field(default_factory=list)
    # of generating, by the process that took longest; of all the work for CLIP
    seconds: float = 0.0
    num_tokens: int = 0  # of all processes
    num_processes: int = 1
    data: str = ""  # digest of the samples that were read, those that were skipped included
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def responses(self) -> list[Response]:
        return [response for responses, _ in self.tasks.values() for response in responses]

    @property
    def sample_scores(self) -> list[float]:
        return [v for _, scores in self.tasks.values() for v in scores.values[scores.primary]]

    @property
    def score(self) -> Score:
        return with_error(self.sample_scores, [r.sample for r in self.responses])

    def record(self) -> dict[str, Any]:
        samples = [response.sample for response in self.responses]
        return {
            "name": self.name,
            "n": len(samples),
            "num_images": len({sample.image_id for sample in samples}),
            "num_duplicate_ids": len(samples) - len({(s.task, s.id) for s in samples}),
            "num_with_ocr_words": sum(bool(sample.ocr) for sample in samples),
            "score": self.score,
            "tasks": {task: task_record(*found) for task, found in self.tasks.items()},
            "by_tag": by_tag(self.responses, self.sample_scores),
            "num_skipped": len(self.skipped),
            "skipped": dict(Counter(error.rule for error in self.skipped)),
            "skipped_samples": [str(error) for error in self.skipped],
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.num_tokens / max(self.seconds, 1e-9), 1),
            "num_processes": self.num_processes,
            "settings": self.settings,
        }

    def rows(self) -> list[dict[str, Any]]:
        return [*map(response_record, self.responses, self.sample_scores)]


def task_record(responses: Sequence[Response], scores: Scores) -> dict[str, Any]:
    samples = [response.sample for response in responses]
    metrics: dict[str, Any] = {n: with_error(v, samples) for n, v in scores.values.items()}
    metrics |= {name: {"value": value, "se": None} for name, value in scores.corpus.items()}
    return {
        "n": len(samples),
        "primary": scores.primary,
        "metrics": metrics,
        "failures": {reason: len(where) for reason, where in scores.failures.items()},
        "notes": scores.notes,
    }


def by_tag(responses: Sequence[Response], scores: Sequence[float]) -> dict[str, Any]:
    """Mean score and number of the samples with each tag: where the errors are."""
    found: dict[str, list[float]] = {}
    for response, score in zip(responses, scores, strict=True):
        for tag in response.sample.tags:
            found.setdefault(tag, []).append(score)
    return {tag: {"value": sum(v) / len(v), "n": len(v)} for tag, v in sorted(found.items())}


def response_record(response: Response, score: float) -> dict[str, Any]:
    sample, gates = response.sample, response.gates
    if gates is not None:
        means = [round(sum(column) / len(gates), 5) for column in zip(*gates, strict=True)]
    return {
        **{key: getattr(sample, key) for key in ASKED},
        "question": sample.asked,
        "answers": list(sample.answers),
        "prediction": response.text,
        "score": score,
        "boxes": [list(box) for box in sample.boxes],
        "predicted_box": None if response.box is None else list(response.box),
        "ocr": None if sample.ocr is None else [word.text for word in sample.ocr],
        "gates": None if gates is None else means,
        "tags": list(sample.tags),
    }


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a table of several models shows of one data set, new or from its files."""

    name: str
    score: Score
    metrics: list[str]  # that the score is the mean of
    rows: Rows


def measured(record: Mapping[str, Any], rows: Rows) -> Measured:
    metrics = list(dict.fromkeys(task["primary"] for task in record["tasks"].values()))
    return Measured(name=record["name"], score=record["score"], metrics=metrics, rows=rows)


def plain_table() -> Table:
    """As narrow as it can be: no frame, and one blank between columns."""
    return Table(box=SIMPLE_HEAD, show_edge=False, collapse_padding=True, pad_edge=False)


def table(results: Sequence[Result], title: str) -> Group:
    """One row per data set and task: the primary score with its error, and what failed."""
    grid = plain_table()
    for column in ("data set", "task", "metric"):
        grid.add_column(column, overflow="fold")
    for column in ("score", "± s.e.", "n", "failed", "skipped"):
        grid.add_column(column, justify="right", no_wrap=True)
    for name, task, metric, value, error, *counts in scores_by_task(results):
        cells = f"{value:.3f}", "-" if error is None else f"{error:.3f}", *map(str, counts)
        grid.add_row(Text(name), Text(task), metric, *cells)
    return Group("", Text(title, style="bold"), grid)


def scores_by_task(results: Sequence[Result]) -> Iterator[tuple[Any, ...]]:
    """Data set, task, primary metric, its value and standard error, and the number of samples, failures and skipped."""
    for result in results:
        for task, (responses, scores) in result.tasks.items():
            record = task_record(responses, scores)
            primary, failed = record["metrics"][scores.primary], sum(record["failures"].values())
            counts = len(responses), failed, len(result.skipped)
            yield result.name, task, scores.primary, primary["value"], primary["se"], *counts


def compared(tables: Mapping[str, Sequence[Measured]]) -> Group:
    """Scores of all models, and what the later ones gain on the questions of the first."""
    scores = {label: {r.name: r.score for r in own} for label, own in tables.items()}
    metrics = {r.name: "+".join(r.metrics) for own in tables.values() for r in own}
    line = ", ".join(f"{name} {metric}" for name, metric in metrics.items())
    shown: list[RenderableType] = [comparison(scores), Text(f"metrics: {line}")]
    gained = differences({label: {r.name: r.rows for r in own} for label, own in tables.items()})
    if any(gained.values()):
        title = f"Difference to {next(iter(tables))} on the same questions ± standard error"
        shown.append(comparison(gained, title, sign="+"))
    return Group(*shown)


def comparison(
    rows: Mapping[str, ScoresByName],
    title: str = "Scores in per cent ± standard error (clustered by image)",
    sign: str = "",
) -> Group:
    """One row per model, one column per data set, in as many tables as fit a terminal's width."""
    names = list(dict.fromkeys(name for scores in rows.values() for name in scores))
    cells = {name: [name, *(cell(scores.get(name), sign) for scores in rows.values())] for name in names}
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


def cell(score: Score | None, sign: str = "") -> str:
    if score is None:
        return "-"
    error = "" if score["se"] is None else f"±{100 * score['se']:.0f}"
    return f"{100 * (score['value'] or 0):{sign}.0f}{error}"


def interval(score: Score | None, sign: str = "") -> str:
    """`71.2 (65.0 to 77.4)`; a score, which has no sign, lies between 0 and 100, and so does its interval."""
    if score is None or score.get("value") is None:
        return "-"
    value, error = 100 * float(score["value"] or 0), score.get("se")
    if error is None:
        return f"{value:{sign}.1f}"
    low, high = (value + side * NORMAL * 100 * error for side in (-1, 1))
    low, high = (low, high) if sign else (max(low, 0.0), min(high, 100.0))
    return f"{value:{sign}.1f} ({low:{sign}.1f}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high:{sign}.1f})"


def differences(rows: Mapping[str, Mapping[str, Rows]]) -> dict[str, dict[str, Score]]:
    """Every other model's scores minus the first one's, over the questions that both answered."""
    (_, first), *others = rows.items()
    return {
        label: {
            name: found
            for name, own in scored.items()
            if (found := paired_difference(first.get(name, ()), own)) is not None
        }
        for label, scored in others
    }


def paired_difference(first: Rows, second: Rows) -> Score | None:
    """Mean of `second` - `first` and its standard error, clustered by image; None without a pair."""
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
