"""What a run gained: the base, the routed experts and merged adapters, side by side.

    python -m scripts.summary runs/demo --merged runs/demo/merged/mean_gates runs/demo/merged/ties

Scores the base and the merged adapters on the run's own data sets, puts them beside what eval.py found for the router
in <run>/eval, writes <run>/summary.json, and lists the pictures.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from data.sources import open_ocr
from moa.checkpoint import load_model, step_folder, weights_fingerprint
from moa.cli.command import mistakes_in_one_line, path_argument
from moa.evaluation.fingerprints import read_result, settings_digest
from moa.evaluation.models import open_subject, subject_of
from moa.evaluation.result import Result, comparison
from moa.evaluation.sources import EvalSettings, score_sources
from moa.files.atomic import write_json


def read_scores(run: Path, base: str, asked: Sequence[Result]) -> dict[str, Any]:
    """What eval.py found for these weights on just the samples that were `asked`, gated by the router."""
    weights, again = (
        weights_fingerprint(step_folder(run)),
        f"run `python eval.py --checkpoint {run}`",
    )
    scores = {}
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


def by_name(results: Sequence[Result]) -> dict[str, Any]:
    return {result.name: result.score for result in results}


def score_all(run: Path, merged: list[Path]) -> dict[str, Any]:
    """The rows by model and data set, {"value", "se"} each, and the fingerprints of what they are about."""
    model, _, config = load_model(run, "cpu")
    settings, ocr = EvalSettings(num_pictures=0), open_ocr(config.data)
    base = score_sources(model, config, replace(settings, gates="off"), ocr)
    of_base = model.backbone.fingerprint
    rows = {"base": by_name(base), "routed experts": read_scores(run, of_base, base)}
    weights = {"base": of_base, "routed experts": weights_fingerprint(step_folder(run))}
    for folder in merged:
        subject = subject_of(str(folder))
        one, config, _ = open_subject(subject, str(run), "cpu")
        rows[f"merged, {folder.name}"] = by_name(score_sources(one, config, settings, ocr))
        weights[f"merged, {folder.name}"] = str(subject.fingerprint())
    return {"rows": rows, "weights": weights, "data": {r.name: r.data for r in base}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=path_argument, help="run folder, scored by eval.py before")
    parser.add_argument(
        "--merged",
        type=path_argument,
        nargs="*",
        default=[],
        help="adapter folders of scripts.merge",
    )
    args, console = parser.parse_args(), Console()
    with mistakes_in_one_line():
        if not os.access(args.run, os.W_OK):
            raise OSError(f"{args.run}: cannot be written: no such folder, or no permission")
        found = score_all(args.run, args.merged)
        write_json(args.run / "summary.json", found)
    console.print(comparison(found["rows"]))
    for picture in sorted((args.run / "pictures").glob("*.png")):
        console.print(f"picture: {picture}", soft_wrap=True)


if __name__ == "__main__":
    main()
