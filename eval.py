"""Score models: python eval.py --checkpoint MODEL [--checkpoint MODEL ...] [--like RUN] [key=value ...]

A MODEL is a run, a step folder, a PEFT adapter, a (merged) checkpoint, or ORG/MODEL of the hub. Those that are
no runs are asked and scored as --like says: a run, or a YAML file like a run's.

model -> data sets -> answers -> scores, routing and pictures:

    <run>/eval/<data set>.json         scores with standard errors, failures, prompt, versions
    <run>/eval/<data set>.jsonl        every question with its answer, score and gates
    <run>/eval/*.submission.json       the answers as the benchmark's own server takes them
    <run>/eval/routing.json            gates by task, mutual information, dead and duplicate experts
    <run>/pictures/*.png               samples, gates by task and layer, losses

`torchrun --nproc_per_node N eval.py ...` shares the batches among N processes: the same results, sooner.
With other gates, or without the task, all but the last go to <run>/eval/<variant>/. What is no run is written to
<like>/others/<name>/ in the same way. Several models, and a run's `compare`d gates, end in one table.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moa.benchmarks.report import draw_pictures, routing_record, write_results
from moa.benchmarks.result import Result, comparison, table
from moa.benchmarks.run import check_gates
from moa.benchmarks.sources import EvalSettings, chosen_sources, score_sources
from moa.benchmarks.subjects import Subject, open_subject, subjects_of
from moa.checkpoint import versions
from moa.config import RunConfig
from moa.model import MixtureModel
from moa.processes import ALONE, PeerError, Processes, join_processes
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
    processes, rows = join_processes(), dict[str, dict[str, Any]]()
    try:
        with processes:
            settings = load(EvalSettings, args.config, args.overrides)
            subjects = subjects_of(args.checkpoint)
            like = args.like or next((s.path for s in subjects if s.kind == "run"), None)
            for subject in subjects:
                rows |= run_evaluation(subject, like, settings, processes)
    except PeerError as error:
        sys.exit(f"error: {error}")
    except (ValueError, OSError) as error:  # that of the first sample, or of the main process
        sys.exit(f"error: {error}" if processes.is_main else 0)
    if len(rows) > 1:
        Console().print(comparison(rows))


def run_evaluation(
    subject: Subject, like: str | None, settings: EvalSettings, processes: Processes = ALONE
) -> dict[str, dict[str, Any]]:
    """Score, write, draw: the scores by label, on the main process.

    ValueError or OSError for what a user can put right.
    """
    device = pick_device(settings.device, processes.local_rank)
    model, config, weights = open_subject(subject, like, device)
    others = config.eval.compare if settings.compare is None else settings.compare
    ways = [settings.gates, *(others if subject.kind == "run" else ())]
    for gates in ways:
        check_gates(gates, model)
    scores = {}
    for gates in dict.fromkeys(ways):
        chosen = replace(
            settings, gates=gates, num_pictures=settings.num_pictures * (gates == ways[0])
        )
        results = score_sources(model, config, chosen, processes=processes)
        if not processes.is_main:
            continue
        show(subject.folder(like), model, config, chosen, results, weights)
        label = f"{subject.label}: {gates}" if len(ways) > 1 else subject.label
        scores[label] = {result.name: result.score for result in results}
    return scores


def show(
    run: Path,
    model: MixtureModel,
    config: RunConfig,
    settings: EvalSettings,
    results: Sequence[Result],
    weights: str,
) -> None:
    """Files, table and pictures of one model with one kind of gates."""
    console, folder = Console(), run / "eval" / settings.variant
    routing = routing_record(model, config, results)
    about = {"checkpoint": weights, "versions": versions()}
    write_results(folder, results, routing, chosen_sources(config, settings), about)
    console.print(table(results))
    console.print(f"scores: {folder}/*.json", soft_wrap=True)
    if settings.num_pictures:
        pictures = draw_pictures(
            run, settings.variant, model, results, routing, settings.num_pictures
        )
        console.print("pictures: " + " ".join(map(str, pictures)), soft_wrap=True)


def pick_device(name: str, local_rank: int) -> str:
    """By default each process of a machine takes a GPU of its own, while there are some."""
    if name != "auto":
        return name
    num_gpus = torch.cuda.device_count()
    return f"cuda:{local_rank % num_gpus}" if num_gpus else "cpu"


if __name__ == "__main__":
    main()
