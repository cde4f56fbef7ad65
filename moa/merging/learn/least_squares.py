"""Least squares on the inputs of a live model: once for all layers, block by block, or again and again.

All end in the merging method `regmean`, from experts with the moments of their inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data.batch import Batch
from moa.merging.adapters import Expert
from moa.merging.learn.calibration import MERGED, with_merged
from moa.merging.merge import MergedSite, merge
from moa.merging.site_plan import layer_of
from moa.model import MixtureModel
from moa.statistics.gather import expert_moments, input_sums, own_gates, sites_of, watch_inputs
from moa.statistics.moments import InputSums, Moments

Batches = Mapping[str, Sequence[Batch]]  # by expert; a shared one has none, for it is not merged but added
Merge = Callable[[Sequence[Expert]], dict[str, MergedSite]]


def with_moments(experts: Sequence[Expert], moments: Mapping[str, Mapping[str, Moments]]) -> list[Expert]:
    """The experts with these moments; one without keeps its own."""
    known = {name: own.__getitem__ for name, own in moments.items()}
    return [replace(expert, inputs=known.get(expert.name, expert.inputs)) for expert in experts]


def with_inputs(
    model: MixtureModel, experts: Sequence[Expert], batches: Batches, answer_share: float | None = None
) -> list[Expert]:
    """The experts with the moments of their inputs, each on its own batches; one without batches keeps its own."""
    return with_moments(experts, expert_moments(model, batches, answer_share))


def regmean_pp(
    model: MixtureModel, experts: Sequence[Expert], batches: Batches, merge_by: Merge
) -> dict[str, MergedSite]:
    """RegMean++ (2508.03121): blocks are merged in running order, each on inputs that the merged ones below make."""
    merged: dict[str, MergedSite] = {}
    start = merge(experts)  # stands in for what is not merged yet, with gate 0
    for block in blocks_of(model, batches):
        found: dict[str, dict[str, Moments]] = {}
        with with_merged(model, {**start, **merged}, experts):
            for name in batches:
                own = {site: module for site, module in sites_of(model, name).items() if site in block}
                sums = input_sums(model, own, batches[name], _merged_below(model, name, merged)) if own else {}
                found[name] = {site: own.sketch(len(own.gram), len(own.gram)) for site, own in sums.items()}
        merged |= merge_by([_only(expert, block) for expert in with_moments(experts, found)])
    return merged


def blocks_of(model: MixtureModel, batches: Batches) -> list[list[str]]:
    """The sites of each block, blocks in the order in which they run."""
    order: dict[str, None] = {}
    batch = next(iter(batches.values()))[0]
    with torch.no_grad(), watch_inputs(model, model.bank.sites, batch, lambda site, rows: order.setdefault(site)):
        model(batch, own_gates(model, model.bank.names[0])(batch))
    blocks: dict[str, list[str]] = {}
    for site in [*order, *(site for site in model.bank.sites if site not in order)]:
        blocks.setdefault(layer_of(site), []).append(site)
    return [*blocks.values()]


def _merged_below(model: MixtureModel, expert: str, merged: Mapping[str, Any]) -> Callable[[Batch], Tensor]:
    """The merged update where there is one, elsewhere the expert."""
    done = torch.tensor([site in merged for site in model.bank.sites])[:, None]
    own, trial = own_gates(model, expert), own_gates(model, MERGED)
    return lambda batch: torch.where(done, trial(batch)[:, None], own(batch)[:, None])


def _only(expert: Expert, sites: Sequence[str]) -> Expert:
    ranks = {site: rank for site, rank in expert.ranks.items() if site in sites}
    return replace(expert, ranks=ranks, shapes={site: expert.shapes[site] for site in ranks})


def iteris(
    model: MixtureModel,
    experts: Sequence[Expert],
    batches: Batches,
    merge_by: Merge,
    *,
    iterations: int,
    ridge: float,
    tick: Callable[[int], None] = lambda number: None,
) -> dict[str, MergedSite]:
    """IterIS (2411.15231): sum_k E|dW_k x_k - dW x~_k|^2, x~_k being the inputs that the last merge makes of task k.

    Expert k is restated as the best linear map from x~_k to its own outputs, which RegMean then merges on x~_k. Targets
    are the adapters' outputs alone, as released (`with_pretrain_matrix: 0`).
    """
    merged = merge_by(with_inputs(model, experts, batches))
    for number in range(iterations):
        with with_merged(model, merged, experts):
            pairs = {name: input_pairs(model, name, own) for name, own in batches.items()}
        merged = merge_by([restate(e, pairs[e.name], ridge) if e.name in pairs else e for e in experts])
        tick(number)
    return merged


@dataclass(kw_only=True)
class InputPairs:
    """Sums over tokens of a layer's inputs with the expert on, x, and with the merge on, x~."""

    merged: InputSums
    cross: Tensor | None = None  # sum of x x~^T

    def add(self, own: Float[Tensor, "token in"], merged: Float[Tensor, "token in"]) -> None:
        self.merged.add(merged)
        product = own.double().T @ merged.double()
        self.cross = product if self.cross is None else self.cross + product


@torch.no_grad()
def input_pairs(model: MixtureModel, expert: str, batches: Sequence[Batch]) -> dict[str, InputPairs]:
    """Of every site of an expert, on its own batches."""
    sites: dict[str, nn.Module] = sites_of(model, expert)
    pairs = {site: InputPairs(merged=InputSums()) for site in sites}
    kept: dict[str, Tensor] = {}
    for batch in batches:
        with watch_inputs(model, sites, batch, kept.__setitem__):
            model(batch, own_gates(model, expert)(batch))
        with watch_inputs(model, sites, batch, lambda site, rows: pairs[site].add(kept[site], rows)):
            model(batch, own_gates(model, MERGED)(batch))
    return pairs


def restate(expert: Expert, pairs: Mapping[str, InputPairs], ridge: float) -> Expert:
    """The expert whose outputs on x~ are nearest to its own on x, dW_k S_k S~_k^-1, with the moments S~_k."""
    inputs: dict[str, Moments] = {}
    maps: dict[str, Tensor] = {}
    for site, pair in pairs.items():
        gram = pair.merged.gram
        level = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        cross = pair.cross / pair.merged.tokens if pair.cross is not None else gram
        maps[site] = torch.linalg.solve(gram + level, (cross + level).T).T
        inputs[site] = pair.merged.sketch(len(gram), len(gram))

    def read(site: str) -> tuple[Tensor, Tensor]:
        lora_a, lora_b = expert.read(site)
        return lora_a.double() @ maps[site], lora_b.double()

    return replace(expert, read=read, inputs=inputs.__getitem__)
