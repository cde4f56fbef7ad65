"""Merge LoRA experts into ONE adapter that plain PEFT loads, or into a whole checkpoint.

    python -m scripts.merge method=linear adapters=[A,B] weights=[1,1] rank=sum out=OUT
    python -m scripts.merge run=runs/demo weights=gates rank=16 out=OUT
    python -m scripts.merge --config configs/merge/uniform.yaml adapters=[A,B] out=OUT merged=true
    python -m scripts.merge method=ties models=[A,B] base=BASE out=OUT
    python -m scripts.merge "slices=[{model: A, layers: [0, 8]}, {model: B, layers: [4, 12]}]" out=OUT
    python -m scripts.merge method=list

`models` are whole checkpoints of one base, merged tensor by tensor: see manifest.json in OUT. Experts are any PEFT LoRA
folders of one base, whatever their ranks, alphas and rsLoRA flags. The result is loaded in a fresh process by PEFT or
transformers alone and compared with the live mixture. OUT gets export_report.json, merge_report.json (what was kept, by
expert, layer, site), and fidelity.json and fidelity.html: which experts conflict, where, and what was lost.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from moa.cli.command import mistakes_in_one_line, progress_bar, settings_parser
from moa.cli.settings import describe
from moa.merging.learn.learners import LEARNERS
from moa.merging.methods.method import SPACES
from moa.merging.methods.table import METHODS
from moa.merging.settings import MergeExperts, MergeModels, StackLayers, load_command

SETTINGS = {"adapters= or run=": MergeExperts, "models=": MergeModels, "slices=": StackLayers}
DEFAULT_WEIGHTS = {"mean": "1/N each", "ones": "1 each"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = settings_parser(MergeExperts, __doc__)
    parser.epilog = "\n\n".join(f"settings with {inputs}:\n{describe(cls)}" for inputs, cls in SETTINGS.items())
    args = parser.parse_intermixed_args(argv)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with mistakes_in_one_line():
        merge(load_command(args.config, args.overrides), Console())


def merge(settings: Any, console: Console) -> None:
    if settings.method == "list":
        if settings != MergeExperts(method="list"):
            raise ValueError("method=list: prints the methods and does nothing else; leave the other settings out")
        console.print(*all_lines(), sep="\n", highlight=False, soft_wrap=True)
    elif settings.method in LEARNERS and settings.method not in METHODS:
        raise ValueError(
            f"method: {settings.method} learns from data: python -m scripts.learn_weights method={settings.method} "
            "run=RUN out=OUT writes an adapter, or weights for this script"
        )
    elif isinstance(settings, StackLayers):
        stack_layers(settings, console)
    elif isinstance(settings, MergeModels):
        merge_models(settings, console)
    else:
        from moa.merging.run import merge_experts

        merge_experts(settings, console)


def all_lines() -> Iterator[str]:
    """Every method: of this script, from data, and of layers."""
    for name, row in METHODS.items():
        options = ", ".join(f"options.{key}={value}" for key, value in row.options.items())
        yield f"{name}: {row.about}"
        yield f"    options: {options or 'none'}; weights default to {DEFAULT_WEIGHTS[row.weights]}"
        needs = "; needs the statistics of scripts.statistics" if row.reads_inputs else ""
        yield f"    space: {', '.join(row.spaces)}; {row.paper}{needs}"
    yield "\nspaces:"
    yield from (f"    {name}: {text}" for name, text in SPACES.items())
    yield "\nfrom a little data, by scripts.learn_weights:"
    yield from (f"    {name}: {learner.paper}" for name, learner in LEARNERS.items())
    yield "\nlayers of whole checkpoints, one slice on the other:"
    yield '    passthrough: "slices=[{model: A, layers: [0, 8]}, ...]"; mergekit\'s passthrough, depth up-scaling'


def merge_models(settings: MergeModels, console: Console) -> None:
    from moa.files.checkpoint_files import local_base, read_base
    from moa.merging.checkpoints.full import merge_checkpoints
    from moa.merging.weights import parse_weights

    if settings.out is None or settings.base is None:
        raise ValueError(f"{'out' if settings.out is None else 'base'}: names no folder")
    folders = {Path(name).resolve().name: local_base(name, "models") for name in settings.models}
    if len(folders) < len(settings.models):
        raise ValueError("models: two folders have one name; rename one")
    base = local_base(settings.base)
    with progress_bar("merging", len(read_base(base).files), console) as advance:
        names = ("method", "options", "rules", "dtype", "max_shard_gb")
        own: dict[str, Any] = {name: getattr(settings, name) for name in names}
        own["weights"] = parse_weights(settings.weights, list(folders))
        manifest = merge_checkpoints(settings.out, folders, base, on_key=advance, **own)
    for rule, count in Counter(line["rule"] for line in manifest.values()).items():
        console.print(f"{count} tensors: {rule}")
    console.print(f"checkpoint: {settings.out}", soft_wrap=True)


def stack_layers(settings: StackLayers, console: Console) -> None:
    from moa.files.checkpoint_files import local_base
    from moa.merging.checkpoints.passthrough import plan_stack, write_stack

    if settings.out is None:
        raise ValueError("out: names no folder")
    slices = [replace(s, model=str(local_base(s.model, "slices"))) for s in settings.slices]
    stacked = plan_stack(slices, settings.stack)
    with progress_bar("merging", len(stacked.origins), console) as advance:
        size = settings.max_shard_gb
        manifest = write_stack(settings.out, stacked, max_shard_gb=size, on_key=advance)
    console.print(f"{len(manifest)} tensors stacked; checkpoint: {settings.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
