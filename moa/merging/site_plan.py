"""Which sites are merged how: a merge's settings and rules for some sites, checked before any weight is read.

layers.0.self_attn.q_proj   first rule that matches   ->  one Job: method, space, rank, weights, scale
layers.0.mlp.down_proj      no rule                   ->  the Job of the merge's own settings
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moa.files.targets import finds
from moa.merging.adapters import Expert, all_sites, check_experts
from moa.merging.methods.method import Method
from moa.merging.methods.stack import stack_of
from moa.merging.methods.table import check_options, find_method
from moa.merging.rank import parse_rank
from moa.merging.settings import Metric, Norm, SiteRule
from moa.merging.weights import Weights, weight_table

UNCUT = 1 << 30  # a rank that every matrix is below


@dataclass(frozen=True, kw_only=True)
class Job:
    """The same method for some sites, by site: what weight each expert has and how the result is scaled."""

    experts: Sequence[Expert]
    method: Method
    space: str
    rank: int | str
    options: Mapping[str, Any]
    weights: Mapping[str, Float[Tensor, " expert"]]  # float64
    scale: Mapping[str, float]
    depths: Mapping[str, float]
    metric: Metric = "weights"  # in which the rank is cut
    norm: Norm = "own"  # of what the experts merge to
    # experts whose weighted update is added to what the others merge to, which is this job's result without rank
    added: frozenset[str] = frozenset()
    others: "Job | None" = None  # of the experts that are not added, where some are

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(expert.name for expert in self.experts)

    def about(self, site: str) -> dict[str, Any]:
        """The fields of a stack of this site, beside its matrices."""
        ranks = tuple(expert.ranks.get(site, 0) for expert in self.experts)
        return {"site": site, "experts": self.names, "ranks": ranks, "depth": self.depths[site]}


@dataclass(frozen=True, kw_only=True)
class Plan:
    jobs: Sequence[Job]
    # -> number of its job, in the order of the experts' sites; None: dropped
    sites: Mapping[str, int | None]


def make_plan(
    experts: Sequence[Expert],
    *,
    method: str = "linear",
    options: Mapping[str, Any] | None = None,
    weights: Weights | None = None,
    rank: int | str = "sum",
    space: str | None = None,
    rules: Sequence[SiteRule] = (),
    metric: Metric = "weights",
    norm: Norm = "own",
    added: Collection[str] = (),
) -> Plan:
    """What `merge` does at every site.

    `weights` by expert name, or per site; None is the method's own default, as is a `space` of None. `added` experts
    are not merged but added, by default at weight 1: what shared experts need, which are on with each of the others.

    Raises ValueError for experts that do not fit together, for unknown methods, options, weights, spaces and ranks, for
    a rule that decides no site, and for a `metric` that no rank is cut in.
    """
    check_experts(experts)
    given: dict[str, Any] = {"method": method, "options": dict(options or {}), "weights": weights}
    own = SiteRule(match="", rank=rank, space=space, **given)
    settings = [*(_over(own, rule) for rule in rules), own]  # the last one fits every site
    chosen = {
        site: next(number for number, rule in enumerate(settings) if finds(rule.match, site, "sites.match"))
        for site in all_sites(experts)
    }
    if all(settings[index].drop for index in chosen.values()):
        raise ValueError("sites: the rules drop every site")
    jobs: list[Job] = []
    numbers: dict[int, int] = {}
    for index, rule in enumerate(settings):
        sites = [site for site, found in chosen.items() if found == index]
        if not sites and rule is not own:
            raise ValueError(f"sites: {rule.match!r} decides no site; rules before it, or none, match")
        if sites and not rule.drop:
            numbers[index] = len(jobs)
            jobs.append(_job(experts, sites, rule, frozenset(added), metric=metric, norm=norm))
    if metric == "inputs" and all(job.rank == "sum" and job.space != "dense" for job in jobs):
        raise ValueError("metric: inputs has no effect with rank=sum, which cuts nothing; give rank=8, say")
    find_method(method, space)  # even where rules decide every site
    return Plan(jobs=jobs, sites={site: numbers.get(index) for site, index in chosen.items()})


def _over(own: SiteRule, rule: SiteRule) -> SiteRule:
    """A rule with the merge's own settings where it has none; another method has its own options and space."""
    same = rule.method in (None, own.method)
    return replace(
        rule,
        method=rule.method or own.method,
        options={**own.options, **rule.options} if same else rule.options,
        weights=own.weights if rule.weights is None else rule.weights,
        rank=own.rank if rule.rank is None else rule.rank,
        space=rule.space or (own.space if same else None),
    )


def _job(
    experts: Sequence[Expert], sites: Sequence[str], settings: SiteRule, added: frozenset[str], **about: Any
) -> Job:
    name = str(settings.method)
    row = find_method(name, settings.space)
    depths = find_depths(tuple(all_sites(experts)))
    job = Job(
        experts=experts,
        method=row,
        space=settings.space or row.spaces[0],
        rank=parse_rank(settings.rank),
        options=check_options(name, settings.options),
        weights=weight_table(experts, settings.weights, row.weights, sites, added),
        scale={site: _along(settings.scale, depths[site]) for site in sites},
        depths=depths,
        added=added,
        **about,
    )
    if not added:
        return job
    places = [place for place, expert in enumerate(experts) if expert.name not in added]
    own = {site: weights[places] for site, weights in job.weights.items()}
    some = [experts[place] for place in places]
    others = replace(job, experts=some, weights=own, rank=UNCUT, metric="weights", added=frozenset())
    return replace(job, others=others)


def _along(values: Sequence[float], depth: float) -> float:
    """Linear between the values, which are at equal distances from depth 0 to 1."""
    place = depth * (len(values) - 1)
    left = min(int(place), len(values) - 1)
    right = min(left + 1, len(values) - 1)
    return values[left] + (place - left) * (values[right] - values[left])


def sum_gates(plan: Plan) -> dict[str, Float[Tensor, " expert"]] | None:
    """The gates of the mixture that a merge equals, per site; None where some method is not a sum."""
    if any(not job.method.is_sum or job.space == "factor" or job.norm != "own" for job in plan.jobs):
        return None  # sums of factors have cross terms, and a norm is a scale that no gate has
    zeros = torch.zeros(len(plan.jobs[0].experts), dtype=torch.float64)
    return {
        site: zeros if number is None else _coefficients(plan.jobs[number], site) for site, number in plan.sites.items()
    }


def _coefficients(job: Job, site: str) -> Float[Tensor, " expert"]:
    """On one-hot "updates" [expert, 1, expert] a sum returns its own coefficients."""
    merged = job.others or job
    one_hot = torch.eye(len(merged.names), dtype=torch.float64)[:, None]
    about = {**merged.about(site), "ranks": (1,) * len(merged.names)}
    stack = stack_of(matrices=one_hot, **about)
    found = job.weights[site].clone()
    places = [place for place, name in enumerate(job.names) if name not in job.added]
    found[places] = merged.method.function(stack, merged.weights[site], **job.options)[0]
    return job.scale[site] * found


def layer_of(site: str) -> str:
    """The numbered block of a site, or its parent module where there is none."""
    match = re.match(r"(.*?\.\d+)(\.|$)", site)
    return match[1] if match else site.rpartition(".")[0] or site


@lru_cache(8)
def find_depths(sites: tuple[str, ...]) -> dict[str, float]:
    """Where each site's numbered block lies among its stack's: 0 the first, 1 the last; 0 where it has no number."""
    numbers = {site: re.match(r"(.*?)\.(\d+)(\.|$)", site) for site in sites}
    last: dict[str, int] = {}
    for match in numbers.values():
        if match:
            last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    return {site: int(match[2]) / max(last[match[1]], 1) if match else 0.0 for site, match in numbers.items()}
