"""How strongly experts answer to each other's inputs, and what a merge changes of their outputs, from the statistics.

crosstalk   E|dW_j x_k|^2 / E|dW_k x_k|^2 of expert j on the inputs of k, as training logs it
residual    E|(dW - dW_k) x_k|^2 / E|dW_k x_k|^2 of the merged update dW; always-on experts are part of every dW_k

With E[x x^T] = L L^T + rest I of moa/statistics, and without a matrix of the outputs' size.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moa.cli.command import note
from moa.files.peft import STATISTICS_FILE
from moa.merging.adapters import Expert
from moa.merging.core import Factors, inner_product
from moa.merging.source import Source
from moa.statistics.moments import Moments
from moa.statistics.stored import read_statistics

Table = list[list[float | None]]


def with_inputs(source: Source) -> Source:
    """With the statistics of the experts' inputs, where every one that is not shared has them; a note where they belong
    to other weights."""
    routed = [f for e, f in zip(source.experts, source.folders, strict=True) if e.name not in source.shared]
    if not all((folder / STATISTICS_FILE).is_file() for folder in routed):
        return source
    way_out = "so the report has no crosstalk; python -m scripts.statistics writes it anew"
    try:
        experts = [
            replace(expert, inputs=read_statistics(folder, way_out)) if folder in routed else expert
            for expert, folder in zip(source.experts, source.folders, strict=True)
        ]
    except ValueError as error:
        note(f"warning: {error}")
        return source
    return replace(source, experts=experts)


def output_energy(update: Factors, moments: Moments) -> float:
    """E|B A x|^2"""
    a, b = update
    within = a @ moments.root.to(a)
    return float(((b.T @ b @ within) * within).sum() + moments.rest * inner_product(update, update))


def joined(updates: Sequence[Factors]) -> Factors:
    """The factors of a sum."""
    return torch.cat([a for a, _ in updates]), torch.cat([b for _, b in updates], dim=1)


def difference(one: Factors, other: Factors) -> Factors:
    """The factors of one update less another's."""
    return joined([one, (other[0], -other[1])])


def site_crosstalk(
    experts: Sequence[Expert],
    site: str,
    factors: Sequence[Factors | None],
    merged: Factors | None = None,
    shared: Collection[str] = (),
) -> dict[str, Any]:
    """`crosstalk`, at [k][j], and `residual`, at [k], of one site; empty without statistics of the routed experts.

    None at k == j, for `shared` experts, which are always on, and where an expert has not the site, or does nothing
    there, on its own samples.
    """
    if any(expert.inputs is None for expert in experts if expert.name not in shared):
        return {}
    always = [f for e, f in zip(experts, factors, strict=True) if e.name in shared and f is not None]
    table: Table = [[None] * len(experts) for _ in experts]
    residual: list[float | None] = [None] * len(experts)
    for k, (expert, own) in enumerate(zip(experts, factors, strict=True)):
        if own is None or expert.inputs is None or expert.name in shared:
            continue
        moments = expert.inputs(site)
        if not moments.tokens:
            continue
        energy = output_energy(own, moments)
        if energy <= 0:
            continue
        for j, other in enumerate(factors):
            if j != k and experts[j].name not in shared:
                table[k][j] = output_energy(other, moments) / energy if other is not None else 0.0
        if merged is not None:
            whole = joined([own, *always])
            error = output_energy(difference(_like(merged, own[0]), whole), moments)
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


def _like(factors: Factors, tensor: Tensor) -> Factors:
    return factors[0].to(tensor), factors[1].to(tensor)
