"""Merge LoRA experts into ONE adapter that plain PEFT loads, or into a whole checkpoint.

    python -m scripts.merge method=linear adapters=[A,B] weights=[1,1] rank=sum out=OUT
    python -m scripts.merge run=runs/demo weights=gates rank=16 out=OUT
    python -m scripts.merge --config configs/merge/uniform.yaml adapters=[A,B] out=OUT merged=true
    python -m scripts.merge method=ties models=[A,B] base=BASE out=OUT
    python -m scripts.merge method=passthrough slices=[{model: A, layers: [0, 8]}, {model: B, layers: [4, 12]}] out=OUT
    python -m scripts.merge method=list

`models` are whole checkpoints of one base, merged tensor by tensor: see manifest.json in OUT.
Any set of PEFT LoRA folders of one base will do, whatever their ranks, alphas and rsLoRA flags. What
is written is reloaded in a fresh process with PEFT or transformers alone and compared with the live
mixture; OUT gets export_report.json, merge_report.json (what was kept, by expert, layer, site), and
fidelity.json and fidelity.html: which experts fight, where, and what was lost, in numbers and pictures.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from moa.cli.command import mistakes_in_one_line, progress_bar, settings_parser
from moa.cli.settings import load
from moa.files.checkpoint_files import read_base
from moa.merging.checkpoints.full import merge_checkpoints
from moa.merging.checkpoints.passthrough import parse_slices, plan_stack, write_stack
from moa.merging.inputs import local_base, parse_weights
from moa.merging.learn.table import LEARNERS
from moa.merging.report.tables import method_lines
from moa.merging.run import merge_adapters
from moa.merging.settings import MergeConfig


def main(argv: Sequence[str] | None = None) -> None:
    parser = settings_parser(MergeConfig, __doc__)
    parser.add_argument(
        "--approximate",
        action="store_true",
        help="merge a run whose router gates every token, which no single adapter equals",
    )
    args = parser.parse_intermixed_args(argv)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with mistakes_in_one_line():
        merge(load(MergeConfig, args.config, args.overrides), args.approximate, Console())


def merge(settings: MergeConfig, approximate: bool, console: Console) -> None:
    if settings.method == "list":
        console.print(*all_lines(), sep="\n", highlight=False, soft_wrap=True)
    elif settings.slices or settings.method == "passthrough":
        stack_models(settings, console)
    elif settings.method in LEARNERS:
        raise ValueError(
            f"method: {settings.method} learns from data: python -m scripts.learn_weights method={settings.method} "
            "run=RUN out=OUT; an adapter, or weights for this script, come out"
        )
    elif settings.models:
        merge_models(settings, console)
    else:
        merge_adapters(settings, approximate, console)


def all_lines() -> Iterator[str]:
    """Every method: of this script, from data, and of layers."""
    yield from method_lines()
    yield "\nfrom a little data, by scripts.learn_weights:"
    for name, learner in LEARNERS.items():
        yield f"    {name}: {learner.paper}"
    yield "\nlayers of whole checkpoints, one slice on the other:"
    yield "    passthrough: slices=[{model: A, layers: [0, 8]}, ...]; mergekit's passthrough, depth up-scaling"


def merge_models(settings: MergeConfig, console: Console) -> None:
    """Whole checkpoints instead of adapters."""
    for key in ("out", "base"):
        if getattr(settings, key) is None:
            raise ValueError(f"{key}: names no folder")
    folders = {Path(name).resolve().name: local_base(name, "models") for name in settings.models}
    if len(folders) < len(settings.models):
        raise ValueError("models: two folders have one name; rename one")
    base = local_base(str(settings.base))
    with progress_bar("merging", len(read_base(base).files), console) as advance:
        manifest = merge_checkpoints(
            str(settings.out),
            folders,
            base,
            method=settings.method,
            options=settings.options,
            weights=parse_weights(settings.weights, list(folders)),
            rules=settings.rules,
            dtype=settings.dtype,
            max_shard_gb=settings.max_shard_gb,
            on_key=advance,
        )
    for rule, count in Counter(line["rule"] for line in manifest.values()).items():
        console.print(f"{count} tensors: {rule}")
    console.print(f"checkpoint: {settings.out}", soft_wrap=True)


def stack_models(settings: MergeConfig, console: Console) -> None:
    """Layers of whole checkpoints, one slice on the other."""
    if settings.method != "passthrough":
        raise ValueError(f"slices: are stacked by method=passthrough, not {settings.method}")
    if settings.out is None:
        raise ValueError("out: names no folder")
    slices = [
        replace(part, model=str(local_base(part.model, "slices")))
        for part in parse_slices(settings.slices)
    ]
    stacked = plan_stack(slices, settings.stack)
    with progress_bar("merging", len(stacked.origins), console) as advance:
        manifest = write_stack(
            settings.out, stacked, max_shard_gb=settings.max_shard_gb, on_key=advance
        )
    console.print(f"{len(manifest)} tensors stacked; checkpoint: {settings.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
