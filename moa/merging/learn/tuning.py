"""One rule by which every merge is tuned: the length of its result, and at most one option, by loss on validation data.

The result is first made as long as the mean expert (as Pico, 2604.16826), so that a method whose output is a sum has
the same start as one whose output is a mean. Each scale then multiplies it, and the lowest loss decides.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moa.files.peft_config import LORA
from moa.merging.adapters import Expert, expert_from_tensors
from moa.merging.export.export import adapter_config, tensors_of
from moa.merging.merge import Merged, MergedSite, merge

SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The merge of the lowest loss, how it was made, and all that was tried."""

    merged: dict[str, MergedSite]
    options: Mapping[str, Any]
    scale: float  # of the result at the mean expert's length
    loss: float
    tried: Sequence[Mapping[str, Any]]


def tune(
    candidates: Iterable[tuple[Mapping[str, Any], Merged]],
    wanted: float,
    loss: Callable[[Merged], float],
    scales: Sequence[float] = SCALES,
    complete: Callable[[dict[str, MergedSite]], dict[str, MergedSite]] = lambda merged: merged,
) -> Tuned:
    """The best candidate at the best scale of the length `wanted`; `complete` adds what is not scaled."""
    tried: list[dict[str, Any]] = []
    best: tuple[float, dict[str, MergedSite]] | None = None
    for options, merged in candidates:
        length = length_of(merged)
        for scale in scales:
            trial = complete(scaled(merged, scale * wanted / length if length else 1.0))
            tried.append({"options": dict(options), "scale": scale, "loss": loss(trial)})
            if best is None or tried[-1]["loss"] < best[0]:
                best = tried[-1]["loss"], trial
    if best is None:
        raise ValueError("tune: nothing to choose from")
    return Tuned(merged=best[1], tried=tried, **min(tried, key=lambda row: row["loss"]))


def length_of(merged: Merged) -> float:
    """The Frobenius norm of all its sites together."""
    return sum(site.energy for site in merged.values()) ** 0.5


def mean_length(experts: Sequence[Expert]) -> float:
    return sum(length_of(merge([expert])) for expert in experts) / len(experts)


def scaled(merged: Merged, scale: float) -> dict[str, MergedSite]:
    return {name: site.scaled(scale) for name, site in merged.items()}


def choices(options: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The options with each value of the grid, which is for one more option or none."""
    if not grid:
        return [dict(options)]
    [(name, values)] = grid.items()
    return [{**options, name: value} for value in values]


def with_added(
    merged: dict[str, MergedSite], experts: Sequence[Expert], added: Collection[str], rank: int | str
) -> dict[str, MergedSite]:
    """With the updates of the `added` experts, which are always on, and then cut to the rank."""
    if not added:
        return merged
    shared = [expert for expert in experts if expert.name in added]
    config = {**adapter_config(merged, experts, None), "peft_type": LORA}
    others = expert_from_tensors("others", tensors_of(merged, torch.float64), config)
    return merge([others, *shared], method="task_arithmetic", rank=rank)


def random_expert(experts: Sequence[Expert], seed: int) -> Expert:
    """A control: an update of the first expert's sites and ranks in a random direction."""
    sites = {site: number for number, site in enumerate(experts[0].ranks)}

    def read(site: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + sites[site])
        rank, (rows, cols) = experts[0].ranks[site], experts[0].shapes[site]
        return torch.randn(rank, cols, generator=generator), torch.randn(rows, rank, generator=generator)

    return replace(experts[0], name="random", read=read, inputs=None)
