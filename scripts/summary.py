"""What a run gained: the base, other runs, the routed experts and merged adapters, side by side, in <run>/summary.json.

    python -m scripts.summary run=runs/demo beside=[runs/demo_lora] merged=[runs/demo/merged/mean]

Adds the router's scores that eval.py wrote to <run>/eval, says in words what was gained and kept, and lists the images.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from rich.console import Console

from moa.cli.command import command
from moa.cli.ranges import FilePath
from moa.files.atomic import write_json

if TYPE_CHECKING:
    from moa.evaluation.models import EvaluatedModel
    from moa.evaluation.result import Result

BASE, ROUTED = "base", "routed experts"
Answers = Mapping[str, Sequence[Mapping[str, Any]]]  # by data set: a row for each question, with its score


@dataclass(frozen=True, kw_only=True)
class SummarySettings:
    run: FilePath = ""  # run folder, scored by eval.py before
    # runs on the same data to compare it with, such as one LoRA of the same size
    beside: list[FilePath] = field(default_factory=list)
    merged: list[FilePath] = field(default_factory=list)  # adapter folders of scripts.merge


def summarise(settings: SummarySettings, console: Console) -> None:
    from moa.evaluation.result import comparison

    if not settings.run or not os.access(settings.run, os.W_OK):
        raise OSError(f"run: {settings.run!r} cannot be written: no such folder, or no permission")
    run = Path(settings.run)
    found, answers = score_all(run, settings.merged, settings.beside)
    lines = gains(answers, found["trained"])
    write_json(run / "summary.json", found | {"gains": lines})
    console.print(comparison(found["rows"]))
    console.print("", *lines, "", sep="\n", soft_wrap=True, highlight=False)
    for image in sorted((run / "pictures").glob("*.png")):
        console.print(f"image: {image}", soft_wrap=True)


def score_all(
    run: Path, merged: Sequence[str], beside: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, "Answers"]]:
    """The record of the rows by model and data set, {"value", "se"} each, with the fingerprints of what they are about;
    and the scored answers of each row."""
    from data.sources import open_ocr
    from moa.evaluation.models import find_models, open_model
    from moa.evaluation.settings import chosen_sources, with_eval
    from moa.evaluation.sources import score_sources

    own, *models = find_models([str(run), *map(str, (*beside, *merged))], str(run))
    model, ocr = open_model(own, "cpu"), open_ocr(own.config.data)
    config = with_eval(own.config, num_images=0)
    base = score_sources(model, with_eval(config, gates="off"), ocr, progress=True)
    fingerprint, weights = model.backbone.fingerprint, str(own.fingerprint())
    measured = read_scores(run, weights, fingerprint, base)
    scored, about = {BASE: base}, {BASE: fingerprint, ROUTED: weights}
    names = names_of_rows(models)
    for name, one in zip(names, models, strict=True):
        config = with_eval(one.config, num_images=0, sources=own.config.eval.sources)
        scored[name] = score_sources(open_model(one, "cpu"), config, ocr, progress=True)
        about[name] = str(one.fingerprint())
    rows = {name: {r.name: r.score for r in results} for name, results in scored.items()}
    answers: dict[str, Answers] = {n: {r.name: r.rows() for r in results} for n, results in scored.items()}
    rows[ROUTED] = {name: record["score"] for name, (record, _) in measured.items()}
    answers[ROUTED] = {name: found for name, (_, found) in measured.items()}
    order = [BASE, *names[: len(beside)], ROUTED, *names[len(beside) :]]
    tasks = {source.task for source in own.config.data.sources.values()}
    trained = [source.name for source in chosen_sources(own.config) if source.task in tasks]
    record = {"rows": {name: rows[name] for name in order}, "weights": about, "trained": trained}
    return record | {"data": {r.name: r.data for r in base}}, {name: answers[name] for name in order}


def names_of_rows(models: "Sequence[EvaluatedModel]") -> list[str]:
    """Each its own: models of one name get their label, which no other has, behind it."""
    names = [*map(name_of_row, models)]
    pairs = zip(names, models, strict=True)
    return [f"{name} ({model.label})" if names.count(name) > 1 else name for name, model in pairs]


def name_of_row(model: "EvaluatedModel") -> str:
    if model.kind != "run":
        return f"merged, {Path(model.path).name}"
    experts = model.config.experts
    rank = next(iter(experts.values())).rank
    return f"one LoRA, rank {rank}" if len(experts) == 1 else f"run {Path(model.path).name}"


def gains(answers: "Mapping[str, Answers]", trained: Sequence[str]) -> list[str]:
    """In words: what was gained on the trained data sets, and what is left of what only the base was taught. A
    difference stands with its standard error, over the questions of this one run."""
    routed, kept = answers[ROUTED], [name for name in answers[ROUTED] if name not in trained]
    parts = [("trained on", trained)] + ([("not trained on, only the base was", kept)] if kept else [])
    lines = []
    for title, names in parts:
        means = {row: 100 * mean(r["score"] for n in names for r in found[n]) for row, found in answers.items()}
        line = f"{title} ({', '.join(names)}): routed {means[ROUTED]:.0f}, base {means[BASE]:.0f}"
        for row, found in answers.items():
            if row in (BASE, ROUTED):
                continue
            value, error = difference(found, routed, names)
            line += f"; {row} {means[row]:.0f}, routed {value:+.1f} ± {error:.1f} against it"
        lines.append(line)
    return lines


def difference(first: "Answers", second: "Answers", names: Sequence[str]) -> tuple[float, float]:
    """Mean over data sets of second - first, and its standard error, in points."""
    from moa.evaluation.result import paired_difference

    found = [paired_difference(first[name], second[name]) for name in names]
    pairs = [(f["value"] or 0.0, f["se"] or 0.0) for f in found if f is not None]
    values, errors = zip(*pairs, strict=True)
    return 100 * mean(values), 100 * sum(e * e for e in errors) ** 0.5 / len(errors)


def read_scores(run: Path, weights: str, base: str, asked: "Sequence[Result]") -> "dict[str, tuple[Any, Any]]":
    """Record and rows that eval.py wrote for these weights on just the samples of `asked`, gated by the router."""
    from moa.evaluation.fingerprints import read_result, settings_digest

    scores, again = {}, f"run `python eval.py run={run}`"
    for result in asked:
        found = read_result(run / "eval", result.name)
        file = run / "eval" / f"{result.name}.json"
        if found is None:
            raise ValueError(f"{file}: missing, damaged, or not of one evaluation; {again}")
        settings = settings_digest({**result.settings, "gates": "router"})
        wanted = {"weights": weights, "base": base, "data": result.data, "settings": settings}
        wrong = [key for key, value in wanted.items() if found[0]["fingerprints"].get(key) != value]
        if wrong:
            raise ValueError(f"{file}: was measured with other {' and '.join(wrong)}; {again}")
        scores[result.name] = found
    return scores


main = command(SummarySettings, summarise, __doc__)

if __name__ == "__main__":
    main()
