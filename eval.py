"""Score models: python eval.py run=RUN [models=[MODEL, ...]] [like=RUN] [eval.key=value ...]

A MODEL is a run, a step folder, a PEFT adapter, a (merged) checkpoint, or ORG/MODEL of the hub. A model that
is not a run gets its prompt and data sets from `like`: a run, or a YAML file like a run's.

model -> data sets -> answers -> scores, routing and images:

    <run>/eval/<data set>.json         scores with standard errors, failures, prompt, versions
    <run>/eval/<data set>.jsonl        every question with its answer, score and gates
    <run>/eval/*.submission.json       the answers as the benchmark's own server takes them
    <run>/eval/routing.json            gates by task, mutual information, dead and duplicate experts;
                                       of a part of the data sets or samples: eval/partial/routing.json
    <run>/pictures/*.png               samples, gates by task and layer, losses
    <run>/report.html                  all of it on one page, as scripts.report writes it

`torchrun --nproc_per_node N eval.py ...` shares the batches among N processes: the same results, sooner.
With other gates, or without the task, results go to <run>/eval/<variant>/. Results of models that are not runs
go to <like>/others/<name>/ (runs/others/<name>/ for like=FILE.yaml). Several models, and gates in the run's
eval.compare, end in one table.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console

from moa.cli.command import settings_parser
from moa.evaluation.settings import EvalCommand, chosen_sources, read_command, variant_of, with_eval

if TYPE_CHECKING:  # torch is loaded once the command line is read
    from moa.evaluation.models import EvaluatedModel
    from moa.evaluation.processes import Processes
    from moa.evaluation.result import Measured


def main(argv: Sequence[str] | None = None) -> None:
    args = settings_parser(EvalCommand, __doc__).parse_intermixed_args(argv)
    from moa.evaluation.models import models_of
    from moa.evaluation.processes import join_processes, one_error_of_all
    from moa.evaluation.result import compared

    tables: dict[str, list[Measured]] = {}
    processes = join_processes()
    with one_error_of_all(processes), processes:
        command, overrides = read_command(args.config, args.overrides)
        for model in models_of(command, overrides):
            tables |= evaluate_model(model, command, processes)
    if len(tables) > 1:
        Console().print(compared(tables))


def evaluate_model(
    model: "EvaluatedModel", command: EvalCommand, processes: "Processes"
) -> "dict[str, list[Measured]]":
    """Score, write and draw with each kind of gates: the results by label, on the main process."""
    from moa.evaluation.models import open_model, pick_device
    from moa.evaluation.report import report
    from moa.evaluation.result import measured
    from moa.evaluation.sources import kept_results, score_sources

    network = open_model(model, pick_device(command.device, processes.local_rank))
    tables = {}
    for number, gates in enumerate(model.gate_rules):
        config = with_eval(model.config, gates=gates)
        if number:
            config = with_eval(config, num_images=0)
        folder = model.folder / "eval" / variant_of(config.eval)
        label = f"{model.label}: {gates}" if len(model.gate_rules) > 1 else model.label
        with model.named():
            kept: list[Measured] = []
            if command.reuse:
                kept = kept_results(network, config, folder, model.fingerprint())
            done = {result.name for result in kept}
            left = [source.name for source in chosen_sources(config) if source.name not in done]
            config = with_eval(config, only=left) if kept and left else config
            score = partial(score_sources, progress=command.progress, processes=processes)
            results = score(network, config) if left else []
        if not processes.is_main:
            continue
        if kept:
            names = ", ".join(result.name for result in kept)
            Console().print(f"{label}: results of {names} are those in {folder}", soft_wrap=True)
        if results:
            report(model, network, config, results, label, full=model.is_full and not kept)
        tables[label] = [*kept, *(measured(result.record(), result.rows()) for result in results)]
    if processes.is_main and model.kind == "run" and model.config.eval.num_images:
        from moa.evaluation.run_page import write_run_page

        Console().print(f"page: {write_run_page(model.folder)[0]}", soft_wrap=True)
    return tables


if __name__ == "__main__":
    main()
