"""Merging again with other weights, in milliseconds: for searches, with any method.

experts -> read, core form, whole-model statistics: once      weights -> method -> SVD of a small core: each time
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from moa.merging.adapters import Expert
from moa.merging.merge import MergedSite, merge_site, open_site, with_shared
from moa.merging.site_plan import make_plan
from moa.merging.weights import Weights


class CachedMerge:
    """`merge(experts, weights=..., **settings)` as a function of the weights alone, with the same result.

    Keeps every expert's factors and, where the method works there, the core form of every site, in `dtype`: as much
    memory as the experts. Raises ValueError as `make_plan` does.
    """

    def __init__(
        self, experts: Sequence[Expert], *, dtype: torch.dtype = torch.float64, **settings: Any
    ) -> None:
        self.experts, self.dtype, self.settings = experts, dtype, settings
        plan = make_plan(experts, **settings)
        self._shared = [with_shared(job, dtype).options for job in plan.jobs]
        self._opened = {
            site: open_site(plan.jobs[number], site, dtype)
            for site, number in plan.sites.items()
            if number is not None
        }

    def __call__(self, weights: Weights | None) -> dict[str, MergedSite]:
        plan = make_plan(self.experts, weights=weights, **self.settings)
        jobs = [
            replace(job, options=options)
            for job, options in zip(plan.jobs, self._shared, strict=True)
        ]
        return {
            site: merge_site(jobs[number], site, self._opened[site], self.dtype)
            for site, number in plan.sites.items()
            if number is not None
        }
