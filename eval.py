"""Score models: python eval.py --checkpoint MODEL [--checkpoint MODEL ...] [--like RUN] [key=value ...]

A MODEL is a run, a step folder, a PEFT adapter, a (merged) checkpoint, or ORG/MODEL of the hub. Models other than
runs take prompt and data sets from --like: a run, or a YAML file like a run's.

model -> data sets -> answers -> scores, routing and pictures:

    <run>/eval/<data set>.json         scores with standard errors, failures, prompt, versions
    <run>/eval/<data set>.jsonl        every question with its answer, score and gates
    <run>/eval/*.submission.json       the answers as the benchmark's own server takes them
    <run>/eval/routing.json            gates by task, mutual information, dead and duplicate experts;
                                       of a part of the data sets or samples: eval/partial/routing.json
    <run>/pictures/*.png               samples, gates by task and layer, losses

`torchrun --nproc_per_node N eval.py ...` shares the batches among N processes: the same results, sooner.
With other gates, or without the task, all but the last go to <run>/eval/<variant>/. Models other than runs
are written to <like>/others/<name>/ in the same way (runs/others/<name>/ for --like FILE.yaml). Several models,
and a run's `compare`d gates, end in one table.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console, Group, RenderableType
from rich.text import Text

from moa.checkpoint import versions
from moa.cli.settings import describe, expanded, load
from moa.config import RunConfig
from moa.evaluation.models import Subject, config_file, config_of, open_subject, subjects_of
from moa.evaluation.processes import ALONE, PeerError, Processes, join_processes
from moa.evaluation.report import (
    draw_pictures,
    routing_record,
    trained_tasks,
    write_results,
    write_routing,
)
from moa.evaluation.result import (
    Measured,
    Result,
    comparison,
    differences,
    measured,
    metrics_line,
    table,
)
from moa.evaluation.run import check_gates
from moa.evaluation.sources import EvalSettings, chosen_sources, kept_results, score_sources
from moa.model import MixtureModel

PARTIAL_GATES = " (not of all trained tasks and samples: weights=gates reads those of a full `eval.py` of the run)"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"settings:\n{describe(EvalSettings)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        action="append",
        required=True,
        type=expanded,
        metavar="MODEL",
        help="again for another",
    )
    parser.add_argument(
        "--like", type=expanded, help="run or YAML file whose prompt and data sets hold"
    )
    parser.add_argument("--config", help="YAML file of the settings below")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see the settings below")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    processes, found = join_processes(), dict[str, list[Measured]]()
    try:
        with processes:
            settings = load(EvalSettings, args.config, args.overrides)
            subjects = subjects_of(args.checkpoint)
            like = args.like or next((s.path for s in subjects if s.kind == "run"), None)
            check_settings(subjects, args.like, like, settings)
            for subject in subjects:
                found |= run_evaluation(subject, like, settings, processes)
    except PeerError as error:
        sys.exit(f"error: {error}")
    except (ValueError, OSError) as error:  # that of the first sample, or of the main process
        if processes.is_main:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if processes.is_main else 0)
    if len(found) > 1:
        Console().print(compared(found))


def check_settings(
    subjects: Sequence[Subject], given: str | None, like: str | None, settings: EvalSettings
) -> None:
    """ValueError for what any of the models cannot be asked, before the first of them is loaded."""
    if given is not None:
        config_file(given)
        if all(subject.kind == "run" for subject in subjects):
            raise ValueError(
                "--like: has no effect on a run, whose own config says how it is asked"
            )
    pick_device(settings.device, 0)
    for subject in subjects:
        config = config_of(subject, like)
        with named(subject):
            chosen_sources(config, settings)
            experts = [] if subject.kind == "checkpoint" else list(config.experts)
            for gates in ways_of(subject, config, settings):
                check_gates(gates, experts, config.router.granularity)


def ways_of(subject: Subject, config: RunConfig, settings: EvalSettings) -> list[str]:
    """The gates to score a model with: those asked for, and of a run those to compare with."""
    others = config.eval.compare if settings.compare is None else settings.compare
    return list(dict.fromkeys([settings.gates, *(others if subject.kind == "run" else ())]))


@contextmanager
def named(subject: Subject) -> Iterator[None]:
    """Inside, a user's mistake names the model."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{subject.label}: {error}") from error


def run_evaluation(
    subject: Subject, like: str | None, settings: EvalSettings, processes: Processes = ALONE
) -> dict[str, list[Measured]]:
    """Score, write, draw: the results by label, on the main process.

    ValueError or OSError for what a user can put right.
    """
    device = pick_device(settings.device, processes.local_rank)
    model, config, weights = open_subject(subject, like, device, other_base=settings.other_base)
    ways = ways_of(subject, config, settings)
    found = {}
    for gates in ways:
        chosen = replace(
            settings, gates=gates, num_pictures=settings.num_pictures * (gates == ways[0])
        )
        label = f"{subject.label}: {gates}" if len(ways) > 1 else subject.label
        run = subject.folder(like)
        with named(subject):
            kept = kept_of(subject, run, model, config, chosen) if settings.reuse else []
            left = names_left(chosen, config, kept)
            chosen = replace(chosen, only=left) if kept and left else chosen
            results = score_sources(model, config, chosen, processes=processes) if left else []
        if not processes.is_main:
            continue
        if kept:
            names = ", ".join(result.name for result in kept)
            Console().print(f"{label}: results of {names} are those in {run}/eval", soft_wrap=True)
        if results:
            show(subject, run, model, config, chosen, results, weights, label)
        found[label] = [*kept, *map(measured, results)]
    return found


def kept_of(
    subject: Subject, run: Path, model: MixtureModel, config: RunConfig, settings: EvalSettings
) -> list[Measured]:
    folder = run / "eval" / settings.variant
    return kept_results(model, config, settings, folder, subject.fingerprint())


def names_left(settings: EvalSettings, config: RunConfig, kept: Sequence[Measured]) -> list[str]:
    found = {result.name for result in kept}
    return [s.name for s in chosen_sources(config, settings) if s.name not in found]


def show(
    subject: Subject,
    run: Path,
    model: MixtureModel,
    config: RunConfig,
    settings: EvalSettings,
    results: Sequence[Result],
    weights: str,
    label: str,
) -> None:
    """Files, table and pictures of one model with one kind of gates."""
    console, folder = Console(), run / "eval" / settings.variant
    about = {
        "checkpoint": weights,
        "weights": subject.fingerprint(),
        "base": model.backbone.fingerprint,
        "versions": versions(),
    }
    write_results(folder, results, chosen_sources(config, settings), about)
    console.print(table(results, f"{label}: scores"))
    for line in (*notes(results), f"scores: {folder}/*.json"):
        console.print(line, soft_wrap=True, markup=False)
    routing = routing_record(model, config, results, trained_tasks(config, run))
    if routing is not None:
        full = subject.kind == "run" and settings.is_full and not routing["missing_tasks"]
        file = write_routing(folder, routing, full, about)
        console.print(
            f"gates: {file}" + ("" if full else PARTIAL_GATES), soft_wrap=True, markup=False
        )
    if settings.num_pictures:
        pictures = draw_pictures(
            run, settings.variant, model, results, routing, settings.num_pictures
        )
        console.print("pictures: " + " ".join(map(str, pictures)), soft_wrap=True, markup=False)


def notes(results: Sequence[Result]) -> Iterator[str]:
    """What a reader of the table would not guess."""
    for result in results:
        turns = sum(bool(p.sample.turns) for p in result.predictions)
        if turns:
            count = f"{turns} of {len(result.predictions)} samples"
            yield f"{result.name}: {count} are conversations, of which the first question alone is asked"


def compared(found: Mapping[str, Sequence[Measured]]) -> Group:
    """Scores of all models, and what the later ones gain on the questions of the first."""
    shown: list[RenderableType] = [
        comparison({label: {r.name: r.score for r in own} for label, own in found.items()}),
        Text(metrics_line([result for own in found.values() for result in own])),
    ]
    gained = differences({k: {r.name: r.rows for r in own} for k, own in found.items()})
    if any(gained.values()):
        title = f"Difference to {next(iter(found))} on the same questions ± standard error"
        shown.append(comparison(gained, title, sign="+"))
    return Group(*shown)


def pick_device(name: str, local_rank: int) -> str:
    """By default each process of a machine takes a GPU of its own, while there are some."""
    num_gpus = torch.cuda.device_count()
    if name == "auto":
        return f"cuda:{local_rank % num_gpus}" if num_gpus else "cpu"
    choices = [
        "cpu",
        "auto",
        *(["cuda"] if num_gpus else []),
        *(f"cuda:{i}" for i in range(num_gpus)),
    ]
    if name not in choices:
        raise ValueError(f"device: no {name!r} on this machine; choices: {', '.join(choices)}")
    return name


if __name__ == "__main__":
    main()
