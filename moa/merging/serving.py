"""What engines need that take a LoRA, or static scales, per request: the routed mixture as plain PEFT folders.

    OUT/experts/NAME          each expert, as it was trained
    OUT/vectors/NAME          for each frequent gate vector one adapter, the experts side by side at these gates, exact
    OUT/requests.jsonl        of every sample {adapter: weight} and the vector that it belongs to
    OUT/serving.json          the vectors, how often each was seen, and how far its samples' gates are from it

Gates are decided once per sample, from the prompt alone, so a request with these weights gets the routed answer.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from data.sample import Sample
from data.sources import open_ocr
from moa.card import local_fingerprint
from moa.checkpoint import load_model, step_folder
from moa.files.atomic import atomic_folder, write_file, write_json
from moa.files.peft import STATISTICS_FILE
from moa.merging.adapters import Expert
from moa.merging.export import export as exports
from moa.merging.export.folder import check_out
from moa.merging.learn.calibration import read_calibration
from moa.merging.merge import run_plan
from moa.merging.run import prepare_verify
from moa.merging.settings import ServingConfig
from moa.merging.site_plan import make_plan
from moa.merging.source import Source, open_run
from moa.merging.weights import Weights
from moa.model import MixtureModel

REPORT = "serving.json"
ROUNDING = 1e-9  # a gate below it is off
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that its --max-lora-rank takes; an adapter above it is refused
Gates = Float[Tensor, "sample site expert"]


@dataclass(frozen=True, kw_only=True)
class Vector:
    """Gates that some samples have in common."""

    members: Sequence[int]  # numbers of its samples
    gates: Float[Tensor, "site expert"]  # their mean; one site where all have the same
    spread: float  # the largest difference of a member's gate


def frequent_vectors(gates: Gates, precision: float, most: int) -> list[Vector]:
    """Samples whose gates are alike when rounded to `precision`, the largest groups first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate((gates / precision).round().long().flatten(1).tolist()):
        groups.setdefault(tuple(row), []).append(number)
    frequent = [(own, gates[own].mean(0)) for own in sorted(groups.values(), key=len, reverse=True)[:most]]
    return [Vector(members=own, gates=mean, spread=float((gates[own] - mean).abs().max())) for own, mean in frequent]


def write_serving(settings: ServingConfig, console: Console) -> None:
    """All of scripts.serving; ValueError for a run whose mixture no adapter holds."""
    for key in ("run", "out"):
        if getattr(settings, key) is None:
            raise ValueError(f"{key}: names no folder")
    step, out = step_folder(str(settings.run)), Path(str(settings.out))
    source = open_run(step)
    if source.projector:
        raise ValueError(f"run: {settings.run} trained its projector, which no LoRA adapter can hold")
    if source.config is not None and source.config.router.granularity != "sample":
        raise ValueError(f"run: {settings.run} gates every token by itself, and no weights of a request equal that")
    check_out(out, [step], REPORT)
    model, _, config = load_model(step, "cpu")
    chosen: dict[str, Any] = {"num_samples": settings.num_samples, "seed": settings.seed, "ocr": open_ocr(config.data)}
    data = read_calibration(config, model, **chosen)
    samples = [sample for own in data.samples.values() for sample in own]
    gates = gates_of_samples(model, [batch for own in data.by_source(settings.batch_size).values() for batch in own])
    vectors = frequent_vectors(gates, settings.precision, settings.max_vectors)
    names, sites = [*model.bank.names], [*model.bank.sites]
    with atomic_folder(out) as folder:
        for expert, own in zip(source.experts, source.folders, strict=True):
            shutil.copytree(own, folder / "experts" / expert.name, ignore=shutil.ignore_patterns(STATISTICS_FILE))
        (folder / "vectors").mkdir()
        rows = []
        for number, vector in enumerate(vectors):
            name = f"v{number}"
            row = {"name": name, "weights": weights_of(vector.gates, names, sites), "spread": vector.spread}
            row |= {"samples": len(vector.members), "share": len(vector.members) / len(samples)}
            rows.append(row | write_vector(folder / "vectors" / name, vector.gates, source, names, sites, settings))
            kept = ", ".join(f"{n} {float(g):.2f}" for n, g in zip(names, vector.gates.mean(0), strict=True) if g.any())
            console.print(f"{name}: {row['share']:.0%} of the samples; {kept or 'the base alone'}", soft_wrap=True)
        towers = [site for site in sites if model.backbone.stream_of(site) != "text"]
        served = sum(len(vector.members) for vector in vectors)
        record = {"run": str(settings.run), "experts": names, "precision": settings.precision, "vectors": rows}
        record |= {"samples": len(samples), "served": served / len(samples), "not_of_the_language_model": towers}
        write_json(folder / REPORT, record)
        write_file(folder / "requests.jsonl", requests(samples, gates, vectors, names))
    console.print(
        f"{served} of {len(samples)} samples have one of {len(vectors)} vectors; written: {out}", soft_wrap=True
    )
    if any(row["adapter"] for row in rows):
        console.print(vllm_command(str(source.base_name), out, rows, bool(towers)), soft_wrap=True)
    if towers:
        console.print(f"{len(towers)} sites are not of the language model; vLLM adapts them for some models alone")


def vllm_command(base: str, out: Path, rows: Sequence[dict[str, Any]], towers: bool) -> str:
    """It serves the adapters of these vectors, under their names."""
    adapters = [f"{row['name']}={out / row['adapter']}" for row in rows if row["adapter"]]
    most = max(row["rank"] for row in rows)
    rank = next((rank for rank in VLLM_RANKS if rank >= most), most)
    tower = " --enable-tower-connector-lora" if towers else ""
    options = f"--enable-lora{tower} --max-lora-rank {rank} --max-loras {len(adapters)}"
    return f"vllm serve {base} {options} --lora-modules {' '.join(adapters)}"


@torch.no_grad()
def gates_of_samples(model: MixtureModel, batches: Sequence[Any]) -> Gates:
    found = [model.compute_gates(batch).gates for batch in batches]
    assert all(gates is not None for gates in found)
    return torch.cat([gates.double() for gates in found if gates is not None])


def weights_of(gates: Float[Tensor, "site expert"], names: Sequence[str], sites: Sequence[str]) -> dict[str, Any]:
    """By expert, or by site and expert, as scripts.merge takes weights."""
    rows = [dict(zip(names, row, strict=True)) for row in gates.tolist()]
    return rows[0] if len(rows) == 1 else dict(zip(sites, rows, strict=True))


def write_vector(
    folder: Path,
    gates: Float[Tensor, "site expert"],
    source: Source,
    names: Sequence[str],
    sites: Sequence[str],
    settings: ServingConfig,
) -> dict[str, Any]:
    """One adapter of the experts that are on at these gates, exactly, and its largest rank; None for the base alone."""
    on = [name for name, column in zip(names, gates.T, strict=True) if column.abs().max() > ROUNDING]
    experts: list[Expert] = [expert for expert in source.experts if expert.name in on]
    if not experts:
        return {"adapter": None, "rank": 0}
    weights: Weights = weights_of(gates[:, [names.index(name) for name in on]], on, sites)
    plan = make_plan(experts, weights=weights)
    merged = run_plan(plan)
    live = Source(experts=experts, folders=[], base_name=source.base_name)
    verify = prepare_verify(live, settings, plan, exact=True)
    about: dict[str, Any] = {"report": {"serving": {"weights": weights}}, "dtype": settings.dtype, "verify": verify}
    text = f"Experts of {settings.run} at gates that its router often gives."
    about["card"] = {"about": text, "fingerprint": local_fingerprint(source.base_name)}
    exports.export_adapter(folder, merged, experts, base=source.base_name, **about)
    return {"adapter": f"vectors/{folder.name}", "rank": max(len(site.lora_a) for site in merged.values())}


def requests(samples: Sequence[Sample], gates: Gates, vectors: Sequence[Vector], names: Sequence[str]) -> str:
    """A line for each sample; weights are null where they differ between sites, which no engine's scales can."""
    vector_of = {number: f"v{place}" for place, vector in enumerate(vectors) for number in vector.members}
    lines, same = [], gates.shape[1] == 1
    for number, sample in enumerate(samples):
        weights = {n: g for n, g in zip(names, gates[number, 0].tolist(), strict=True) if abs(g) > ROUNDING}
        about = {"source": sample.source, "id": sample.id, "task": sample.task}
        lines.append({**about, "vector": vector_of.get(number), "weights": weights if same else None})
    return "".join(json.dumps(line) + "\n" for line in lines)
