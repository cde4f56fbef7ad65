"""Which sites are merged how: a merge's settings and rules for some sites, checked before any weight is read.

layers.0.self_attn.q_proj   first rule that matches   ->  one Job: method, space, rank, weights, scale
layers.0.mlp.down_proj      no rule                   ->  the Job of the merge's own settings
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moa.files import peft as peft_io
from moa.files.targets import finds, fits
from moa.merging.core import Expert, Factors, parse_rank
from moa.merging.methods.method import Method
from moa.merging.methods.stack import stack_of
from moa.merging.methods.table import check_options, find_method

Number = int | float
Weights = Mapping[str, Number] | Mapping[str, Mapping[str, Number]]  # by expert, or site -> expert


@dataclass(frozen=True, kw_only=True)
class SiteRule:
    """Other settings for the sites that `match`; what is null is the merge's own."""

    match: (
        str  # regular expression, found anywhere in a site's path; the first rule that fits decides
    )
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # null method: on top of the merge's own
    weights: Any = None
    rank: Any = None
    space: str | None = None
    scale: list[float] = field(
        default_factory=lambda: [1.0]
    )  # of the result, along the depth: [0.2, 1] rises from the first layer to the last
    drop: bool = False  # leave the base as it is at these sites

    def __post_init__(self) -> None:
        fits(self.match, "", "sites.match")
        if self.rank is not None:
            parse_rank(self.rank)
        if not all(map(math.isfinite, self.scale)):
            raise ValueError(f"sites.scale: of {self.match!r} must be finite, got {self.scale}")
        if not self.scale:
            raise ValueError(
                f"sites.scale: of {self.match!r} is empty; one number, or several along the depth"
            )


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

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(expert.name for expert in self.experts)

    def factors(self, site: str, dtype: torch.dtype) -> list[Factors | None]:
        return [e.factors(site, dtype) if site in e.ranks else None for e in self.experts]

    def about(self, site: str) -> dict[str, Any]:
        """What a stack of this site says of itself."""
        ranks = tuple(expert.ranks.get(site, 0) for expert in self.experts)
        return {"site": site, "experts": self.names, "ranks": ranks, "depth": self.depths[site]}


@dataclass(frozen=True, kw_only=True)
class Plan:
    jobs: Sequence[Job]
    sites: Mapping[
        str, int | None
    ]  # -> number of its job, in the order of the experts' sites; None: dropped


def make_plan(
    experts: Sequence[Expert],
    *,
    method: str = "linear",
    options: Mapping[str, Any] | None = None,
    weights: Weights | None = None,
    rank: int | str = "sum",
    space: str | None = None,
    rules: Sequence[SiteRule] = (),
) -> Plan:
    """What `merge` does at every site.

    `weights` by expert name, or per site; None is the method's own default, as is a `space` of None. Raises ValueError
    for experts that do not fit together, for unknown methods, options, weights, spaces and ranks, and for a rule that
    decides no site.
    """
    check_experts(experts)
    own = SiteRule(
        match="",
        method=method,
        options=dict(options or {}),
        weights=weights,
        rank=rank,
        space=space,
    )
    chosen = {site: _first_match(rules, site) for site in all_sites(experts)}
    if all(index is not None and rules[index].drop for index in chosen.values()):
        raise ValueError("sites: the rules drop every site")
    jobs: list[Job] = []
    numbers: dict[int | None, int | None] = {}
    for index in (*range(len(rules)), None):
        sites = [site for site, found in chosen.items() if found == index]
        if index is not None and not sites:
            raise ValueError(
                f"sites: {rules[index].match!r} decides no site; rules before it, or none, match"
            )
        dropped = index is not None and rules[index].drop
        numbers[index] = None if dropped or not sites else len(jobs)
        if sites and not dropped:
            jobs.append(_job(experts, sites, own if index is None else _over(own, rules[index])))
    find_method(method, space)  # even where rules decide every site
    return Plan(jobs=jobs, sites={site: numbers[index] for site, index in chosen.items()})


def _first_match(rules: Sequence[SiteRule], site: str) -> int | None:
    return next((i for i, rule in enumerate(rules) if finds(rule.match, site, "sites.match")), None)


def _over(own: SiteRule, rule: SiteRule) -> SiteRule:
    """A rule with the merge's own settings where it has none; another method brings its own options and space."""
    same = rule.method in (None, own.method)
    return SiteRule(
        match=rule.match,
        method=rule.method or own.method,
        options={**own.options, **rule.options} if same else rule.options,
        weights=own.weights if rule.weights is None else rule.weights,
        rank=own.rank if rule.rank is None else rule.rank,
        space=rule.space or (own.space if same else None),
        scale=rule.scale,
    )


def _job(experts: Sequence[Expert], sites: Sequence[str], settings: SiteRule) -> Job:
    name = str(settings.method)
    row = find_method(name, settings.space)
    depths = find_depths(tuple(all_sites(experts)))
    return Job(
        experts=experts,
        method=row,
        space=settings.space or row.spaces[0],
        rank=parse_rank(settings.rank),
        options=check_options(name, settings.options),
        weights=weight_table(experts, settings.weights, row.default_weights, sites),
        scale={site: _along(settings.scale, depths[site]) for site in sites},
        depths=depths,
    )


def _along(values: Sequence[float], depth: float) -> float:
    """Linear between the values, which lie at equal distances from depth 0 to 1."""
    place = depth * (len(values) - 1)
    left = min(int(place), len(values) - 1)
    right = min(left + 1, len(values) - 1)
    return values[left] + (place - left) * (values[right] - values[left])


def sum_gates(plan: Plan) -> dict[str, Float[Tensor, " expert"]] | None:
    """The gates of the mixture that a merge equals, per site; None where some method is no sum."""
    if any(not job.method.is_sum or job.space == "factor" for job in plan.jobs):
        return None  # sums of factors have cross terms
    count = len(plan.jobs[0].experts)
    zeros = torch.zeros(count, dtype=torch.float64)
    return {
        site: zeros if number is None else _coefficients(plan.jobs[number], site)
        for site, number in plan.sites.items()
    }


def _coefficients(job: Job, site: str) -> Float[Tensor, " expert"]:
    """On one-hot "updates" [expert, 1, expert] a sum returns its own coefficients."""
    one_hot = torch.eye(len(job.names), dtype=torch.float64)[:, None]
    about = {**job.about(site), "ranks": (1,) * len(job.names)}
    stack = stack_of(matrices=one_hot, **about)
    return job.scale[site] * job.method.function(stack, job.weights[site], **job.options)[0]


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


def check_base_names(experts: Sequence[Expert]) -> None:
    """ValueError where the adapters name different bases; names prove little, so `base=` decides over them."""
    bases = {e.name: e.config.get("base_model_name_or_path") for e in experts}
    if len({base_stem(base) for base in bases.values() if base}) > 1:
        raise ValueError(
            f"adapters: they belong to different bases: {bases}; if these are one base under several names or a "
            "quantised copy of it, give base=FOLDER"
        )


def base_stem(name: str) -> str:
    """The last part of a base's name or path; of a folder in the hub's cache, its name on the hub."""
    cached = re.search(r"models--[^/]*?--([^/]+)/snapshots/", f"{name}/")
    return cached[1] if cached else Path(name).name


def check_experts(experts: Sequence[Expert]) -> None:
    """Raise ValueError unless the experts can be summed: own names, one shape per site."""
    if not experts:
        raise ValueError("adapters: names none")
    names = [expert.name for expert in experts]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"adapters: two experts are called {name!r}; rename one folder")
    if len({bool(e.config.get("fan_in_fan_out")) for e in experts}) > 1:
        raise ValueError("adapters: fan_in_fan_out differs, so they belong to different bases")
    for site in all_sites(experts):
        shapes = {e.name: e.shapes[site] for e in experts if site in e.shapes}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"adapters: they belong to different bases: {site} is {shapes}")
        for expert in experts:
            if site not in expert.ranks and peft_io.is_target(expert.config, site):
                raise ValueError(
                    f"adapters: {expert.name} lacks {site}, which its target_modules name and "
                    f"{next(iter(shapes))} has; its file is incomplete"
                )


def weight_table(
    experts: Sequence[Expert],
    weights: Weights | None,
    default: str = "ones",
    sites: Sequence[str] | None = None,
) -> dict[str, Float[Tensor, " expert"]]:
    """Site -> weight of each expert, float64; ValueError names a missing, unknown or odd weight."""
    names = [expert.name for expert in experts]
    sites = all_sites(experts) if sites is None else sites
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
