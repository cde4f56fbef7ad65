"""Merge LoRA experts, of folders or of a run, into one adapter or a whole checkpoint of their base.

source -> plan -> merged factors of each site, on the disk -> what was kept -> files, verified in a fresh process
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moa.analysis.fidelity_page import write_page
from moa.backbones.open_clip import export_open_clip, is_open_clip, load_open_clip
from moa.backbones.opening import open_backbone
from moa.backbones.shapes import layer_shapes
from moa.card import Card, local_fingerprint
from moa.cli.command import progress_bar
from moa.evaluation.card_parts import measured_of
from moa.evaluation.gates_file import read_routing, routing_file
from moa.files.checkpoint_files import match_sites, read_base
from moa.files.spool import open_spool
from moa.merging import adapters
from moa.merging.export import export as exports
from moa.merging.export.export import Verify
from moa.merging.export.folder import check_out
from moa.merging.export.verify import make_verify, probe_of_noise, probe_of_run
from moa.merging.merge import Merged, run_plan
from moa.merging.methods.table import check_options, find_method
from moa.merging.report.before import warnings_before
from moa.merging.report.console import agreement_line, report_lines, summary_tables
from moa.merging.report.fidelity import mean_cross_terms, measure, summarise
from moa.merging.settings import MergeExperts, Verified
from moa.merging.site_plan import Plan, make_plan, sum_gates
from moa.merging.source import Source, fold_pairs, open_folders, open_run, with_known_statistics, with_statistics
from moa.merging.weights import GATES, Weights, gates_of, parse_weights, read_weights
from moa.routing.roles import LEFT_OVER

Record = dict[str, Any]
ROUNDING = 1e-12  # share of the energy below which nothing was cut


def merge_experts(settings: MergeExperts, console: Console) -> Record:
    """Merge by the settings, and write the result with its reports; the report of what was written.

    Raises ValueError for settings that do not fit each other, the experts or the base. Settings are checked before
    experts, experts before the base, and all of them before anything is computed.
    """
    find_method(settings.method, settings.space)
    check_options(settings.method, settings.options)
    if settings.out is None:
        raise ValueError("out: names no folder")
    if not settings.adapters and settings.run is None:
        raise ValueError("adapters, run: give one of the two")
    if settings.run is None:
        source = open_folders(settings.adapters, settings.base, settings.projector)
    else:
        source = open_run(settings.run, settings.base)
    names = [expert.name for expert in source.experts]
    if not set(settings.added) < set(names):
        raise ValueError(f"added: {settings.added}; choices: some, and not all, of {', '.join(names)}")
    source = replace(source, added=settings.added)
    if source.projector and not settings.merged:
        raise ValueError(
            f"run: {settings.run} trained its projector, which no LoRA adapter can hold; use "
            "merged=true, or name its experts by adapters="
        )
    check_out(settings.out, source.folders)
    for expert in source.experts:
        for site in expert.ranks:
            expert.read(site)  # refuses values that are not finite, before a base is looked for
    if settings.base is None:
        adapters.check_base_names(source.experts)
    for line in source.beside:
        console.print(line, soft_wrap=True)
    needs_base = settings.merged or settings.verify
    to_open_clip = is_open_clip(source.base_name or "")
    layers = None if to_open_clip else known_layers(source, needs_base)
    if needs_inputs(settings):
        source = with_statistics(source)
    elif settings.fidelity:
        source = with_known_statistics(source)
    source = replace(source, experts=adapters.respell(source.experts, layers))
    if source.pairs and not weighs_apart(settings.weights, source):
        lines = [f"{name}: added to {other}, whose gate it has" for name, other in source.pairs.items()]
        console.print(*lines, sep="\n", soft_wrap=True)
        source = fold_pairs(source)
    plan = plan_merge(settings, source, console)
    warn_of_few_tokens(plan, console)
    for line in warnings_before([e for e in source.experts if e.name not in source.shared], added_up(plan)):
        console.print(line, soft_wrap=True)
    source = identify_base(source, needs_base, settings.other_base)
    if to_open_clip:
        check_for_open_clip(settings.merged, settings.verify, settings.dtype)
    elif needs_base:
        shapes = {site: shape for expert in source.experts for site, shape in expert.shapes.items()}
        match_sites(shapes, read_base(source.base()))
    warn_of_factors(plan, console)
    kept = exports.stored_dtype(source.experts, "float32" if settings.merged else settings.dtype)
    with open_spool(Path(settings.out).parent, kept) as keep:
        with progress_bar("merging", len(plan.sites), console) as advance:
            merged = run_plan(plan, keep=keep, on_site=advance)
        summary = summarise(source.experts, merged)
        console.print(*summary_tables(summary), sep="\n")
        if settings.metric == "inputs":
            console.print("energy kept: of the outputs, on the experts' own inputs")
        card = card_of(source, merged, settings)
        if to_open_clip and settings.merged:
            console.print(merge_into_open_clip(settings.out, source, merged, summary["total"], card), soft_wrap=True)
            return summary
        exact = summary["total"]["energy_kept"] > 1 - ROUNDING
        verify = prepare_verify(source, settings, plan, exact)
        report = export(settings, source, merged, summary, card, verify)
    console.print(*report_lines(report, Path(settings.out)), sep="\n", soft_wrap=True)
    return report


def known_layers(source: Source, needs_base: bool) -> dict[str, tuple[int, int]] | None:
    """The layers of the base; None where it is not here, which is an error only after the settings are right."""
    if not needs_base and not Path(source.base_name or "").is_dir():
        return None  # nothing is fetched for its names
    try:
        return layer_shapes(str(source.base()))
    except ValueError:
        return None


def identify_base(source: Source, needs_base: bool, other_base: bool) -> Source:
    """With the base's fingerprint, or what the experts record of it; ValueError for experts of another base."""
    base = source.base_name if needs_base else None
    if base is not None and not is_open_clip(base):
        base = str(source.base())
    return replace(source, base_fingerprint=adapters.common_fingerprint(source.experts, base, other_base))


def weighs_apart(weights: Any, source: Source) -> bool:
    """Whether weights are given to experts that have the gate of another, as scripts.learn_weights does."""
    by_name = isinstance(weights, Mapping) and not source.pairs.keys().isdisjoint(weights)
    return by_name or (isinstance(weights, str) and weights.endswith(".json"))


def check_own_weights(gates: Mapping[str, str], own: str, console: Console) -> None:
    """ValueError for a share that the router decides, which a method's own weights are not; one of `rest` in a mean is
    a warning. The mean has what a joint expert has where the router prefers none."""
    for name, gate in gates.items():
        if gate not in (*LEFT_OVER, "joint") or (gate == "joint" and own == "mean"):
            continue
        rule = f"experts.{name}.gate={gate} is a share that the router decides, and the method's own weights are not; "
        rule += "give weights=gates (the mean gates of eval.py), or weights={NAME: NUMBER}"
        if gate != "rest" or own != "mean":
            raise ValueError(f"weights: {rule}")
        console.print(f"warning: {rule}", soft_wrap=True)


def plan_merge(settings: MergeExperts, source: Source, console: Console) -> Plan:
    names = [expert.name for expert in source.experts]
    given = settings.weights if isinstance(settings.weights, str) else ""
    by_gates, task = given.partition(":")[0] == GATES, given.partition(":")[2] or None
    by_token = source.config is not None and source.config.router.granularity != "sample"
    if by_token and (by_gates or settings.run) and not settings.approximate:
        raise ValueError(
            "run: its router gates every token by itself, and no single adapter equals that; "
            "approximate=true merges with the mean gates and reports the error"
        )
    if settings.approximate and not by_token:
        raise ValueError("approximate: has no effect on experts that are not gated by token; leave it out")
    if by_gates:
        weights: Weights | None = measured_gates(source, settings.routing, task, console)
    elif given.endswith(".json"):
        weights = read_weights(given, source.experts, settings.method, settings.options)
    else:
        weights = parse_weights(settings.weights, names)
    if weights is None and len(names) > 1:
        gates = {name: gate for name, gate in source.gates.items() if name not in source.shared}
        check_own_weights(gates, find_method(settings.method).weights, console)
    rules = [replace(rule, weights=parse_weights(rule.weights, names)) for rule in settings.sites]
    own = {name: getattr(settings, name) for name in ("method", "options", "rank", "space", "metric", "norm")}
    by_name = weights if weights is not None else {}
    if added := [name for name in source.shared if by_name.get(name) != 0]:
        console.print(f"added to what the others merge to: {', '.join(added)}", soft_wrap=True)
    return make_plan(source.experts, weights=weights, rules=rules, added=source.shared, **own)


def measured_gates(source: Source, routing: str | None, task: str | None, console: Console) -> Weights:
    """The mean gates that eval.py measured, over the trained tasks or of one task."""
    if routing is None and source.step is None:
        raise ValueError("weights: gates need run=, or routing= with a report of eval.py")
    file = Path(routing) if routing else routing_file(source.step or Path())
    gates, line = gates_of(read_routing(file, source.step), source.experts, task, source.folded)
    console.print(line, soft_wrap=True)
    return gates


def needs_inputs(settings: MergeExperts) -> bool:
    """Whether the merge reads the statistics of the experts' inputs, somewhere."""
    methods = [settings.method, *(rule.method for rule in settings.sites if rule.method)]
    return settings.metric == "inputs" or any(find_method(name).reads_inputs for name in methods)


def added_up(plan: Plan) -> dict[str, float]:
    """The largest weight of each expert where updates are plainly added; none of experts that no method adds so."""
    found: dict[str, float] = {}
    for job in [job.others or job for job in plan.jobs]:
        for site, row in job.weights.items() if job.method.is_sum and job.norm == "own" else ():
            for name, weight in zip(job.names, row.tolist(), strict=True):
                found[name] = max(found.get(name, 0.0), abs(weight * job.scale[site]))
    return found


def warn_of_few_tokens(plan: Plan, console: Console) -> None:
    """Where least squares has fewer inputs than unknowns, so that the ridge decides."""
    few: list[str] = []
    for job in [job.others or job for job in plan.jobs]:
        for site in job.weights if job.method.reads_inputs else ():
            here = [expert for expert in job.experts if site in expert.ranks]
            if not here:
                continue
            width = here[0].shapes[site][1]
            unknown = width if job.space == "rows" else min(width, sum(expert.ranks[site] for expert in here))
            for expert in here:
                if (tokens := expert.moments(site).tokens) < unknown:
                    decides = "the ridge decides" if job.options.get("ridge", 0) else "nothing decides (ridge=0)"
                    few.append(f"{expert.name} has {tokens} tokens for {unknown} unknowns at {site}; {decides} there")
    if few:
        line = f"warning: {few[0]}"
        console.print(line + (f", and at {len(few) - 1} others" if few[1:] else ""), soft_wrap=True)


def warn_of_factors(plan: Plan, console: Console) -> None:
    """What merging A and B apart does by definition, and how large it is here."""
    jobs = [job.others or job for job in plan.jobs if job.space == "factor"]
    if not jobs:
        return
    line = "A and B are merged apart, so the result depends on how each expert is factored"
    if sums := {site: row for job in jobs if not job.method.joint for site, row in job.weights.items()}:
        ratio = mean_cross_terms(jobs[0].experts, sums)
        line += f", and holds {ratio:.1f} times the wanted update in products of one expert's B with another's A"
    console.print(f"warning: {line}; space=core, where a method has it, does not", soft_wrap=True)


def check_for_open_clip(merged: bool, verify: bool, dtype: str) -> None:
    """open_clip's packed attention has no place for an adapter in a plain environment."""
    if not merged and verify:
        raise ValueError(
            "verify: plain PEFT cannot put an adapter into open_clip's packed attention; use merged=true for a "
            "checkpoint that open_clip loads, or verify=false for an adapter that this project loads"
        )
    if dtype not in ("auto", "float32"):
        raise ValueError(f"dtype: an open_clip checkpoint is written in float32, not {dtype}")


def merge_into_open_clip(out: str, source: Source, merged: Merged, kept: Record, card: Record) -> str:
    """Write the folder that plain open_clip loads, checked against the base with the update added; a line on it."""
    backbone = load_open_clip(str(source.base_name))
    deltas = {site: result.lora_b @ result.lora_a for site, result in merged.items()}
    text = Card(kind="open_clip", name=Path(out).name, **card).text()
    gap = export_open_clip(out, backbone, deltas, {"merge": kept}, text)["max_abs_difference"]
    return f"checkpoint: {out}, for open_clip local-dir:{out}; reloaded features differ by {gap:.1e}"


def prepare_verify(source: Source, settings: Verified, plan: Plan | None = None, exact: bool = False) -> Verify | None:
    """The probe and the live models that the reloaded files are compared with; None with verify=false."""
    if not settings.verify:
        return None
    backbone = open_backbone(str(source.base()))
    probe = None
    if source.config is not None and source.step is not None:
        probe = probe_of_run(source.step, source.config, settings.num_probes, settings.new_tokens)
    if probe is None:
        noise = probe_of_noise(backbone, settings.num_probes)
        probe = noise, backbone.owners_of(noise), None
    inputs, owners, routed = probe
    with torch.no_grad():
        for name, tensor in source.projector.items():
            backbone.model.get_parameter(name).copy_(tensor)
    return make_verify(
        backbone.model,
        inputs,
        experts=source.experts,
        base=source.base(),
        gates=sum_gates(plan) if plan else None,
        exact=exact,
        routed=routed,
        stream_of=backbone.stream_of,
        owners=owners,
        new_tokens=settings.new_tokens,
    )


def card_of(source: Source, merged: Merged, settings: MergeExperts) -> Record:
    """The fields of the card that an export cannot fill by itself."""
    kind = "a checkpoint" if settings.merged else "one LoRA adapter"
    how = f"by `{settings.method}` at rank {settings.rank}"
    experts = {expert.name for expert in source.experts}
    sources = [*source.config.data.sources.values()] if source.config else []
    return {
        "base": source.base_name,
        "fingerprint": source.base_fingerprint or local_fingerprint(source.base_name),
        "about": f"{len(source.experts)} LoRA experts merged into {kind} {how}.",
        "rows": exports.rows_of(source.experts, merged, source.folders),
        "config": source.config,
        "sources": [s for s in sources if s.expert in experts],
        **(measured_of(source.step) if source.step else {}),
    }


def export(
    settings: MergeExperts, source: Source, merged: Merged, summary: Record, card: Record, verify: Verify | None
) -> Record:
    about = {
        "method": settings.method,
        "options": check_options(settings.method, settings.options),
        "sites": [asdict(rule) for rule in settings.sites],
        "space": settings.space or find_method(settings.method).spaces[0],
        "rank": settings.rank,
        "metric": settings.metric,
        "norm": settings.norm,
        "adapters": settings.adapters or settings.run,
        "beside": source.beside,
    }
    files: Record = {"merge_report.json": {**about, "kept": summary["total"], **summary}}
    if settings.fidelity:
        record = measure(source.experts, merged, shared=source.shared)
        files["fidelity.json"] = {**about, **record}
        files["fidelity.html"] = lambda p, r: write_page(p, record, about, agreement_line(r))
    shared: Record = {"dtype": settings.dtype, "verify": verify, "files": files, "card": card}
    shared["report"] = {"merge": {**about, "kept": summary["total"]}, "base_fingerprint": card["fingerprint"]}
    out = str(settings.out)
    if not settings.merged:
        base = settings.base or (source.config.model.name if source.config else None)
        return exports.export_adapter(out, merged, source.experts, base=base, **shared)
    shared |= {"processor": source.step and source.step / "processor", "replaced": source.projector}
    shared["max_shard_gb"] = settings.max_shard_gb
    return exports.export_checkpoint(out, merged, source.experts, base=source.base(), **shared)
