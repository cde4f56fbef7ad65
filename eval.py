"""Score a trained run: python eval.py --checkpoint RUN [--config FILE] [key=value ...]

checkpoint -> model -> data sets -> answers -> scores, routing and pictures, all into the run folder:

    <run>/eval/<data set>.json         scores with standard errors, failures, prompt, versions
    <run>/eval/<data set>.jsonl        every question with its answer, score and gates
    <run>/eval/routing.json            gates by task, mutual information, dead and duplicate experts
    <run>/pictures/*.png               samples, gates by task and layer, losses

With other gates, or without the task, the first three go to <run>/eval/<variant>/.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from moa.benchmarks.report import draw_pictures, routing_record, write_results
from moa.benchmarks.result import table
from moa.benchmarks.sources import EvalSettings, chosen_sources, score_sources
from moa.checkpoint import load_model, step_folder, versions
from moa.settings import describe, load


def run_folder(checkpoint: str | Path) -> Path:
    """The run that a run folder or one of its step folders belongs to."""
    step = step_folder(checkpoint)
    return step.parent.parent if step.parent.name == "checkpoints" else step


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"settings:\n{describe(EvalSettings)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", required=True, help="run folder, or one of its step folders"
    )
    parser.add_argument("--config", help="YAML file of the settings below")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see the settings below")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    try:
        run_evaluation(args.checkpoint, load(EvalSettings, args.config, args.overrides))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def run_evaluation(checkpoint: str, settings: EvalSettings) -> None:
    """Score, write, draw; ValueError or OSError for what a user can put right."""
    step, run, console = step_folder(checkpoint), run_folder(checkpoint), Console()
    model, _, config = load_model(step, pick_device(settings.device))
    results = score_sources(model, config, settings)
    routing = routing_record(model, config, results)
    about = {"checkpoint": str(step), "versions": versions()}
    folder = run / "eval" / settings.variant
    write_results(folder, results, routing, chosen_sources(config, settings), about)
    console.print(table(results))
    console.print(f"scores: {folder}/*.json", soft_wrap=True)
    if settings.num_pictures:
        pictures = draw_pictures(
            run, settings.variant, model, results, routing, settings.num_pictures
        )
        console.print("pictures: " + " ".join(map(str, pictures)), soft_wrap=True)


def pick_device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
