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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from data.sources import make_collator, open_ocr, open_sources
from moa.analysis.fidelity_page import write_page
from moa.backbones.llava import load_backbone
from moa.checkpoint import load_model, load_tensors, step_folder
from moa.config import RunConfig, load_config
from moa.merging.base_files import match_sites, read_base
from moa.merging.core import Expert, parse_rank
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
    open_adapters,
    parse_weights,
    read_gates,
    read_weights,
)
from moa.merging.merge import MergedSite, run_plan
from moa.merging.methods import METHODS, check_options, find_method
from moa.merging.parts import read_parts, sort_parts
from moa.merging.passthrough import parse_slices, plan_stack, write_stack
from moa.merging.plan import Plan, SiteRule, Weights, all_shapes, make_plan, sum_gates
from moa.merging.probe import Outputs, probe_inputs, routed_outputs
from moa.merging.report import method_lines, report_lines, summary_tables
from moa.merging.spool import open_spool
from moa.merging.summary import summarise
from moa.merging.verify import make_verify
from moa.settings import describe, load

QUESTIONS = (
    "What is this?",
    "What is on the left?",
    "Describe the picture.",
    "How many are there?",
)


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


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is merged, and, where it comes from a run, that run's step folder and config."""

    experts: list[Expert]
    step: Path | None = None
    config: RunConfig | None = None
    projector: dict[str, Tensor] = field(default_factory=dict)  # trained; empty: the base's own
    beside: list[str] = field(default_factory=list)  # what the runs trained beside these experts


def main(argv: Sequence[str] | None = None) -> None:
    args, console = arguments(argv), Console()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        settings = load(MergeConfig, args.config, args.overrides)
        if settings.method == "list":
            return console.print(*method_lines(), sep="\n", highlight=False, soft_wrap=True)
        run_merge(settings, args.approximate, console)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run_merge(settings: MergeConfig, approximate: bool, console: Console) -> None:
    if settings.slices or settings.method == "passthrough":
        return stack_models(settings, console)
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
    if settings.merged or settings.verify:
        match_sites(all_shapes(source.experts), read_base(base_of(settings, source)))
    warn_of_factors(plan, console)
    kept = torch.float32 if settings.merged else stored_dtype(source.experts, settings.dtype)
    with open_spool(Path(settings.out).parent, kept) as spool:
        with merging_progress(len(plan.sites), console) as advance:
            merged = run_plan(plan, keep=spool.keep, on_site=advance)
        summary = summarise(source.experts, merged)
        console.print(*summary_tables(summary), sep="\n")
        exact = summary["total"]["energy_kept"] > 1 - 1e-12
        verify = (
            prepare_verify(settings, source, sum_gates(plan), exact) if settings.verify else None
        )
        report = export(settings, source, merged, summary, verify)
    console.print(*report_lines(report, Path(settings.out)), sep="\n", soft_wrap=True)


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
        return open_folders(settings)
    if settings.projector is not None:
        raise ValueError("projector: a run brings its own; name its experts by adapters=")
    step = step_folder(settings.run)
    config = load_config(step / "config.yaml")
    projector = {}
    if config.model.train_projector:
        projector = load_tensors(step / "projector.safetensors")
        if not settings.merged:
            raise ValueError(
                f"run: {settings.run} trained its projector, which no LoRA adapter can hold; use "
                "merged=true, or name its experts by adapters="
            )
    experts = open_adapters([str(step / "experts" / name) for name in config.experts])
    return Source(experts=experts, step=step, config=config, projector=projector)


def open_folders(settings: MergeConfig) -> Source:
    """The experts of `adapters`, and what the runs that they lie in trained beside them."""
    if settings.projector is not None and not settings.merged:
        raise ValueError("projector: no LoRA adapter can hold it; use merged=true")
    steps = {Path(adapter).expanduser().resolve().parents[1] for adapter in settings.adapters}
    steps = {step for step in steps if (step / "config.yaml").is_file()}
    projector = load_tensors(Path(settings.projector)) if settings.projector else {}
    source = Source(
        experts=open_adapters(settings.adapters),
        projector=projector,
        beside=list(beside_lines(sorted(steps), settings.projector)),
    )
    if len(steps) != 1:
        return source
    step = steps.pop()
    return replace(source, step=step, config=load_config(step / "config.yaml"))


def beside_lines(steps: Sequence[Path], projector: str | None) -> Iterator[str]:
    """One line for each part that a run trained: whether the merge has it."""
    for step in steps:
        for part in sort_parts(read_parts(step)):
            if part == "projector" and projector:
                fate = f"replaced by {projector}"
            else:
                fate = "not in the result; scripts/merge_parts.py merges it"
            yield f"{part} of {step.parents[1].name}: {fate}"


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


def prepare_verify(
    settings: MergeConfig,
    source: Source,
    gates: dict[str, Tensor] | None,
    exact: bool,
) -> Verify:
    """The probe and the live models that the reloaded files are compared with."""
    base = base_of(settings, source)
    backbone = load_backbone(str(base), torch.float32)
    routed, inputs = None, None
    if source.config is not None and source.step is not None:
        inputs, routed = probe_of_run(settings, source.step, source.config)
    if inputs is None:
        inputs = probe_of_noise(settings, backbone.processor)
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
        new_tokens=settings.new_tokens,
    )


def base_of(settings: MergeConfig, source: Source) -> Path:
    named = [expert.config.get("base_model_name_or_path") for expert in source.experts]
    run = source.config.model.name if source.config is not None else None
    name = settings.base or run or next(filter(None, named), None)
    if name is None:
        raise ValueError("base: the adapters name none; give base=, or verify=false for an adapter")
    return local_base(name)


def probe_of_run(
    settings: MergeConfig, step: Path, config: RunConfig
) -> tuple[dict[str, Tensor] | None, Outputs | None]:
    """Prompts of the run's own data, one source after the other, and its routed answers."""
    sources = config.eval.sources or config.data.validation or config.data.sources
    data = list(open_sources(sources, config.data, open_ocr(config.data)).values())
    if not data:
        return None, None
    model, processor, _ = load_model(step)
    count = settings.num_probes
    samples = [data[i % len(data)][i // len(data) % len(data[i % len(data)])] for i in range(count)]
    collator = make_collator(config, processor, for_generation=True, allow_unknown_tasks=True)
    batch = collator(samples)
    names = ("input_ids", "attention_mask", "pixel_values")
    inputs = {name: getattr(batch, name) for name in names}
    return inputs, routed_outputs(model.float(), batch, settings.new_tokens)


def probe_of_noise(settings: MergeConfig, processor: Any) -> dict[str, Tensor]:
    """Prompts that any LLaVA accepts, where no data is at hand: noise, and plain questions."""
    noise = np.random.default_rng(0).integers(0, 256, (settings.num_probes, 96, 128, 3), np.uint8)
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(settings.num_probes)]
    return probe_inputs(processor, [Image.fromarray(picture) for picture in noise], questions)


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
        base=base_of(settings, source),
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
