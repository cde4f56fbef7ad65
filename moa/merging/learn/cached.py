"""Merging again with other weights, in milliseconds: for searches, with any method.

experts -> read, core form, whole-model statistics: once      weights -> method -> SVD of a small core: each time
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from moa.merging.adapters import Expert
from moa.merging.merge import MergedSite, merge_site, open_site, with_shared
from moa.merging.site_plan import Job, make_plan
from moa.merging.weights import Weights


def cached_merge(
    experts: Sequence[Expert], *, dtype: torch.dtype = torch.float64, **settings: Any
) -> Callable[[Weights | None], dict[str, MergedSite]]:
    """`merge(experts, weights=..., **settings)` as a function of the weights alone, with the same result.

    Keeps every expert's factors and, where the method works there, the core form of every site, in `dtype`: as much
    memory as the experts. Raises ValueError as `make_plan` does.
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
