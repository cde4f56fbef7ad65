"""Merge LoRA experts into ONE adapter that plain PEFT loads, or into a whole checkpoint.

    python scripts/merge.py method=linear adapters=[A,B] weights=[1,1] rank=sum out=OUT
    python scripts/merge.py run=runs/demo weights=gates rank=16 out=OUT
    python scripts/merge.py --config configs/merge/uniform.yaml adapters=[A,B] out=OUT merged=true
    python scripts/merge.py method=ties models=[A,B] base=BASE out=OUT
    python scripts/merge.py method=passthrough slices=[{model: A, layers: [0, 8]}, {model: B, layers: [4, 12]}] out=OUT
    python scripts/merge.py method=list

`models` are whole checkpoints of one base, merged tensor by tensor: see manifest.json in OUT.
Any set of PEFT LoRA folders of one base will do, whatever their ranks, alphas and rsLoRA flags. What
is written is reloaded in a fresh process with PEFT or transformers alone and compared with the live
mixture; OUT gets export_report.json, merge_report.json (what was kept, by expert, layer, site), and
fidelity.json and fidelity.html: which experts fight, where, and what was lost, in numbers and pictures.
"""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from moa.analysis.fidelity_page import write_page
from moa.backbones.open_clip import export_open_clip, is_open_clip, load_open_clip
from moa.benchmarks.learning import LEARNERS
from moa.build import open_backbone
from moa.merging.base_files import match_sites, read_base
from moa.merging.core import parse_rank
from moa.merging.export import (
    Verify,
    check_out,
    export_adapter,
    export_checkpoint,
    stored_dtype,
)
from moa.merging.fidelity import mean_cross_terms, measure
from moa.merging.full import Rules, merge_checkpoints
from moa.merging.inputs import (
    GATES,
    is_weights_file,
    local_base,
    parse_weights,
    read_gates,
    read_weights,
)
from moa.merging.merge import MergedSite, run_plan
from moa.merging.methods import METHODS, check_options, find_method
from moa.merging.passthrough import parse_slices, plan_stack, write_stack
from moa.merging.plan import Plan, SiteRule, Weights, all_shapes, make_plan, sum_gates
from moa.merging.probe import probe_of_noise, probe_of_run
from moa.merging.report import method_lines, report_lines, summary_tables
from moa.merging.source import Source, open_folders, open_run
from moa.merging.spool import open_spool
from moa.merging.summary import summarise
from moa.merging.verify import make_verify
from moa.settings import describe, load


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    method: str = "linear"  # `method=list` prints all, with their options and papers
    options: dict[str, Any] = field(default_factory=dict)  # of the method: options.scale=0.3
    adapters: list[str] = field(default_factory=list)  # PEFT folders; A/* means every one in A
    run: str | None = None  # instead of adapters: a run or step folder, whose experts are merged
    models: list[str] = field(default_factory=list)  # or whole checkpoints, with base=
    rules: Rules = field(default_factory=Rules)  # for keys that not all models have alike
    # other settings for some sites, the first match counts: [{match: mlp, method: ties, rank: 8}]
    sites: list[SiteRule] = field(default_factory=list)
    # method=passthrough: [{model: FOLDER, layers: [start, stop]}, ...], stacked into one checkpoint
    slices: list[dict[str, Any]] = field(default_factory=list)
    stack: str | None = (
        None  # path of these layers (model.layers), where a model has several stacks
    )
    # [1,1] as adapters, {NAME: 1}, gates, gates:TASK: the router's mean, or FILE.json of
    # scripts/learn_weights.py; null: the method's own
    weights: Any = None
    routing: str | None = None  # report that `gates` reads; null: the run's eval/routing.json
    rank: Any = "sum"  # of the result: a number, sum (exact), or energy:0.99 (the least that does)
    space: str | None = (
        None  # where the method works, null: its own; `method=list` prints the choices
    )
    out: str | None = None  # folder to write
    # trained projector for merged=true, such as PARTS/projector.safetensors of scripts/merge_parts.py
    projector: str | None = None
    merged: bool = False  # write a whole checkpoint with the base's keys instead of an adapter
    base: str | None = None  # base model; null: the one that run or adapters name
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: as the inputs
    max_shard_gb: float = 5.0  # largest file of a checkpoint
    verify: bool = True  # reload in a fresh process and compare
    num_probes: int = 4  # prompts in that comparison
    new_tokens: int = 8  # greedy tokens of each
    fidelity: bool = True  # write fidelity.json and fidelity.html

    def __post_init__(self) -> None:
        parse_rank(self.rank)
        for key, least in (("num_probes", 1), ("new_tokens", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}: must be {least} or more, got {getattr(self, key)}")


def main(argv: Sequence[str] | None = None) -> None:
    args, console = arguments(argv), Console()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        settings = load(MergeConfig, args.config, args.overrides)
        if settings.method == "list":
            return console.print(*all_lines(), sep="\n", highlight=False, soft_wrap=True)
        run_merge(settings, args.approximate, console)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run_merge(settings: MergeConfig, approximate: bool, console: Console) -> None:
    if settings.slices or settings.method == "passthrough":
        return stack_models(settings, console)
    if settings.method in LEARNERS:
        raise ValueError(
            f"method: {settings.method} learns from data: python scripts/learn_weights.py method={settings.method} "
            "run=RUN out=OUT; an adapter, or weights for this script, come out"
        )
    if settings.models:
        return merge_models(settings, console)
    find_method(settings.method, settings.space)
    check_options(settings.method, settings.options)
    if settings.out is None:
        raise ValueError("out: names no folder")
    check_out(settings.out)
    source = open_source(settings)
    console.print(*source.beside, sep="\n", soft_wrap=True)
    plan = plan_merge(settings, source, approximate)
    to_open_clip = is_open_clip(source.base_name(settings.base) or "")
    if to_open_clip:
        check_for_open_clip(settings)
    elif settings.merged or settings.verify:
        match_sites(all_shapes(source.experts), read_base(source.base(settings.base)))
    warn_of_factors(plan, console)
    kept = torch.float32 if settings.merged else stored_dtype(source.experts, settings.dtype)
    with open_spool(Path(settings.out).parent, kept) as spool:
        with merging_progress(len(plan.sites), console) as advance:
            merged = run_plan(plan, keep=spool.keep, on_site=advance)
        summary = summarise(source.experts, merged)
        console.print(*summary_tables(summary), sep="\n")
        if to_open_clip and settings.merged:
            return merge_into_open_clip(settings, source, merged, summary, console)
        exact = summary["total"]["energy_kept"] > 1 - 1e-12
        verify = (
            prepare_verify(settings, source, sum_gates(plan), exact) if settings.verify else None
        )
        report = export(settings, source, merged, summary, verify)
    console.print(*report_lines(report, Path(settings.out)), sep="\n", soft_wrap=True)


def all_lines() -> Iterator[str]:
    """Every method: of this script, from data, and of layers."""
    yield from method_lines()
    yield "\nfrom a little data, by scripts/learn_weights.py:"
    for name, learner in LEARNERS.items():
        yield f"    {name}: {learner.paper}"
    yield "\nlayers of whole checkpoints, one slice on the other:"
    yield "    passthrough: slices=[{model: A, layers: [0, 8]}, ...]; mergekit's passthrough, depth up-scaling"


def warn_of_factors(plan: Plan, console: Console) -> None:
    """What merging A and B apart does by definition, and how large it is here."""
    jobs = [job for job in plan.jobs if job.space == "factor"]
    if not jobs:
        return
    line = "A and B are merged apart, so the result depends on how each expert is factored"
    sums = {site: row for job in jobs if not job.method.joint for site, row in job.weights.items()}
    if sums:
        ratio = mean_cross_terms(jobs[0].experts, sums)
        line += f", and holds {ratio:.1f} times the wanted update in products of one expert's B with another's A"
    console.print(f"warning: {line}; space=core, where a method has it, does not", soft_wrap=True)


def merge_models(settings: MergeConfig, console: Console) -> None:
    """Whole checkpoints instead of adapters."""
    if settings.adapters or settings.run:
        raise ValueError("models: whole checkpoints are merged alone, without adapters or run")
    for key in ("out", "base"):
        if getattr(settings, key) is None:
            raise ValueError(f"{key}: names no folder")
    folders = {Path(name).resolve().name: local_base(name) for name in settings.models}
    if len(folders) < len(settings.models):
        raise ValueError("models: two folders have one name; rename one")
    base = local_base(str(settings.base))
    with merging_progress(len(read_base(base).files), console) as advance:
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
    if settings.method != "passthrough" or settings.adapters or settings.run or settings.models:
        raise ValueError("slices: go with method=passthrough, without adapters, run or models")
    if settings.out is None:
        raise ValueError("out: names no folder")
    slices = [
        replace(part, model=str(local_base(part.model))) for part in parse_slices(settings.slices)
    ]
    stacked = plan_stack(slices, settings.stack)
    with merging_progress(len(stacked.origins), console) as advance:
        manifest = write_stack(
            settings.out, stacked, max_shard_gb=settings.max_shard_gb, on_key=advance
        )
    console.print(f"{len(manifest)} tensors stacked; checkpoint: {settings.out}", soft_wrap=True)


@contextmanager
def merging_progress(total: int, console: Console) -> Iterator[Callable[[str], None]]:
    columns = (TextColumn("merging"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
        bar = progress.add_task("", total=total)
        yield lambda name: progress.update(bar, advance=1, description=name)


def open_source(settings: MergeConfig) -> Source:
    """The experts of `adapters`, or of `run` with what else it trained."""
    if bool(settings.adapters) == bool(settings.run):
        raise ValueError("adapters, run: give one of the two")
    if settings.run is None:
        if settings.projector is not None and not settings.merged:
            raise ValueError("projector: no LoRA adapter can hold it; use merged=true")
        return open_folders(settings.adapters, settings.projector)
    if settings.projector is not None:
        raise ValueError("projector: a run brings its own; name its experts by adapters=")
    source = open_run(settings.run)
    if source.projector and not settings.merged:
        raise ValueError(
            f"run: {settings.run} trained its projector, which no LoRA adapter can hold; use "
            "merged=true, or name its experts by adapters="
        )
    return source


def plan_merge(settings: MergeConfig, source: Source, approximate: bool) -> Plan:
    names = [expert.name for expert in source.experts]
    return make_plan(
        source.experts,
        method=settings.method,
        options=settings.options,
        weights=choose_weights(settings, source, approximate),
        rank=settings.rank,
        space=settings.space,
        rules=[
            replace(rule, weights=parse_weights(rule.weights, names)) for rule in settings.sites
        ],
    )


def choose_weights(settings: MergeConfig, source: Source, approximate: bool) -> Weights | None:
    """The weights asked for; a token-level mixture has none, so it needs --approximate."""
    raw = settings.weights
    by_gates = isinstance(raw, str) and raw.partition(":")[0] == GATES
    token_level = source.config is not None and source.config.router.granularity == "token"
    if token_level and (by_gates or settings.run) and not approximate:
        raise ValueError(
            "run: its router gates every token by itself, and no single adapter equals that; "
            "--approximate merges with the mean gates and reports the error"
        )
    if is_weights_file(raw):
        return read_weights(raw, source.experts)
    if not by_gates:
        return parse_weights(raw, [expert.name for expert in source.experts])
    if settings.routing is None and source.step is None:
        raise ValueError("weights: gates need run=, or routing= with a report of eval.py")
    default = source.step and source.step.parents[1] / "eval" / "routing.json"
    task = raw.partition(":")[2] or None
    return read_gates(settings.routing or str(default), source.experts, task)


def check_for_open_clip(settings: MergeConfig) -> None:
    """open_clip's packed attention has no place for an adapter in a plain environment."""
    if not settings.merged and settings.verify:
        raise ValueError(
            "verify: plain PEFT cannot put an adapter into open_clip's packed attention; use "
            "merged=true for a checkpoint that open_clip loads, or verify=false for an adapter that "
            "this project loads"
        )
    if settings.dtype not in ("auto", "float32"):
        raise ValueError(
            f"dtype: an open_clip checkpoint is written in float32, not {settings.dtype}"
        )


def merge_into_open_clip(
    settings: MergeConfig,
    source: Source,
    merged: Mapping[str, MergedSite],
    summary: dict[str, Any],
    console: Console,
) -> None:
    """The folder that plain open_clip loads, checked against the base with the update added."""
    backbone = load_open_clip(str(source.base_name(settings.base)))
    deltas = {site: result.lora_b @ result.lora_a for site, result in merged.items()}
    found = export_open_clip(str(settings.out), backbone, deltas, {"merge": summary["total"]})
    console.print(f"checkpoint: {settings.out}, for open_clip local-dir:{settings.out}; reloaded "
                  f"features differ by {found['max_abs_difference']:.1e}", soft_wrap=True)  # fmt: skip


def prepare_verify(
    settings: MergeConfig,
    source: Source,
    gates: dict[str, Tensor] | None,
    exact: bool,
) -> Verify:
    """The probe and the live models that the reloaded files are compared with."""
    base = source.base(settings.base)
    backbone = open_backbone(str(base))
    routed, inputs = None, None
    if source.config is not None and source.step is not None:
        inputs, routed = probe_of_run(
            source.step, source.config, settings.num_probes, settings.new_tokens
        )
    if inputs is None:
        inputs = probe_of_noise(backbone, settings.num_probes)
    with torch.no_grad():
        for name, tensor in source.projector.items():
            backbone.model.get_parameter(name).copy_(tensor)
    return make_verify(
        backbone.model,
        inputs,
        experts=source.experts,
        base=base,
        gates=gates,
        exact=exact,
        routed=routed,
        stream_of=backbone.stream_of,
        owners=backbone.owners_of(inputs),
        new_tokens=settings.new_tokens,
    )


def export(
    settings: MergeConfig,
    source: Source,
    merged: dict[str, MergedSite],
    summary: dict[str, Any],
    verify: Verify | None,
) -> dict[str, Any]:
    if settings.out is None:  # checked before the merge
        raise AssertionError
    about = {
        "method": settings.method,
        "options": check_options(settings.method, settings.options),
        "sites": [asdict(rule) for rule in settings.sites],
        "space": settings.space or METHODS[settings.method].spaces[0],
        "rank": settings.rank,
        "adapters": settings.adapters or settings.run,
        "beside": source.beside,
        "kept": summary["total"],
    }
    files: dict[str, Any] = {"merge_report.json": {**about, **summary}}
    if settings.fidelity:
        record = measure(source.experts, merged)
        shown = {key: value for key, value in about.items() if key != "kept"}
        files["fidelity.json"] = {**shown, **record}
        files["fidelity.html"] = lambda path: write_page(path, record, shown)
    shared: dict[str, Any] = {
        "dtype": settings.dtype,
        "report": {"merge": about},
        "files": files,
        "verify": verify,
    }
    if not settings.merged:
        base = settings.base or (source.config.model.name if source.config else None)
        return export_adapter(settings.out, merged, source.experts, base=base, **shared)
    return export_checkpoint(
        settings.out,
        merged,
        source.experts,
        base=source.base(settings.base),
        max_shard_gb=settings.max_shard_gb,
        processor=source.step and source.step / "processor",
        replaced=source.projector,
        **shared,
    )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"settings:\n{describe(MergeConfig)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="YAML file of the settings below")
    parser.add_argument(
        "--approximate",
        action="store_true",
        help="merge a run whose router gates every token, which no single adapter equals",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see the settings below")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    main()
