"""How strongly experts answer to each other's inputs, and what a merge changes of their outputs, from the statistics.

crosstalk   E|dW_j x_k|^2 / E|dW_k x_k|^2 of expert j on the inputs of k, as training logs it
residual    E|(dW - dW_k) x_k|^2 / E|dW_k x_k|^2 of the merged update dW; always-on experts are part of every dW_k

With E[x x^T] = L L^T + rest I of moa/statistics, and without a matrix of the outputs' size.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from moa.merging.adapters import Expert
from moa.merging.core import Factors, inner_product
from moa.statistics.moments import Moments

Table = list[list[float | None]]


def output_energy(update: Factors, moments: Moments) -> float:
    """E|B A x|^2"""
    a, b = update
    within = a @ moments.root.to(a)
    return float(((b.T @ b @ within) * within).sum() + moments.rest * inner_product(update, update))


def joined(updates: Sequence[Factors]) -> Factors:
    """The factors of a sum."""
    return torch.cat([a for a, _ in updates]), torch.cat([b for _, b in updates], dim=1)


def site_crosstalk(
    experts: Sequence[Expert],
    site: str,
    factors: Sequence[Factors | None],
    merged: Factors | None = None,
    shared: Collection[str] = (),
) -> dict[str, Any]:
    """`crosstalk`, at [k][j], and `residual`, at [k], of one site; empty without statistics of any routed expert.

    None at k == j, for `shared` experts, which are always on, and where an expert has no statistics, has not the site,
    or does nothing there, on its own samples.
    """
    if all(expert.inputs is None for expert in experts if expert.name not in shared):
        return {}
    always = [f for e, f in zip(experts, factors, strict=True) if e.name in shared and f is not None]
    table: Table = [[None] * len(experts) for _ in experts]
    residual: list[float | None] = [None] * len(experts)
    for k, (expert, own) in enumerate(zip(experts, factors, strict=True)):
        if own is None or expert.inputs is None or expert.name in shared:
            continue
        moments = expert.inputs(site)
        energy = output_energy(own, moments) if moments.tokens else 0.0
        if energy <= 0:
            continue
        for j, other in enumerate(factors):
            if j != k and experts[j].name not in shared:
                table[k][j] = output_energy(other, moments) / energy if other is not None else 0.0
        if merged is not None:
            whole = joined([own, *always])
            less = whole[0], -whole[1]
            error = output_energy(joined([(merged[0].to(own[0]), merged[1].to(own[0])), less]), moments)
            residual[k] = error / output_energy(whole, moments)
    return {"crosstalk": table} | ({} if merged is None else {"residual": residual})


def over_sites(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The means over the sites that have a value, by pair and by expert."""
    found: dict[str, Any] = {}
    if all("crosstalk" in row for row in rows):
        tables = [row["crosstalk"] for row in rows]
        places = range(len(tables[0]))
        found["crosstalk"] = [[mean([table[k][j] for table in tables]) for j in places] for k in places]
    if all("residual" in row for row in rows):
        found["residual"] = [mean(values) for values in zip(*(row["residual"] for row in rows), strict=True)]
    return found


def mean(values: Sequence[float | None]) -> float | None:
    """Of the values that there are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
