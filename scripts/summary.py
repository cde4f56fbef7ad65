"""What a run gained: the base, the routed experts and merged adapters, side by side, in <run>/summary.json.

    python -m scripts.summary run=runs/demo merged=[runs/demo/merged/mean_gates,runs/demo/merged/ties]

Adds the router's scores that eval.py wrote to <run>/eval, and lists the images.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from moa.cli.command import run_command
from moa.cli.ranges import FilePath
from moa.files.atomic import write_json

if TYPE_CHECKING:
    from moa.evaluation.result import Result


@dataclass(frozen=True, kw_only=True)
class SummarySettings:
    run: FilePath = ""  # run folder, scored by eval.py before
    merged: list[FilePath] = field(default_factory=list)  # adapter folders of scripts.merge


def main(argv: Sequence[str] | None = None) -> None:
    run_command(SummarySettings, summarise, __doc__, argv)


def summarise(settings: SummarySettings, console: Console) -> None:
    from moa.evaluation.result import comparison

    if not settings.run or not os.access(settings.run, os.W_OK):
        raise OSError(f"run: {settings.run!r} cannot be written: no such folder, or no permission")
    run = Path(settings.run)
    found = score_all(run, settings.merged)
    write_json(run / "summary.json", found)
    console.print(comparison(found["rows"]))
    for image in sorted((run / "pictures").glob("*.png")):
        console.print(f"image: {image}", soft_wrap=True)


def score_all(run: Path, merged: Sequence[str]) -> dict[str, Any]:
    """The rows by model and data set, {"value", "se"} each, and the fingerprints of what they are about."""
    from data.sources import open_ocr
    from moa.evaluation.models import find_models, open_model
    from moa.evaluation.settings import with_eval
    from moa.evaluation.sources import score_sources

    own, *models = find_models([str(run), *map(str, merged)], str(run))
    model, ocr = open_model(own, "cpu"), open_ocr(own.config.data)
    config = with_eval(own.config, num_images=0)
    base = score_sources(model, with_eval(config, gates="off"), ocr, progress=True)
    fingerprint, weights = model.backbone.fingerprint, str(own.fingerprint())
    measured = read_scores(run, weights, fingerprint, base)
    rows = {"base": by_name(base), "routed experts": measured}
    about = {"base": fingerprint, "routed experts": weights}
    for one in models:
        name = f"merged, {Path(one.path).name}"
        config = with_eval(one.config, num_images=0)
        rows[name] = by_name(score_sources(open_model(one, "cpu"), config, ocr, progress=True))
        about[name] = str(one.fingerprint())
    return {"rows": rows, "weights": about, "data": {r.name: r.data for r in base}}


def read_scores(run: Path, weights: str, base: str, asked: "Sequence[Result]") -> dict[str, Any]:
    """The scores that eval.py wrote for these weights on just the samples of `asked`, gated by the router."""
    from moa.evaluation.fingerprints import read_result, settings_digest

    scores, again = {}, f"run `python eval.py run={run}`"
    for result in asked:
        found = read_result(run / "eval", result.name)
        file = run / "eval" / f"{result.name}.json"
        if found is None:
            raise ValueError(f"{file}: missing, damaged, or not of one evaluation; {again}")
        record, _ = found
        settings = settings_digest({**result.settings, "gates": "router"})
        wanted = {"weights": weights, "base": base, "data": result.data, "settings": settings}
        wrong = [key for key, value in wanted.items() if record["fingerprints"].get(key) != value]
        if wrong:
            raise ValueError(f"{file}: was measured with other {' and '.join(wrong)}; {again}")
        scores[result.name] = record["score"]
    return scores


def by_name(results: "Sequence[Result]") -> dict[str, Any]:
    return {result.name: result.score for result in results}


if __name__ == "__main__":
    main()
