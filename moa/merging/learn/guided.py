"""Weights of single singular triplets, or of sites, of each expert, by gradient through the live mixture; no labels.

    dW = sum_k sum_i c_ki s_ki u_ki v_ki^T,     dW_k = U_k S_k V_k^T at each site

The answers are what each expert itself generates for its own samples. Triplets are functions of the updates, so it does
not matter how an expert is factored; the released TARA weighs the ranks as they are stored.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from data.batch import Batch
from moa.files.peft_config import site_scaling
from moa.merging.adapters import Expert
from moa.merging.learn.distill import divergence
from moa.merging.learn.gradient import Step, descend, frozen, mean_entropy, quiet
from moa.merging.learn.least_squares import blocks_of
from moa.merging.site_plan import find_depths, layer_of
from moa.model import MixtureModel, MixtureOutput
from moa.statistics.gather import is_text, own_gates, watch_inputs, watch_outputs

Batches = Mapping[str, Sequence[Batch]]  # by expert, with its answers; a shared expert has none
Place = tuple[str, str]  # site, expert
Scales = dict[Place, Tensor]  # [rank], or [1] for all of them
LAST = 0.75  # of the depth: where NSC looks


@dataclass(kw_only=True)
class Weighed:
    """A model whose experts' triplets have weights."""

    model: MixtureModel
    experts: Sequence[Expert]
    batches: Batches
    tick: Step = quiet

    @cached_property
    def triplets(self) -> dict[Place, tuple[Tensor, Tensor]]:
        """A and B of each merged expert's site in float64: S^(1/2) V^T and U S^(1/2)."""
        found = {}
        for expert in (e for e in self.experts if e.name in self.batches):
            for site in expert.ranks:
                layer = self.model.bank.sites[site]
                if expert.name in layer.starts or expert.name in layer.ranked:
                    raise ValueError(
                        f"experts.{expert.name}: has a start or gates of its ranks, which have no triplets"
                    )
                a, b = expert.factors(site, torch.float64)
                (q_a, r_a), (q_b, r_b) = torch.linalg.qr(a.T), torch.linalg.qr(b)
                u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
                found[site, expert.name] = s.sqrt()[:, None] * v @ q_a.T, q_b @ u * s.sqrt()
        return found

    def raw(self, value: float, *, by_site: bool = False) -> Scales:
        """Parameters that all have this value."""
        device = next(self.model.parameters()).device
        return {
            place: torch.full((1 if by_site else len(a),), value, device=device, requires_grad=True)
            for place, (a, _) in self.triplets.items()
        }

    @cached_property
    def _live(self) -> dict[Place, tuple[Tensor, Tensor]]:
        found = {}
        for (site, name), (a, b) in self.triplets.items():
            layer = self.model.bank.sites[site]
            found[site, name] = a.to(layer.lora_A[name]), (b / layer.scalings[name]).to(layer.lora_B[name])
        return found

    def merged(self, batch: Batch, scales: Scales) -> MixtureOutput:
        """All experts at gate 1, their triplets at these weights."""
        turned: dict[str, Tensor] = {}
        for (site, name), (a, b) in self._live.items():
            turned |= {f"model.{site}.lora_A_{name}": scales[site, name][:, None] * a, f"model.{site}.lora_B_{name}": b}
        ones = torch.ones(len(batch), len(self.model.bank.names), device=batch.input_ids.device)
        return functional_call(self.model, turned, (batch, ones), tie_weights=False)

    @torch.no_grad()
    def alone(self, name: str, batch: Batch) -> MixtureOutput:
        """An expert on its own samples, with the shared ones."""
        return self.model(batch, own_gates(self.model, name)(batch))

    def descend(self, parameters: Iterable[Tensor], loss: Callable[[int], Tensor], steps: int, lr: float) -> None:
        with frozen(self.model):
            descend(parameters, loss, steps=steps, lr=lr, on_step=self.tick)

    def turn(self, step: int) -> Iterator[tuple[str, Batch]]:
        """Each expert's batch of a step, taken in turn."""
        return ((name, own[step % len(own)]) for name, own in self.batches.items())

    def apply(self, scales: Scales) -> list[Expert]:
        """Experts whose plain sum is the merge; shared ones as they are."""

        def weighed(expert: Expert) -> Expert:
            def read(site: str) -> tuple[Tensor, Tensor]:
                a, b = self.triplets[site, expert.name]
                scale = scales[site, expert.name].detach().cpu().double()
                return scale[:, None] * a, b / site_scaling(expert.config, site)

            ranks = {site: len(self.triplets[site, expert.name][0]) for site in expert.ranks}
            return replace(expert, read=read, ranks=ranks)

        return [weighed(expert) if expert.name in self.batches else expert for expert in self.experts]


def tara(live: Weighed, *, steps: int = 100, lr: float = 0.01) -> Scales:
    """TARA-A (2603.26299): the soft maximum over experts of how much less sure the merge is than each, from 0.4."""
    scales = live.raw(0.4)

    def gap(name: str, batch: Batch) -> Tensor:
        return answer_entropy(live.merged(batch, scales)) - answer_entropy(live.alone(name, batch))

    def gaps(step: int) -> Tensor:
        return torch.stack([gap(*pair) for pair in live.turn(step)]).logsumexp(0)

    live.descend(scales.values(), gaps, steps, lr)
    return scales


def adarank(live: Weighed, *, steps: int = 100, lr: float = 0.01) -> Scales:
    """AdaRank (2503.22178): which triplets stay, and a weight of each site and expert from 0.3, by the merge's entropy.

    The mask is 0 or 1 forward, and sigmoid(m / 10) backward.
    """
    weights, masks = live.raw(0.3, by_site=True), live.raw(0.1)

    def scales() -> Scales:
        soft = {place: (mask / 10).sigmoid() for place, mask in masks.items()}
        hard = {place: (masks[place] > 0).float() + own - own.detach() for place, own in soft.items()}
        return {place: weights[place] * own for place, own in hard.items()}

    def loss(step: int) -> Tensor:
        return torch.stack([answer_entropy(live.merged(batch, scales())) for _, batch in live.turn(step)]).mean()

    live.descend([*weights.values(), *masks.values()], loss, steps, lr)
    return scales()


def answer_entropy(out: MixtureOutput) -> Float[Tensor, ""]:
    assert out.labels is not None
    return mean_entropy(out.logits[out.labels != -100])


def expert_merging(live: Weighed, *, steps: int = 100, lr: float = 0.05) -> Scales:
    """Expert Merging (2509.25712): a weight in (0, 1) of each site and expert, so that the merge does as each expert.

    Per expert KL of the answer's tokens at temperature 3, and 0.1 of the hidden states' distance; 0.1 of the weights'
    mean distance from their start, 0.1.
    """
    start = 0.1
    raw = live.raw(float(torch.logit(torch.tensor(start))), by_site=True)
    blocks = [layer_of(site) for site, _ in live.triplets]

    def loss(step: int) -> Tensor:
        scales = {place: own.sigmoid() for place, own in raw.items()}
        each = []
        for name, batch in live.turn(step):
            with outputs_of(live.model, blocks, batch) as wanted:
                expert = live.alone(name, batch)
            with outputs_of(live.model, blocks, batch) as found:
                out = live.merged(batch, scales)
            assert out.labels is not None
            apart = torch.stack([relative_distance(wanted[block], rows) for block, rows in found.items()])
            each.append(divergence(expert.logits, out.logits, out.labels, 3.0).mean() + 0.1 * apart.mean())
        return torch.stack(each).mean() + 0.1 * (torch.cat([*scales.values()]) - start).abs().mean()

    live.descend(raw.values(), loss, steps, lr)
    return {place: own.sigmoid() for place, own in raw.items()}


def prodistill(live: Weighed, *, steps: int = 50, lr: float = 0.01) -> Scales:
    """ProDistill (2502.12706), by triplet from 0.3: block by block, outputs as each expert's on its own path."""
    scales = live.raw(0.3)

    def loss(block: str, own: list[Tensor], step: int) -> Tensor:
        each = []
        for name, batch in live.turn(step):
            with outputs_of(live.model, [block], batch) as wanted:
                live.alone(name, batch)
            with outputs_of(live.model, [block], batch) as found:
                live.merged(batch, scales)
            each += [relative_distance(wanted[block], rows) for rows in found.values()]
        # a block that no sample of the step reaches has nothing to learn
        return torch.stack(each).mean() if each else 0.0 * torch.cat(own).sum()

    for sites in blocks_of(live.model, live.batches):
        if own := [scale for (site, _), scale in scales.items() if site in sites]:
            live.descend(own, partial(loss, layer_of(sites[0]), own), steps, lr)
        for scale in own:
            scale.requires_grad_(False)
    return scales


def nsc(live: Weighed, *, steps: int = 100, lr: float = 0.01) -> Scales:
    """NSC (2603.26317): site weights from 0.4 that keep the merge's inputs where each expert reads, in the last layers.

    Mean over experts, sites of the last quarter, and tokens of (1 - |P z|^2 / |z|^2)^(1/2), P on the rows of A_k.
    """
    raw = live.raw(0.4, by_site=True)
    depths = find_depths(tuple(dict.fromkeys(site for site, _ in live.triplets)))
    last = [site for site, depth in depths.items() if depth >= LAST * max(depths.values())]

    def loss(step: int) -> Tensor:
        each: list[Tensor] = []
        for name, batch in live.turn(step):
            own = {site: live.model.bank.sites[site] for site in last if (site, name) in live.triplets}
            with watch_inputs(live.model, own, batch, partial(_missed, live, name, each)):
                live.merged(batch, raw)
        return torch.stack(each).mean()

    live.descend(raw.values(), loss, steps, lr)
    return raw


def _missed(live: Weighed, name: str, each: list[Tensor], site: str, rows: Tensor) -> None:
    a = live.triplets[site, name][0]
    reads = nn.functional.normalize(a[a.norm(dim=1) > 0], dim=1).to(rows)
    share = (rows @ reads.T).square().sum(-1) / rows.square().sum(-1).clamp(min=torch.finfo(rows.dtype).tiny)
    each.append((1 - share).clamp(min=1e-12).sqrt().mean())


@contextmanager
def outputs_of(model: MixtureModel, blocks: Sequence[str], batch: Batch) -> Iterator[dict[str, Tensor]]:
    """Inside, the outputs [token, width] of these modules are kept, without padding."""
    found: dict[str, Tensor] = {}
    real = batch.token_samples() >= 0

    def keep(name: str, rows: Tensor) -> None:
        found[name] = rows[real] if is_text(model, name) and rows.shape[:2] == real.shape else rows.flatten(0, -2)

    with watch_outputs(model.model, blocks, keep):
        yield found


def relative_distance(wanted: Float[Tensor, "token width"], found: Float[Tensor, "token width"]) -> Float[Tensor, ""]:
    """|found - wanted|^2 / |wanted|^2 of all tokens together."""
    return (found - wanted).square().sum() / wanted.square().sum().clamp(min=torch.finfo(wanted.dtype).tiny)
