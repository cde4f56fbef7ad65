"""Merge LoRA experts, of folders or of a run, into one adapter or a whole checkpoint of their base.

source -> plan -> merged factors of each site, on the disk -> summary -> files, verified in a fresh process
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from moa.analysis.fidelity_page import write_page
from moa.backbones.open_clip import export_open_clip, is_open_clip, load_open_clip
from moa.backbones.opening import open_backbone
from moa.backbones.shapes import layer_shapes
from moa.card import Card, local_fingerprint
from moa.cli.command import progress_bar
from moa.evaluation.gates_file import read_routing, routing_file
from moa.files.checkpoint_files import match_sites, read_base
from moa.files.spool import open_spool
from moa.merging.core import Expert
from moa.merging.export.export import (
    Verify,
    check_out,
    export_adapter,
    export_checkpoint,
    rows_of,
    stored_dtype,
)
from moa.merging.export.probe import probe_of_noise, probe_of_run
from moa.merging.export.verify import make_verify
from moa.merging.inputs import (
    GATES,
    common_fingerprint,
    gates_line,
    gates_of,
    is_weights_file,
    parse_weights,
    read_weights,
    respell,
    tasks_of,
)
from moa.merging.merge import MergedSite, run_plan
from moa.merging.methods.table import METHODS, check_options, find_method
from moa.merging.plan import Plan, Weights, all_shapes, check_base_names, make_plan, sum_gates
from moa.merging.report.fidelity import mean_cross_terms, measure
from moa.merging.report.summary import summarise
from moa.merging.report.tables import agreement_line, report_lines, summary_tables
from moa.merging.settings import MergeConfig
from moa.merging.source import Source, open_folders, open_run


def merge_adapters(settings: MergeConfig, approximate: bool, console: Console) -> None:
    """Merge as the settings say, and write the result with its reports.

    `approximate` allows a run whose router gates every token. Raises ValueError for settings that do not
    fit each other, the experts or the base.
    """
    find_method(settings.method, settings.space)
    check_options(settings.method, settings.options)
    if settings.out is None:
        raise ValueError("out: names no folder")
    source = open_source(settings)
    check_out(settings.out, source.folders)
    check_values(source.experts)
    if settings.base is None:
        check_base_names(source.experts)
    console.print(*source.beside, sep="\n", soft_wrap=True)
    to_open_clip = is_open_clip(source.base_name(settings.base) or "")
    layers = None if to_open_clip else known_layers(settings, source)
    source = replace(source, experts=respell(source.experts, layers))
    plan = plan_merge(settings, source, approximate, console)
    source = replace(source, base_fingerprint=fingerprint_of(settings, source))
    if to_open_clip:
        check_for_open_clip(settings)
    elif settings.merged or settings.verify:
        match_sites(all_shapes(source.experts), read_base(source.base(settings.base)))
    warn_of_factors(plan, console)
    kept = torch.float32 if settings.merged else stored_dtype(source.experts, settings.dtype)
    with open_spool(Path(settings.out).parent, kept) as spool:
        with progress_bar("merging", len(plan.sites), console) as advance:
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


def known_layers(settings: MergeConfig, source: Source) -> dict[str, tuple[int, int]] | None:
    """The layers of the base; None where it is not at hand, which is an error only after the settings are right."""
    name = source.base_name(settings.base) or ""
    if not settings.merged and not settings.verify and not Path(name).is_dir():
        return None  # it is not needed, and nothing is fetched for its names
    try:
        return layer_shapes(str(source.base(settings.base)))
    except ValueError:
        return None


def fingerprint_of(settings: MergeConfig, source: Source) -> str | None:
    """The base's fingerprint, or what the experts record of it; ValueError for experts of another base."""
    base = source.base_name(settings.base)
    if not settings.merged and not settings.verify:
        base = None  # it need not be at hand
    elif not is_open_clip(base or ""):
        base = str(source.base(settings.base))
    return common_fingerprint(source.experts, base, settings.other_base)


def check_values(experts: Sequence[Expert]) -> None:
    """Read every expert once, before a base is looked for: ValueError for a value that is not finite."""
    for expert in experts:
        for site in expert.ranks:
            expert.read(site)


def open_source(settings: MergeConfig) -> Source:
    """The experts of `adapters`, or of `run` with what else it trained."""
    if not settings.adapters and settings.run is None:
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


def plan_merge(settings: MergeConfig, source: Source, approximate: bool, console: Console) -> Plan:
    names = [expert.name for expert in source.experts]
    return make_plan(
        source.experts,
        method=settings.method,
        options=settings.options,
        weights=choose_weights(settings, source, approximate, console),
        rank=settings.rank,
        space=settings.space,
        rules=[
            replace(rule, weights=parse_weights(rule.weights, names)) for rule in settings.sites
        ],
    )


def choose_weights(
    settings: MergeConfig, source: Source, approximate: bool, console: Console
) -> Weights | None:
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
    file = Path(settings.routing) if settings.routing else routing_file(source.step or Path())
    report = read_routing(file, source.step)
    tasks = tasks_of(report, raw.partition(":")[2] or None)
    console.print(gates_line(report, tasks), soft_wrap=True)
    return gates_of(report, source.experts, tasks)


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
    made = {"name": Path(str(settings.out)).name, **card_of(settings, source, merged)}
    card = Card(kind="open_clip", **made).text()
    found = export_open_clip(str(settings.out), backbone, deltas, {"merge": summary["total"]}, card)
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


def card_of(
    settings: MergeConfig, source: Source, merged: Mapping[str, MergedSite]
) -> dict[str, Any]:
    """What the card of a merge says beside what the export knows by itself."""
    count, kind = len(source.experts), "a checkpoint" if settings.merged else "one LoRA adapter"
    base = source.base_name(settings.base)
    experts = {expert.name for expert in source.experts}
    sources = [*source.config.data.sources.values()] if source.config else []
    return {
        "base": base,
        "fingerprint": source.base_fingerprint or local_fingerprint(base),
        "about": f"{count} LoRA experts merged into {kind} by `{settings.method}` at rank {settings.rank}.",
        "rows": rows_of(source.experts, merged, source.folders),
        "config": source.config,
        "sources": [s for s in sources if s.expert in experts],
    }


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
        files["fidelity.html"] = lambda path, report: write_page(
            path, record, shown, agreement_line(report)
        )
    card = card_of(settings, source, merged)
    shared: dict[str, Any] = {
        "dtype": settings.dtype,
        "report": {"merge": about, "base_fingerprint": card["fingerprint"]},
        "files": files,
        "card": card,
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
