"""Merge experts site by site, and say what was kept of each.

    experts -> core form of one site -> method -> best factors at the asked rank -> next site

Retention of expert i is <dW_merged, dW_i> / |dW_i|^2: 1 where the merged update still does all that
the expert did along its own direction. Sums over sites weigh each site by its energy.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moa.merging import linear
from moa.merging.core import (
    Expert,
    Method,
    compress,
    energy_in_span,
    inner_products,
    parse_rank,
    to_core,
)

METHODS: dict[str, Method] = {**linear.METHODS}
Number = int | float
Weights = Mapping[str, Number] | Mapping[str, Mapping[str, Number]]  # by expert, or site -> expert


@dataclass(frozen=True, kw_only=True)
class MergedSite:
    """The merged update B A of one site, and how it relates to the experts' own."""

    lora_a: Float[Tensor, "rank in"]
    lora_b: Float[Tensor, "out rank"]
    weights: Float[Tensor, " expert"]
    energy: float  # |dW_merged|^2, after truncation to the rank
    lost: float  # what the truncation cut off of it
    expert_energy: Float[Tensor, " expert"]  # |dW_i|^2
    overlap: Float[Tensor, " expert"]  # <dW_merged, dW_i>
    span_energy: Float[Tensor, " expert"]  # |dW_i|^2 inside the result's rows and columns


def merge(
    experts: Sequence[Expert],
    *,
    method: str = "linear",
    options: Mapping[str, Any] | None = None,
    weights: Weights | None = None,
    rank: int | str = "sum",
    space: str = "core",
    dtype: torch.dtype = torch.float64,
    on_site: Callable[[str], None] = lambda site: None,
) -> dict[str, MergedSite]:
    """The merged update of every site that some expert has, in the order of the sites.

    An expert without a site counts as a zero update there. `weights` by expert name, or per site;
    None is the method's own default. `dtype` is that of the algebra. Raises ValueError for experts
    that do not fit together and for unknown methods, options, weights, spaces and ranks.
    """
    row = find_method(method, space)
    check_experts(experts)
    settings = check_options(method, options or {})
    rank = parse_rank(rank)
    table = weight_table(experts, weights, row.default_weights)
    merged = {}
    for site, values in table.items():
        merged[site] = merge_site(
            experts, site, values.to(dtype), row.function, settings, rank=rank
        )
        on_site(site)
    return merged


def merge_site(
    experts: Sequence[Expert],
    site: str,
    weights: Float[Tensor, " expert"],
    function: Callable[..., Tensor],
    options: Mapping[str, Any],
    *,
    rank: int | str,
) -> MergedSite:
    """One site merged; the algebra runs in the dtype of `weights`."""
    having = [expert for expert in experts if site in expert.ranks]
    factors = [e.factors(site, weights.dtype) if site in e.ranks else None for e in experts]
    updates = to_core(factors)
    core = function(updates.cores, weights, **options)
    low = compress(updates, core, rank, sum(expert.ranks[site] for expert in having))
    return MergedSite(
        lora_a=low.lora_a,
        lora_b=low.lora_b,
        weights=weights,
        energy=float(low.core.square().sum()),
        lost=low.lost,
        expert_energy=updates.cores.square().sum((1, 2)),
        overlap=inner_products(low.core, updates.cores),
        span_energy=energy_in_span(low, updates.cores),
    )


def all_sites(experts: Sequence[Expert]) -> list[str]:
    """The sites of any expert, in the first one's order, then the next one's."""
    return list(dict.fromkeys(site for expert in experts for site in expert.ranks))


def all_shapes(experts: Sequence[Expert]) -> dict[str, tuple[int, int]]:
    """Site -> [out, in] of the base's weight; the experts must agree."""
    check_experts(experts)
    return {site: shape for expert in experts for site, shape in expert.shapes.items()}


def find_method(name: str, space: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"method: no such method {name!r}; choices: {sorted(METHODS)}")
    if space not in METHODS[name].spaces:
        choices = list(METHODS[name].spaces)
        raise ValueError(f"space: method {name} is not defined in {space!r}; choices: {choices}")
    return METHODS[name]


def method_options(name: str) -> dict[str, Any]:
    """The options of a method and their defaults: the keyword arguments of its function."""
    parameters = inspect.signature(METHODS[name].function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The method's options with the given ones put in; ValueError names an unknown or odd one."""
    known = method_options(method)
    for key, value in options.items():
        if key not in known:
            choices = sorted(known) or "none"
            raise ValueError(f"options.{key}: method {method} has no such option; it has {choices}")
        number = isinstance(known[key], float) and isinstance(value, int | float)
        if not number and type(value) is not type(known[key]):
            kind = type(known[key]).__name__
            raise ValueError(f"options.{key}: must be a {kind}, got {value!r}")
    return {**known, **options}


def check_experts(experts: Sequence[Expert]) -> None:
    """Raise ValueError unless the experts can be summed: own names, one base, one shape per site."""
    if not experts:
        raise ValueError("adapters: names none")
    names = [expert.name for expert in experts]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"adapters: two experts are called {name!r}; rename one folder")
    bases = {e.name: e.config.get("base_model_name_or_path") for e in experts}
    if len({Path(base).name for base in bases.values() if base}) > 1:
        raise ValueError(f"adapters: they belong to different bases: {bases}")
    if len({bool(e.config.get("fan_in_fan_out")) for e in experts}) > 1:
        raise ValueError("adapters: fan_in_fan_out differs, so they belong to different bases")
    for site in all_sites(experts):
        shapes = {e.name: e.shapes[site] for e in experts if site in e.shapes}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"adapters: they belong to different bases: {site} is {shapes}")


def weight_table(
    experts: Sequence[Expert], weights: Weights | None, default: str = "ones"
) -> dict[str, Float[Tensor, " expert"]]:
    """Site -> weight of each expert, float64; ValueError names a missing, unknown or odd weight."""
    names = [expert.name for expert in experts]
    if weights is None:
        weights = dict.fromkeys(names, 1 / len(names) if default == "mean" else 1.0)
    per_site = any(isinstance(value, Mapping) for value in weights.values())
    table: dict[str, Tensor] = {}
    for site in all_sites(experts):
        where = f"weights.{site}" if per_site else "weights"
        row: Any = weights.get(site) if per_site else weights
        if row is None:
            raise ValueError(f"{where}: missing; weights per site must cover every site")
        for name in (*row, *names):
            if name not in names:
                raise ValueError(f"{where}.{name}: no such expert; choices: {names}")
            if name not in row:
                raise ValueError(f"{where}.{name}: missing; weights must cover every expert")
        values = torch.tensor([float(row[name]) for name in names], dtype=torch.float64)
        if not torch.isfinite(values).all():
            raise ValueError(f"{where}: must be finite, got {dict(row)}")
        table[site] = values
    return table


def sum_gates(
    method: str, options: Mapping[str, Any], table: Mapping[str, Float[Tensor, " expert"]]
) -> dict[str, Float[Tensor, " expert"]] | None:
    """The gates of the mixture that a merge equals, per site; None where the method is no sum."""
    row = METHODS[method]
    if not row.is_sum:
        return None
    settings = check_options(method, options)
    # On one-hot "cores" [expert, 1, expert] a sum returns its own coefficients.
    return {
        site: row.function(torch.eye(len(w), dtype=w.dtype)[:, None], w, **settings)[0]
        for site, w in table.items()
    }


def update_shape(result: MergedSite) -> tuple[int, int]:
    """[out, in] of the dense update."""
    return result.lora_b.shape[0], result.lora_a.shape[1]


def layer_of(site: str) -> str:
    """The numbered block that a site lies in, or its parent module where there is none."""
    match = re.match(r"(.*?\.\d+)(\.|$)", site)
    return match[1] if match else site.rpartition(".")[0] or site


def summarise(
    experts: Sequence[Expert], merged: Mapping[str, MergedSite]
) -> dict[str, dict[str, Any]]:
    """What a merge kept, for JSON: in total, per layer and per site, each with every expert."""
    layers: dict[str, dict[str, MergedSite]] = {}
    for site, result in merged.items():
        layers.setdefault(layer_of(site), {})[site] = result
    return {
        "total": _kept(experts, merged),
        "layers": {layer: _kept(experts, sites) for layer, sites in layers.items()},
        "sites": {site: _kept(experts, {site: result}) for site, result in merged.items()},
    }


def _kept(experts: Sequence[Expert], merged: Mapping[str, MergedSite]) -> dict[str, Any]:
    results = list(merged.values())
    energy = sum(result.energy for result in results)
    before = energy + sum(result.lost for result in results)
    ranks = [result.lora_a.shape[0] for result in results]
    rows = {}
    for index, expert in enumerate(experts):
        own = sum(float(result.expert_energy[index]) for result in results)
        overlap = sum(float(result.overlap[index]) for result in results)
        inside = sum(float(result.span_energy[index]) for result in results)
        weights = {round(float(result.weights[index]), 12) for result in results}
        rows[expert.name] = {
            "weight": weights.pop() if len(weights) == 1 else None,  # None: differs between sites
            "sites": sum(site in expert.ranks for site in merged),
            "norm": own**0.5,
            "retention": overlap / own if own else None,
            "energy_in_span": inside / own if own else None,
        }
    return {
        "rank": ranks[0] if len(set(ranks)) == 1 else [min(ranks), max(ranks)],
        "sites": len(results),
        "norm": energy**0.5,
        "energy_kept": energy / before if before else 1.0,
        "experts": rows,
    }
