"""What a run gained: the base, the routed experts and merged adapters, side by side.

    python scripts/summary.py runs/demo --merged runs/demo/merged/mean_gates runs/demo/merged/ties

Scores the base and the merged adapters on the run's own data sets, puts them beside what eval.py found for the router
in <run>/eval, writes <run>/summary.json, and lists the pictures.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from data.sources import open_ocr
from moa.atomic import write_json
from moa.benchmarks.result import Result, comparison
from moa.benchmarks.sources import EvalSettings, chosen_sources, score_sources
from moa.benchmarks.subjects import open_subject, subject_of
from moa.checkpoint import load_model


def read_scores(run: Path, names: list[str]) -> dict[str, Any]:
    """What eval.py wrote for the model as it was trained."""
    files = {name: run / "eval" / f"{name}.json" for name in names}
    for file in files.values():
        if not file.is_file():
            raise ValueError(f"{file}: missing; run `python eval.py --checkpoint {run}` first")
    return {name: json.loads(file.read_text())["score"] for name, file in files.items()}


def by_name(results: list[Result]) -> dict[str, Any]:
    return {result.name: result.score for result in results}


def score_all(run: Path, merged: list[Path]) -> dict[str, dict[str, Any]]:
    """Row -> data set -> {"value", "se"}."""
    model, _, config = load_model(run, "cpu")
    settings, ocr = EvalSettings(num_pictures=0), open_ocr(config.data)
    names = [source.name for source in chosen_sources(config, settings)]
    off = EvalSettings(num_pictures=0, gates="off")
    rows = {
        "base": by_name(score_sources(model, config, off, ocr)),
        "routed experts": read_scores(run, names),
    }
    for folder in merged:
        one, config, _ = open_subject(subject_of(str(folder)), str(run), "cpu")
        rows[f"merged, {folder.name}"] = by_name(score_sources(one, config, settings, ocr))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder, scored by eval.py before")
    parser.add_argument(
        "--merged", type=Path, nargs="*", default=[], help="adapter folders of scripts/merge.py"
    )
    args, console = parser.parse_args(), Console()
    try:
        rows = score_all(args.run, args.merged)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    write_json(args.run / "summary.json", rows)
    console.print(comparison(rows))
    for picture in sorted((args.run / "pictures").glob("*.png")):
        console.print(f"picture: {picture}", soft_wrap=True)


if __name__ == "__main__":
    main()
