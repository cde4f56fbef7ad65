"""What a merge kept of each expert: in total, by layer, by site.

Retention of expert i is <dW_merged, dW_i> / |dW_i|^2: 1 where the merge does all that it did along its direction.
"""

import re
from collections.abc import Sequence
from typing import Any

from moa.merging.adapters import Expert
from moa.merging.merge import Merged, MergedSite


def layer_of(site: str) -> str:
    """The numbered block of a site, or its parent module where there is none."""
    match = re.match(r"(.*?\.\d+)(\.|$)", site)
    return match[1] if match else site.rpartition(".")[0] or site


def summarise(experts: Sequence[Expert], merged: Merged) -> dict[str, dict[str, Any]]:
    """What a merge kept, for JSON: in total, per layer and per site, each with every expert."""
    layers: dict[str, dict[str, MergedSite]] = {}
    for site, result in merged.items():
        layers.setdefault(layer_of(site), {})[site] = result
    return {
        "total": _kept(experts, merged),
        "layers": {layer: _kept(experts, sites) for layer, sites in layers.items()},
        "sites": {site: _kept(experts, {site: result}) for site, result in merged.items()},
    }


def _kept(experts: Sequence[Expert], merged: Merged) -> dict[str, Any]:
    results = list(merged.values())
    energy = sum(result.energy for result in results)
    kept, lost = (sum(getattr(result, name) for result in results) for name in ("kept", "lost"))
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
        "energy_kept": kept / (kept + lost) if kept + lost else 1.0,
        "experts": rows,
    }
