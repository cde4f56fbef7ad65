"""What a merge is made of and what it lost: numbers for JSON, one site at a time, all from the factors.

interference of the experts   cosine and sign disagreement of every pair, overlap of their directions, cross terms
on their own inputs           crosstalk of every pair, and the result's residual, where statistics lie beside them
what became of each           norm, retention <W, dW_i> / |dW_i|^2, energy inside the result's span
what the method did           energy outside the experts' span, cut by the rank
what it looks like            singular values of each expert, of their sum and of the result; in one site of each layer
                              also values of A, B and the update, and singular values after pruning and scaling
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moa.files.peft_config import site_scaling
from moa.merging.adapters import Expert, all_sites, factors_of
from moa.merging.core import CoreUpdates, Factors, to_core
from moa.merging.merge import Merged, MergedSite
from moa.merging.report import interference
from moa.merging.report.interference import over_sites, site_crosstalk
from moa.merging.site_plan import layer_of

PRUNED_DENSITY = 0.2  # what RobustMerge keeps
TINY = 1e-300
Record = dict[str, Any]


def measure(
    experts: Sequence[Expert],
    merged: Merged | None = None,
    *,
    shared: Collection[str] = (),
    on_site: Callable[[str], None] = lambda site: None,
) -> Record:
    """The fidelity record of experts, and of what they were merged to, for JSON; `shared` names always-on experts.

    The record has `sites`, their means over `modules` (a site's parent), `layers` and in `total`, the names of the
    `experts`, and `views` of the values in each layer's site of the largest updates, which cost more than all else.
    """
    sites = {}
    for site in merged or all_sites(experts):  # dropped sites have no outcome
        sites[site] = measure_site(experts, site, merged[site] if merged else None, shared)
        on_site(site)
    largest: dict[str, str] = {}  # layer -> site
    for site in sorted(sites, key=lambda name: sum(norm**2 for norm in sites[name]["norms"])):
        largest[layer_of(site)] = site
    return {
        "experts": [expert.name for expert in experts],
        "sites": sites,
        "views": {site: view_site(experts, site) for site in sites if site in largest.values()},
        "modules": _grouped(sites, lambda site: site.rpartition(".")[0] or site),
        "layers": _grouped(sites, layer_of),
        "total": _over_sites(list(sites.values())),
    }


def measure_site(
    experts: Sequence[Expert], site: str, merged: MergedSite | None = None, shared: Collection[str] = ()
) -> Record:
    """Of one site. Lists have one entry for each expert, in their order; an expert without the site counts as zero."""
    factors = factors_of(experts, site)
    updates = to_core(factors, canonical=False)
    parts = [interference.decompose(core) for core in updates.cores]
    entries = interference.sample_entries(factors)
    weights = merged.weights if merged else torch.ones(len(experts), dtype=torch.float64)
    record = {
        "norms": updates.cores.square().sum((1, 2)).sqrt().tolist(),
        "cosine": interference.cosines(updates.cores).tolist(),
        "overlap": interference.subspace_overlap(parts).tolist(),
        "sign_disagreement": interference.sign_disagreement(entries).tolist(),
        "sign_conflict": interference.sign_conflict(entries),
        "cross_terms": site_cross_terms(experts, site, factors, weights),
        "singular_values": [s.tolist() for _, s, _ in parts],
        # ranks that do nothing: their row of A or their column of B is zero
        "zero_rows": [p and int(((p[0] == 0).all(1) | (p[1] == 0).all(0)).sum()) for p in factors],
    }
    result = None if merged is None else (merged.lora_a, merged.lora_b)
    record |= site_crosstalk(experts, site, factors, result, shared)
    if merged is not None:
        record["merged"] = _outcome(updates, merged)
    return record


def view_site(experts: Sequence[Expert], site: str) -> Record:
    """Values of A, B and the full updates at a site, and what pruning would make of each expert's spectrum."""
    factors = factors_of(experts, site)
    present = [pair for pair in factors if pair is not None]
    return {
        "density": PRUNED_DENSITY,
        "pruned": [p and interference.prune(p, PRUNED_DENSITY) for p in factors],
        "histograms": {
            "A": interference.histogram(torch.cat([a.flatten() for a, _ in present])),
            "B": interference.histogram(torch.cat([b.flatten() for _, b in present])),
            "update": interference.histogram(interference.sample_entries(present).flatten()),
        },
    }


def site_cross_terms(
    experts: Sequence[Expert], site: str, factors: Sequence[Factors | None], weights: Float[Tensor, " expert"]
) -> float | None:
    """`cross_terms` as PEFT's `linear` has them, the root of the scale in both factors; None where the ranks differ."""
    if len({expert.ranks.get(site) for expert in experts}) > 1:
        return None
    roots = [site_scaling(expert.config, site) ** 0.5 for expert in experts]
    pairs = [(f[0] * r, f[1] / r) for f, r in zip(factors, roots, strict=True) if f is not None]
    return interference.cross_terms(pairs, weights)


def mean_cross_terms(experts: Sequence[Expert], weights: Mapping[str, Float[Tensor, " expert"]]) -> float:
    """Mean of `site_cross_terms` over the sites that all experts have with one rank; 0 where there is none."""
    found = (site_cross_terms(experts, s, factors_of(experts, s), w) for s, w in weights.items())
    known = [ratio for ratio in found if ratio is not None]
    return sum(known) / len(known) if known else 0.0


def _outcome(updates: CoreUpdates, merged: MergedSite) -> Record:
    energy, a, b = merged.energy, merged.lora_a.double(), merged.lora_b.double()
    inside = updates.b.project(b) @ updates.a.project(a.T).T
    plain_sum = torch.einsum("e,erc->rc", merged.weights.double(), updates.cores)
    return {
        "norm": energy**0.5,
        "rank": merged.lora_a.shape[0],
        "singular_values": b.norm(dim=0).square().tolist(),
        "singular_values_of_sum": interference.decompose(plain_sum)[1].tolist(),  # before pruning
        "cut_by_rank": merged.lost / (merged.kept + merged.lost) if merged.kept + merged.lost else 0.0,
        "outside_span": max(1 - float(inside.square().sum()) / energy, 0.0) if energy else 0.0,
        "retention": _ratio(merged.experts.overlap, merged.experts.energy),
        "energy_in_span": _ratio(merged.experts.span_energy, merged.experts.energy),
        "weights": merged.weights.tolist(),
    }


def _ratio(part: Tensor, whole: Tensor) -> list[float | None]:
    return [p / w if w else None for p, w in zip(part.tolist(), whole.tolist(), strict=True)]


def _grouped(sites: Mapping[str, Record], group_of: Callable[[str], str]) -> dict[str, Record]:
    groups: dict[str, list[Record]] = {}
    for site, row in sites.items():
        groups.setdefault(group_of(site), []).append(row)
    return {name: _over_sites(rows) for name, rows in groups.items()}


def _over_sites(rows: Sequence[Record]) -> Record:
    """Of several sites as if they were one: what is about a pair counts by the product of its norms, else by energy."""
    norms = torch.tensor([row["norms"] for row in rows], dtype=torch.float64)
    energy = norms.square()
    whole = energy.sum(0).sqrt()
    product = torch.einsum("si,sj->sij", norms, norms)

    def mean(name: str, total: Tensor) -> Tensor:
        values = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        return (values * product).sum(0) / total.clamp(min=TINY)

    disagreement, met = mean("sign_disagreement", product.sum(0)).tolist(), product.sum(0).tolist()
    weighed = list(zip(rows, energy.sum(1).tolist(), strict=True))
    record: Record = {
        "norms": whole.tolist(),
        "cosine": mean("cosine", torch.outer(whole, whole)).tolist(),
        "overlap": mean("overlap", product.sum(0)).tolist(),
        # None for a pair that changes no site in common
        "sign_disagreement": [
            [v if m else None for v, m in zip(*pair, strict=True)] for pair in zip(disagreement, met, strict=True)
        ],
        "sign_conflict": _mean(weighed, "sign_conflict"),
        "cross_terms": _mean([(row, e) for row, e in weighed if row["cross_terms"] is not None], "cross_terms"),
        "zero_rows": [sum(row["zero_rows"][i] or 0 for row in rows) for i in range(len(whole))],
    }
    record |= over_sites(rows)
    if "merged" in rows[0]:
        record["merged"] = _merged_over_sites([row["merged"] for row in rows], energy)
    return record


def _mean(weighed: Sequence[tuple[Record, float]], key: str) -> float | None:
    """Of (row, weight); None of nothing."""
    if not weighed:
        return None
    return sum(row[key] * weight for row, weight in weighed) / max(sum(w for _, w in weighed), TINY)


def _merged_over_sites(rows: Sequence[Record], energy: Tensor) -> Record:
    own = [row["norm"] ** 2 for row in rows]

    def kept(name: str) -> list[float | None]:
        values = torch.tensor([[v or 0.0 for v in row[name]] for row in rows], dtype=torch.float64)
        return _ratio((values * energy).sum(0), energy.sum(0))

    ranks = [row["rank"] for row in rows]
    return {
        "norm": sum(own) ** 0.5,
        "rank": [min(ranks), max(ranks)],
        "retention": kept("retention"),
        "energy_in_span": kept("energy_in_span"),
        **{name: _mean(list(zip(rows, own, strict=True)), name) for name in ("cut_by_rank", "outside_span")},
    }


def summarise(experts: Sequence[Expert], merged: Merged) -> dict[str, dict[str, Any]]:
    """What a merge kept, for the console and merge_report.json: in total, per layer and per site, of every expert."""
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
