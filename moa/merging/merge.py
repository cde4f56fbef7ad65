"""Merge experts site by site.

experts -> stack of one site in the method's space -> method -> best factors at the given rank -> next site
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moa.files.peft_config import site_scaling
from moa.merging import core
from moa.merging.adapters import Expert, factors_of
from moa.merging.core import Basis, CoreUpdates, Factors, LowRank, Relation
from moa.merging.methods.method import import_function
from moa.merging.methods.stack import Stack, rounding_of, stack_of
from moa.merging.site_plan import Job, Plan, make_plan
from moa.merging.weights import Weights
from moa.statistics.moments import own_directions


@dataclass(frozen=True, kw_only=True)
class MergedSite:
    """The merged update B A of one site, and how it relates to the experts' own."""

    lora_a: Float[Tensor, "rank in"]
    lora_b: Float[Tensor, "out rank"]
    weights: Float[Tensor, " expert"]
    energy: float  # |dW_merged|^2, after truncation to the rank
    # by the truncation: of the energy, or, in the metric of the inputs, of E|dW_merged x|^2
    kept: float
    lost: float
    experts: Relation

    def scaled(self, scale: float) -> "MergedSite":
        root = abs(scale) ** 0.5
        a, b = self.lora_a * root, self.lora_b * math.copysign(root, scale)
        squares: Any = {name: getattr(self, name) * scale**2 for name in ("energy", "kept", "lost")}
        relation = replace(self.experts, overlap=self.experts.overlap * scale)
        return replace(self, lora_a=a, lora_b=b, experts=relation, **squares)


Merged = Mapping[str, MergedSite]  # by site
Keep = Callable[[Tensor], Tensor]
Tick = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class OpenSite:
    """What of a site no weight changes: its experts as read, and their core form where the space has one."""

    factors: list[Factors | None]
    updates: Any = None  # CoreUpdates
    others: Any = None  # OpenSite of the experts that are not added


def merge(
    experts: Sequence[Expert], *, dtype: torch.dtype = torch.float64, keep: Keep = lambda a: a, **settings: Any
) -> dict[str, MergedSite]:
    """`run_plan` of the `settings`, which are those of `make_plan`."""
    return run_plan(make_plan(experts, **settings), dtype=dtype, keep=keep)


def run_plan(
    plan: Plan, *, dtype: torch.dtype = torch.float64, keep: Keep = lambda a: a, on_site: Tick = lambda site: None
) -> dict[str, MergedSite]:
    """The merged update of every site that some expert has and no rule drops, in the order of the sites.

    An expert without a site counts as a zero update there. `dtype` is that of the algebra. `keep` stores each factor
    once its site is done, such as a spool, so that memory is one site's.
    """
    jobs = [with_shared(job, dtype) for job in plan.jobs]
    merged = {}
    for site, number in plan.sites.items():
        if number is not None:
            job = jobs[number]
            result = merge_site(job, site, open_site(job, site, dtype), dtype)
            merged[site] = replace(result, lora_a=keep(result.lora_a), lora_b=keep(result.lora_b))
        on_site(site)
    return merged


def cached_merge(
    experts: Sequence[Expert], *, dtype: torch.dtype = torch.float64, **settings: Any
) -> Callable[[Weights | None], dict[str, MergedSite]]:
    """`merge(experts, weights=..., **settings)` as a function of the weights alone, with the same result.

    For searches: what no weight changes is kept, the factors and the core form of every site, as much memory as the
    experts.
    """
    plan = make_plan(experts, **settings)
    shared = [with_shared(job, dtype) for job in plan.jobs]
    numbers = {site: number for site, number in plan.sites.items() if number is not None}
    opened = {site: open_site(plan.jobs[number], site, dtype) for site, number in numbers.items()}

    def remerge(weights: Weights | None) -> dict[str, MergedSite]:
        plan = make_plan(experts, weights=weights, **settings)
        jobs = [_with_options(job, prepared) for job, prepared in zip(plan.jobs, shared, strict=True)]
        return {s: merge_site(jobs[n], s, opened[s], dtype) for s, n in numbers.items()}

    return remerge


def _with_options(job: Job, prepared: Job) -> Job:
    others = job.others and prepared.others and _with_options(job.others, prepared.others)
    return replace(job, options=prepared.options, others=others)


def with_shared(job: Job, dtype: torch.dtype) -> Job:
    """The job with its method's statistics over all its sites."""
    if not job.method.prepare:
        return job
    if job.others is not None:
        return replace(job, others=with_shared(job.others, dtype))
    stacks = (open_stack(job, site, dtype) for site in job.weights)
    shared = import_function(f"methods.{job.method.prepare}")(stacks, **job.options)
    return replace(job, options={**job.options, "shared": shared})


def open_site(job: Job, site: str, dtype: torch.dtype) -> OpenSite:
    factors = factors_of(job.experts, site, dtype)
    if job.others is not None:
        there = any(site in expert.ranks for expert in job.others.experts)
        return OpenSite(factors=factors, others=open_site(job.others, site, dtype) if there else None)
    if job.space not in ("core", "rows"):
        return OpenSite(factors=factors)
    canonical = job.space == "rows" or not job.method.is_sum
    more = job.options.get("directions", 0) if job.method.reads_inputs else 0
    apart = own_directions([e.moments(site) for e in job.experts if site in e.ranks], more) if more else None
    return OpenSite(factors=factors, updates=core.to_core(factors, canonical=canonical, more=apart))


def merge_site(job: Job, site: str, opened: OpenSite, dtype: torch.dtype) -> MergedSite:
    weights = job.weights[site].to(dtype)
    low, relation = (_merged if job.others is None else _and_added)(job, site, opened, weights)
    energy = float(low.singular_values.square().sum())
    shared: dict[str, Any] = {name: getattr(low, name) for name in ("lora_a", "lora_b", "kept", "lost")}
    result = MergedSite(weights=weights, energy=energy, experts=relation, **shared)
    return result if job.scale[site] == 1 else result.scaled(job.scale[site])


def _merged(job: Job, site: str, opened: OpenSite, weights: Tensor) -> tuple[LowRank, Relation]:
    """In the job's space, at the job's norm."""
    low = _SPACES[job.space](job, site, opened, weights)
    by_core = job.space == "core"
    relation = core.relate_cores(low, opened.updates.cores) if by_core else core.relate(low, opened.factors)
    length = float(low.singular_values.square().sum().sqrt())
    shares = weights.abs() * (relation.energy > 0)
    lengths = float((shares @ relation.energy.sqrt()) / shares.sum()) if shares.any() else 0.0
    if job.norm == "own" or length <= core.SPAN_TOLERANCE * lengths:  # what cancelled is rounding
        return low, relation
    factor = lengths / length
    return low.scaled(factor), replace(relation, overlap=relation.overlap * factor)


def _and_added(job: Job, site: str, opened: OpenSite, weights: Tensor) -> tuple[LowRank, Relation]:
    """What the others merge to, as if alone, and the added experts' updates."""
    parts = [(pair[0], weight * pair[1]) for name, pair, weight in zip(job.names, opened.factors, weights, strict=True)
             if pair is not None and name in job.added]  # fmt: skip
    if job.others is not None and opened.others is not None:
        low, _ = _merged(job.others, site, opened.others, job.others.weights[site].to(weights.dtype))
        parts.append((low.lora_a, low.lora_b))
    updates = core.to_core(parts, canonical=False)
    low = _cut(job, site, weights, updates, updates.cores.sum(0))
    return low, core.relate(low, opened.factors)


def _cut(job: Job, site: str, weights: Tensor, updates: CoreUpdates, merged: Tensor) -> LowRank:
    """A matrix in core axes at the job's rank."""
    metric = metric_in(job, site, weights, updates.a)
    return core.compress(updates, merged, job.rank, sum(job.about(site)["ranks"]), metric)


def _in_core(job: Job, site: str, opened: OpenSite, weights: Tensor) -> LowRank:
    updates = opened.updates
    stack = stack_of(matrices=updates.cores, **job.about(site))
    if job.method.reads_inputs:
        stack = replace(stack, inputs=moments_in(job, site, updates.a))
    return _cut(job, site, weights, updates, job.method.function(stack, weights, **job.options))


def moments_in(job: Job, site: str, basis: Basis) -> Callable[[int], Tensor]:
    """The second moments of an expert's inputs in a basis of them, by its number."""

    def read(number: int) -> Tensor:
        own = job.experts[number].moments(site)
        return own.within(basis.project(own.root.to(basis.turn.dtype)))

    return read


def metric_in(job: Job, site: str, weights: Tensor, basis: Basis | None = None) -> Tensor | None:
    """The second moments of all experts' inputs in a basis, or as they are; None where the rank is not cut by these.

    An expert's count in the share of its weight, or alike where all weights are 0. Those of an added expert are the
    others' together, and count where no other has the site.
    """
    if job.metric != "inputs":
        return None
    here = [number for number, expert in enumerate(job.experts) if site in expert.ranks]
    here = [number for number in here if job.names[number] not in job.added] or here
    shares = weights.abs() if weights[here].any() else torch.ones_like(weights)
    read = moments_in(job, site, basis) if basis else lambda number: job.experts[number].moments(site).dense()
    return sum((shares[number] * read(number) for number in here if shares[number]), start=torch.zeros(()))


def _in_rows(job: Job, site: str, opened: OpenSite, weights: Tensor) -> LowRank:
    """Rows in the experts' common output directions, columns as they are: KnOTS (Stoica et al. 2025, equation 2)."""
    updates = opened.updates
    inputs = (lambda k: job.experts[k].moments(site).dense()) if job.method.reads_inputs else None
    stack = stack_of(matrices=updates.cores @ updates.q_a.T, inputs=inputs, **job.about(site))
    merged = job.method.function(stack, weights, **job.options)
    both = core.to_core([(merged, updates.q_b)])
    return _cut(job, site, weights, both, both.cores[0])


def _in_dense(job: Job, site: str, opened: OpenSite, weights: Tensor) -> LowRank:
    norms = [core.inner_product(f, f).sqrt() if f else weights.new_zeros(()) for f in opened.factors]
    stack = dense_stack(job, site, lambda: opened.factors, weights.dtype)
    stack = replace(stack, rounding=rounding_of(torch.stack(norms)))
    merged = job.method.function(stack, weights, **job.options)
    return core.compress_dense(merged, job.rank, sum(stack.ranks), metric_in(job, site, weights))


def _in_factors(job: Job, site: str, opened: OpenSite, weights: Tensor) -> LowRank:
    """A and B apart, as PEFT's `linear` and `ties` do: both carry the root of the scale and of the weight.

    A mixture of N experts then holds N (N - 1) products of one expert's B with another's A that no mixture has,
    and its result depends on how each expert is factored.
    """
    a, b = factor_stacks(job, site, opened.factors)
    root = weights.abs().sqrt()
    function, options = job.method.function, job.options
    if job.method.joint:
        pair = function(a, b, weights, **options)
    else:
        pair = function(a, weights.sign() * root, **options), function(b, root, **options)
    updates = core.to_core([pair])
    return _cut(job, site, weights, updates, updates.cores[0])


_SPACES = {"core": _in_core, "rows": _in_rows, "dense": _in_dense, "factor": _in_factors}


def open_stack(job: Job, site: str, dtype: torch.dtype) -> Stack:
    """A site's stack for statistics over the whole model."""
    if job.space in ("core", "rows"):
        updates = core.to_core(factors_of(job.experts, site, dtype))
        matrices = updates.cores if job.space == "core" else updates.cores @ updates.q_a.T
        return stack_of(matrices=matrices, **job.about(site))
    if job.space == "dense":
        return dense_stack(job, site, lru_cache(1)(lambda: factors_of(job.experts, site, dtype)), dtype)
    raise ValueError("options.scope: 'model' has no meaning in space factor; use scope=tensor")


def dense_stack(job: Job, site: str, factors: Callable[[], list[Factors | None]], dtype: torch.dtype) -> Stack:
    """Rows of the dense updates, each made when it is read."""
    shape = next(expert.shapes[site] for expert in job.experts if site in expert.shapes)

    def read(start: int, stop: int) -> Tensor:
        zero = torch.zeros(stop - start, shape[1], dtype=dtype)
        return torch.stack([zero if f is None else f[1][start:stop] @ f[0] for f in factors()])

    return Stack(shape=shape, read=read, **job.about(site))


def factor_stacks(job: Job, site: str, factors: list[Factors | None]) -> tuple[Stack, Stack]:
    """All A and all B of a site, each with the root of the scale; ValueError where the ranks differ."""
    about = job.about(site)
    if len(set(about["ranks"])) > 1:
        ranks = dict(zip(job.names, about["ranks"], strict=True))
        raise ValueError(f"space: factor needs one rank for all experts, and {site} has {ranks}; use core")
    present = [f for f in factors if f is not None]
    scales = [site_scaling(expert.config, site) ** 0.5 for expert in job.experts]
    a = torch.stack([f[0] * s for f, s in zip(present, scales, strict=True)])
    b = torch.stack([f[1] / s for f, s in zip(present, scales, strict=True)])
    return stack_of(matrices=a, **about), stack_of(matrices=b, **about)
