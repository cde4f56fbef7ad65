"""Score models: python eval.py --checkpoint MODEL [--checkpoint MODEL ...] [--like RUN] [key=value ...]

A MODEL is a run, a step folder, a PEFT adapter, a (merged) checkpoint, or ORG/MODEL of the hub. Those that are
no runs are asked and scored as --like says: a run, or a YAML file like a run's.

model -> data sets -> answers -> scores, routing and pictures:

    <run>/eval/<data set>.json         scores with standard errors, failures, prompt, versions
    <run>/eval/<data set>.jsonl        every question with its answer, score and gates
    <run>/eval/*.submission.json       the answers as the benchmark's own server takes them
    <run>/eval/routing.json            gates by task, mutual information, dead and duplicate experts
    <run>/pictures/*.png               samples, gates by task and layer, losses

With other gates, or without the task, all but the last go to <run>/eval/<variant>/. What is no run is written to
<like>/others/<name>/ in the same way. Several models end in one table.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from moa.benchmarks.report import draw_pictures, routing_record, write_results
from moa.benchmarks.result import comparison, table
from moa.benchmarks.sources import EvalSettings, chosen_sources, score_sources
from moa.benchmarks.subjects import Subject, open_subject, subjects_of
from moa.checkpoint import versions
from moa.settings import describe, load


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"settings:\n{describe(EvalSettings)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", action="append", required=True, metavar="MODEL", help="again for another"
    )
    parser.add_argument("--like", help="run or YAML file whose prompt and data sets hold")
    parser.add_argument("--config", help="YAML file of the settings below")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see the settings below")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    try:
        settings = load(EvalSettings, args.config, args.overrides)
        subjects = subjects_of(args.checkpoint)
        like = args.like or next((s.path for s in subjects if s.kind == "run"), None)
        rows = {s.label: run_evaluation(s, like, settings) for s in subjects}
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if len(rows) > 1:
        Console().print(comparison(rows))


def run_evaluation(subject: Subject, like: str | None, settings: EvalSettings) -> dict[str, Any]:
    """Score, write, draw; ValueError or OSError for what a user can put right."""
    console = Console()
    model, config, weights = open_subject(subject, like, pick_device(settings.device))
    results = score_sources(model, config, settings)
    routing = routing_record(model, config, results)
    about = {"checkpoint": weights, "versions": versions()}
    run = subject.folder(like)
    folder = run / "eval" / settings.variant
    write_results(folder, results, routing, chosen_sources(config, settings), about)
    console.print(table(results))
    console.print(f"scores: {folder}/*.json", soft_wrap=True)
    if settings.num_pictures:
        pictures = draw_pictures(
            run, settings.variant, model, results, routing, settings.num_pictures
        )
        console.print("pictures: " + " ".join(map(str, pictures)), soft_wrap=True)
    return {result.name: result.score for result in results}


def pick_device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
