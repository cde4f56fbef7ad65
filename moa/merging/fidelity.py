"""What a merge is made of and what it lost: numbers for JSON, one site at a time, all from the factors.

interference of the experts   cosine of every pair, overlap of their directions, mass that signs cancel
what became of each           norm, retention <W, dW_i> / |dW_i|^2, energy inside the result's span
what the method did           energy outside the experts' span, cut by the rank, cross terms of factor methods
what it looks like            singular values of each expert and of the result, values of A, B and the update
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moa.merging.core import CoreUpdates, Expert, Factors, to_core
from moa.merging.merge import MergedSite
from moa.merging.plan import all_sites
from moa.merging.summary import layer_of

SAMPLED_ROWS = (
    128  # of a dense update, evenly spread: for signs and values, which the core does not have
)
HISTOGRAM_BINS = 41


def measure(
    experts: Sequence[Expert],
    merged: dict[str, MergedSite] | None = None,
    *,
    on_site: Callable[[str], None] = lambda site: None,
) -> dict[str, Any]:
    """The fidelity record of experts, and of what they were merged to: `experts`, `sites` and `layers`, for JSON."""
    names = [expert.name for expert in experts]
    sites = {}
    for site in merged or all_sites(experts):  # dropped sites have no outcome
        factors = [e.factors(site, torch.float64) if site in e.ranks else None for e in experts]
        sites[site] = measure_site(factors, merged[site] if merged else None)
        on_site(site)
    layers: dict[str, list[dict[str, Any]]] = {}
    for site, row in sites.items():
        layers.setdefault(layer_of(site), []).append(row)
    return {
        "experts": names,
        "sites": sites,
        "layers": {layer: _over_sites(rows) for layer, rows in layers.items()},
        "total": _over_sites(list(sites.values())),
    }


def measure_site(factors: Sequence[Factors | None], merged: MergedSite | None) -> dict[str, Any]:
    """Of one site; None for an expert that has none there."""
    updates = to_core(factors)
    record = {
        "norms": updates.cores.square().sum((1, 2)).sqrt().tolist(),
        "cosine": cosines(updates.cores).tolist(),
        "overlap": subspace_overlap(updates.cores).tolist(),
        "sign_conflict": sign_conflict(factors),
        "singular_values": [_spectrum(core) for core in updates.cores],
        "zero_rows": [0 if f is None else int((f[0] == 0).all(1).sum()) for f in factors],
        "histograms": {
            name: _histogram(_values(factors, part))
            for part, name in enumerate(("A", "B", "update"))
        },
    }
    if merged is not None:
        record["merged"] = _outcome(updates, merged)
    return record


def cosines(cores: Float[Tensor, "expert rows cols"]) -> Float[Tensor, "expert expert"]:
    """Between the updates of every pair; 0 with an update of zeros."""
    flat = cores.flatten(1)
    norms = flat.norm(dim=1)
    product = norms[:, None] * norms
    return torch.where(product > 0, flat @ flat.T / product.clamp(min=1e-300), 0.0)


def subspace_overlap(cores: Float[Tensor, "expert rows cols"]) -> Float[Tensor, "expert expert"]:
    """Share of directions that two experts have in common: mean of |U_i^T U_j|^2 / min rank over outputs and inputs."""
    bases = [_directions(core) for core in cores]
    table = cores.new_zeros(len(cores), len(cores))
    for i, (u_i, v_i) in enumerate(bases):
        for j, (u_j, v_j) in enumerate(bases):
            size = min(u_i.shape[1], u_j.shape[1])
            if size:
                shared = (u_i.T @ u_j).square().sum() + (v_i.T @ v_j).square().sum()
                table[i, j] = shared / (2 * size)
    return table


def _directions(core: Float[Tensor, "rows cols"]) -> tuple[Tensor, Tensor]:
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    live = s > 1e-9 * s.max()
    return u[:, live], v[live].T


def sign_conflict(factors: Sequence[Factors | None]) -> float:
    """1 - sum |sum_i x_i| / sum sum_i |x_i| over entries: 0 where all pull the same way, 1 where all cancels."""
    rows = torch.stack([_some_rows(pair) for pair in factors if pair is not None])
    mass = rows.abs().sum()
    return float(1 - rows.sum(0).abs().sum() / mass) if mass else 0.0


def _some_rows(pair: Factors) -> Float[Tensor, "_ in"]:
    count = pair[1].shape[0]
    chosen = torch.linspace(0, count - 1, min(count, SAMPLED_ROWS)).round().long()
    return pair[1][chosen] @ pair[0]


def _outcome(updates: CoreUpdates, merged: MergedSite) -> dict[str, Any]:
    inside = (
        updates.b.project(merged.lora_b.double()) @ updates.a.project(merged.lora_a.double().T).T
    )
    energy = merged.energy
    plain_sum = torch.einsum("e,erc->rc", merged.weights.double(), updates.cores)
    return {
        "norm": energy**0.5,
        "rank": merged.lora_a.shape[0],
        "singular_values": merged.lora_b.norm(dim=0).square().tolist(),
        "singular_values_of_sum": _spectrum(plain_sum),  # before the method pruned and scaled
        "cut_by_rank": merged.lost / (energy + merged.lost) if energy + merged.lost else 0.0,
        "outside_span": max(1 - float(inside.square().sum()) / energy, 0.0) if energy else 0.0,
        "retention": _ratio(merged.experts.overlap, merged.experts.energy),
        "energy_in_span": _ratio(merged.experts.span_energy, merged.experts.energy),
        "weights": merged.weights.tolist(),
    }


def _ratio(part: Tensor, whole: Tensor) -> list[float | None]:
    return [p / w if w else None for p, w in zip(part.tolist(), whole.tolist(), strict=True)]


def cross_terms(pairs: Sequence[Factors], weights: Float[Tensor, " expert"]) -> float:
    """|(sum B_i)(sum A_i) - sum B_i A_i| / |sum B_i A_i|, roots of the weights in both: what factor methods add."""
    root = weights.abs().sqrt()
    a = sum((w.sign() * r * pair[0] for w, r, pair in zip(weights, root, pairs, strict=True)))
    b = sum((r * pair[1] for r, pair in zip(root, pairs, strict=True)))
    wanted = [(w * pair[0], pair[1]) for w, pair in zip(weights, pairs, strict=True)]
    updates = to_core([*wanted, (a, b)])
    exact = updates.cores[:-1].sum(0)
    norm = exact.norm()
    return float((updates.cores[-1] - exact).norm() / norm) if norm else 0.0


def mean_cross_terms(
    experts: Sequence[Expert], weights: Mapping[str, Float[Tensor, " expert"]]
) -> float:
    """Mean of `cross_terms` over the sites that all experts have with one rank; 0 where there is none."""
    found = []
    for site, row in weights.items():
        if len({expert.ranks.get(site) for expert in experts}) == 1:
            found.append(cross_terms([e.factors(site, torch.float64) for e in experts], row))
    return sum(found) / len(found) if found else 0.0


def _spectrum(core: Float[Tensor, "rows cols"]) -> list[float]:
    values = torch.linalg.svdvals(core)
    return values[values > 1e-9 * values.max()].tolist()


def _values(factors: Sequence[Factors | None], part: int) -> Tensor:
    present = [pair for pair in factors if pair is not None]
    if part < 2:
        return torch.cat([pair[part].flatten() for pair in present])
    return torch.cat([_some_rows(pair).flatten() for pair in present])


def _histogram(values: Tensor) -> dict[str, Any]:
    """Share of values in equal bins up to four standard deviations; the outermost bins hold what lies beyond."""
    limit = float(4 * values.std(unbiased=False)) or 1.0
    counts = torch.histc(values.clamp(-limit, limit).float(), HISTOGRAM_BINS, -limit, limit)
    return {"limit": limit, "share": (counts / max(values.numel(), 1)).tolist()}


def _over_sites(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of several sites, each by the energy of its updates."""
    norms = torch.tensor([row["norms"] for row in rows], dtype=torch.float64)
    energy = norms.square()
    share = energy.sum(1) / energy.sum().clamp(min=1e-300)

    def mean(name: str) -> Any:
        return torch.einsum(
            "s,s...->...", share, torch.tensor([row[name] for row in rows], dtype=torch.float64)
        ).tolist()

    record = {
        "norms": energy.sum(0).sqrt().tolist(),
        "cosine": mean("cosine"),
        "overlap": mean("overlap"),
        "sign_conflict": mean("sign_conflict"),
    }
    if "merged" in rows[0]:
        record["merged"] = _merged_over_sites([row["merged"] for row in rows], energy)
    return record


def _merged_over_sites(rows: Sequence[dict[str, Any]], energy: Tensor) -> dict[str, Any]:
    own = torch.tensor([row["norm"] ** 2 for row in rows], dtype=torch.float64)
    whole = own.sum().clamp(min=1e-300)

    def kept(name: str) -> list[float]:
        values = torch.tensor([[v or 0.0 for v in row[name]] for row in rows], dtype=torch.float64)
        return ((values * energy).sum(0) / energy.sum(0).clamp(min=1e-300)).tolist()

    return {
        "norm": float(own.sum().sqrt()),
        "retention": kept("retention"),
        "energy_in_span": kept("energy_in_span"),
        **{
            name: float((own * torch.tensor([row[name] for row in rows])).sum() / whole)
            for name in ("cut_by_rank", "outside_span")
        },
    }
