"""Merge experts site by site, and say what was kept of each.

    experts -> stack of one site in the method's space -> method -> best factors at the asked rank -> next site

Retention of expert i is <dW_merged, dW_i> / |dW_i|^2: 1 where the merged update still does all that
the expert did along its own direction. Sums over sites weigh each site by its energy.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moa import peft_io
from moa.merging import factorwise, linear, sparse, spectral
from moa.merging.core import (
    Expert,
    Factors,
    LowRank,
    Relation,
    compress,
    compress_dense,
    parse_rank,
    relate,
    relate_cores,
    to_core,
)
from moa.merging.method import Method
from moa.merging.stack import Stack, stack_of

METHODS: dict[str, Method] = {
    **linear.METHODS,
    **sparse.METHODS,
    **spectral.METHODS,
    **factorwise.METHODS,
}
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
    experts: Relation


@dataclass(frozen=True, kw_only=True)
class Job:
    """One merge: which experts, by which method, in which space."""

    experts: Sequence[Expert]
    method: Method
    space: str
    rank: int | str
    dtype: torch.dtype
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(expert.name for expert in self.experts)

    def factors(self, site: str) -> list[Factors | None]:
        return [e.factors(site, self.dtype) if site in e.ranks else None for e in self.experts]

    def about(self, site: str) -> dict[str, Any]:
        """What a stack of this site says of itself."""
        ranks = tuple(expert.ranks.get(site, 0) for expert in self.experts)
        return {"site": site, "experts": self.names, "ranks": ranks, "depth": self.depths[site]}

    @cached_property
    def depths(self) -> dict[str, float]:
        return find_depths(tuple(all_sites(self.experts)))


def merge(
    experts: Sequence[Expert],
    *,
    method: str = "linear",
    options: Mapping[str, Any] | None = None,
    weights: Weights | None = None,
    rank: int | str = "sum",
    space: str | None = None,
    dtype: torch.dtype = torch.float64,
    keep: Callable[[Tensor], Tensor] = lambda factor: factor,
    on_site: Callable[[str], None] = lambda site: None,
) -> dict[str, MergedSite]:
    """The merged update of every site that some expert has, in the order of the sites.

    An expert without a site counts as a zero update there. `weights` by expert name, or per site;
    None is the method's own default, as is a `space` of None. `dtype` is that of the algebra. `keep` is what becomes
    of each factor once its site is done, such as a spool's. Raises ValueError for experts that do not fit together,
    and for unknown methods, options, weights, spaces and ranks.
    """
    row = find_method(method, space)
    check_experts(experts)
    settings = check_options(method, options or {})
    job = Job(
        experts=experts,
        method=row,
        space=space or row.spaces[0],
        rank=parse_rank(rank),
        dtype=dtype,
        options=settings,
    )
    table = weight_table(experts, weights, row.default_weights)
    if row.prepare is not None:
        shared = row.prepare((open_stack(job, site) for site in table), **settings)
        job = replace(job, options={**settings, "shared": shared})
    merged = {}
    for site, values in table.items():
        result = merge_site(job, site, values.to(dtype))
        merged[site] = replace(result, lora_a=keep(result.lora_a), lora_b=keep(result.lora_b))
        on_site(site)
    return merged


def merge_site(job: Job, site: str, weights: Float[Tensor, " expert"]) -> MergedSite:
    """One site merged; the algebra runs in the dtype of `weights`."""
    factors = job.factors(site)
    low, relation = _SPACES[job.space](job, site, factors, weights)
    return MergedSite(
        lora_a=low.lora_a,
        lora_b=low.lora_b,
        weights=weights,
        energy=float(low.singular_values.square().sum()),
        lost=low.lost,
        experts=relation,
    )


def _in_core(
    job: Job, site: str, factors: list[Factors | None], weights: Tensor
) -> tuple[LowRank, Relation]:
    updates = to_core(factors, canonical=not job.method.is_sum)
    stack = stack_of(matrices=updates.cores, **job.about(site))
    core = job.method.function(stack, weights, **job.options)
    low = compress(updates, core, job.rank, sum(stack.ranks))
    return low, relate_cores(low, updates.cores)


def _in_rows(
    job: Job, site: str, factors: list[Factors | None], weights: Tensor
) -> tuple[LowRank, Relation]:
    """Rows in the experts' common output directions, columns as they are: KnOTS (Stoica et al. 2025, equation 2)."""
    updates = to_core(factors)
    stack = stack_of(matrices=updates.cores @ updates.q_a.T, **job.about(site))
    merged = job.method.function(stack, weights, **job.options)
    both = to_core([(merged, updates.q_b)])
    low = compress(both, both.cores[0], job.rank, sum(stack.ranks))
    return low, relate(low, factors)


def _in_dense(
    job: Job, site: str, factors: list[Factors | None], weights: Tensor
) -> tuple[LowRank, Relation]:
    stack = dense_stack(job, site, lambda: factors)
    merged = job.method.function(stack, weights, **job.options)
    low = compress_dense(merged, job.rank, sum(stack.ranks))
    return low, relate(low, factors)


def _in_factors(
    job: Job, site: str, factors: list[Factors | None], weights: Tensor
) -> tuple[LowRank, Relation]:
    """A and B apart, as PEFT's `linear` and `ties` do: both carry the root of the scale and of the weight.

    A mixture of N experts then holds N (N - 1) products of one expert's B with another's A that nobody asked for,
    and its result depends on how each expert is factored.
    """
    a, b = factor_stacks(job, site, factors)
    root = weights.abs().sqrt()
    if job.method.joint:
        pair = job.method.function(a, b, weights, **job.options)
    else:
        pair = (
            job.method.function(a, weights.sign() * root, **job.options),
            job.method.function(b, root, **job.options),
        )
    updates = to_core([pair])
    low = compress(updates, updates.cores[0], job.rank, sum(a.ranks))
    return low, relate(low, factors)


_SPACES = {"core": _in_core, "rows": _in_rows, "dense": _in_dense, "factor": _in_factors}


def open_stack(job: Job, site: str) -> Stack:
    """A site's stack for statistics over the whole model."""
    if job.space in ("core", "rows"):
        updates = to_core(job.factors(site))
        matrices = updates.cores if job.space == "core" else updates.cores @ updates.q_a.T
        return stack_of(matrices=matrices, **job.about(site))
    if job.space == "dense":
        return dense_stack(job, site, lru_cache(1)(lambda: job.factors(site)))
    raise ValueError("options.scope: 'model' has no meaning in space factor; use scope=tensor")


def dense_stack(job: Job, site: str, factors: Callable[[], list[Factors | None]]) -> Stack:
    """Rows of the dense updates, each made when it is read."""
    shape = next(expert.shapes[site] for expert in job.experts if site in expert.shapes)

    def read(start: int, stop: int) -> Tensor:
        zero = torch.zeros(stop - start, shape[1], dtype=job.dtype)
        return torch.stack([zero if f is None else f[1][start:stop] @ f[0] for f in factors()])

    return Stack(shape=shape, read=read, **job.about(site))


def factor_stacks(job: Job, site: str, factors: list[Factors | None]) -> tuple[Stack, Stack]:
    """All A and all B of a site, each with the root of the scale; ValueError where the ranks differ."""
    about = job.about(site)
    if len(set(about["ranks"])) > 1:
        ranks = dict(zip(job.names, about["ranks"], strict=True))
        raise ValueError(
            f"space: factor needs one rank for all experts, and {site} has {ranks}; use core"
        )
    present = [f for f in factors if f is not None]
    scales = [peft_io.site_scaling(expert.config, site) ** 0.5 for expert in job.experts]
    a = torch.stack([f[0] * s for f, s in zip(present, scales, strict=True)])
    b = torch.stack([f[1] / s for f, s in zip(present, scales, strict=True)])
    return stack_of(matrices=a, **about), stack_of(matrices=b, **about)


@lru_cache(8)
def find_depths(sites: tuple[str, ...]) -> dict[str, float]:
    """Where each site's numbered block lies among its stack's: 0 the first, 1 the last; 0 where it has no number."""
    numbers = {site: re.match(r"(.*?)\.(\d+)(\.|$)", site) for site in sites}
    last: dict[str, int] = {}
    for match in numbers.values():
        if match:
            last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    return {
        site: int(match[2]) / max(last[match[1]], 1) if match else 0.0
        for site, match in numbers.items()
    }


def all_sites(experts: Sequence[Expert]) -> list[str]:
    """The sites of any expert, in the first one's order, then the next one's."""
    return list(dict.fromkeys(site for expert in experts for site in expert.ranks))


def all_shapes(experts: Sequence[Expert]) -> dict[str, tuple[int, int]]:
    """Site -> [out, in] of the base's weight; the experts must agree."""
    check_experts(experts)
    return {site: shape for expert in experts for site, shape in expert.shapes.items()}


def find_method(name: str, space: str | None = None) -> Method:
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3) or "none"
        raise ValueError(f"method: no such method {name!r}; near: {near}; method=list prints all")
    if space is not None and space not in METHODS[name].spaces:
        choices = list(METHODS[name].spaces)
        raise ValueError(f"space: method {name} is not defined in {space!r}; choices: {choices}")
    return METHODS[name]


def method_options(name: str) -> dict[str, Any]:
    """The options of a method and their defaults: the keyword arguments of its function."""
    parameters = inspect.signature(METHODS[name].function).parameters.values()
    return {
        p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "shared"
    }


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
    names, sites = [expert.name for expert in experts], all_sites(experts)
    if weights is None or not any(isinstance(value, Mapping) for value in weights.values()):
        row = weight_row(names, weights, default)
        return dict.fromkeys(sites, row)
    table: dict[str, Tensor] = {}
    for site in sites:
        given: Any = weights.get(site)
        if given is None:
            raise ValueError(f"weights.{site}: missing; weights per site must cover every site")
        table[site] = weight_row(names, given, default, where=f"weights.{site}")
    return table


def weight_row(
    names: Sequence[str], weights: Any, default: str = "ones", where: str = "weights"
) -> Float[Tensor, " expert"]:
    """The weight of each name, float64; ValueError names a missing, unknown or odd weight."""
    if weights is None:
        weights = dict.fromkeys(names, 1 / len(names) if default == "mean" else 1.0)
    for name in (*weights, *names):
        if name not in names:
            raise ValueError(f"{where}.{name}: no such expert; choices: {list(names)}")
        if name not in weights:
            raise ValueError(f"{where}.{name}: missing; weights must cover every expert")
    values = torch.tensor([float(weights[name]) for name in names], dtype=torch.float64)
    if not torch.isfinite(values).all():
        raise ValueError(f"{where}: must be finite, got {dict(weights)}")
    return values


def sum_gates(
    method: str,
    options: Mapping[str, Any],
    table: Mapping[str, Float[Tensor, " expert"]],
    space: str | None = None,
) -> dict[str, Float[Tensor, " expert"]] | None:
    """The gates of the mixture that a merge equals, per site; None where the method is no sum."""
    row = find_method(method, space)
    if not row.is_sum or (space or row.spaces[0]) == "factor":  # sums of factors have cross terms
        return None
    settings = check_options(method, options)
    # On one-hot "updates" [expert, 1, expert] a sum returns its own coefficients.
    depths = find_depths(tuple(table))

    def coefficients(site: str, weights: Tensor) -> Tensor:
        one_hot = torch.eye(len(weights), dtype=weights.dtype)[:, None]
        names = tuple(map(str, range(len(weights))))
        stack = stack_of(
            site=site, experts=names, ranks=(1,) * len(names), depth=depths[site], matrices=one_hot
        )
        return row.function(stack, weights, **settings)[0]

    return {site: coefficients(site, weights) for site, weights in table.items()}


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
        own = sum(float(result.experts.energy[index]) for result in results)
        overlap = sum(float(result.experts.overlap[index]) for result in results)
        inside = sum(float(result.experts.span_energy[index]) for result in results)
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
