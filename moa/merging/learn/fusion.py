"""AdapterFusion: attention over the experts' outputs, for every token at every site: no merge, a yardstick.

    q = W_q x,  k_i = W_k o_i,  v_i = W_v o_i,  o_i = scaling_i B_i A_i x
    y = W x + sum_i softmax_i(q . k_i) v_i                                         (Pfeiffer et al. 2021, equation 2)

W_v starts as the identity and is held near it, as in the paper; W_q and W_k map to few dimensions. One expert alone is
itself at the start. Gates depend on the token, so no single adapter equals the result.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data.batch import Batch
from moa.experts.bank import ExpertBank
from moa.experts.lora import ExpertLinear
from moa.merging.learn.gradient import Step, descend, frozen, quiet
from moa.model import MixtureModel


class SiteFusion(nn.Module):
    def __init__(self, site: ExpertLinear, dim: int) -> None:
        super().__init__()
        base = site.base_layer
        self.query = nn.Linear(base.in_features, dim, bias=False)
        self.key = nn.Linear(base.out_features, dim, bias=False)
        self.value = nn.Parameter(torch.eye(base.out_features))

    def forward(
        self, x: Float[Tensor, "*tokens in"], outputs: Float[Tensor, "*tokens expert out"]
    ) -> Float[Tensor, "*tokens out"]:
        scores = torch.einsum("...d,...ed->...e", self.query(x), self.key(outputs))
        return torch.einsum("...e,...eo->...o", scores.softmax(-1), outputs) @ self.value.T

    def distance(self) -> Float[Tensor, ""]:
        """Mean squared distance of W_v from the identity."""
        return (self.value - torch.eye(len(self.value), device=self.value.device)).square().mean()


class AdapterFusion(nn.Module):
    """The attentions of a bank's sites; experts and backbone stay as they are."""

    def __init__(self, bank: ExpertBank, *, dim: int = 16, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sites = {name: SiteFusion(s, dim) for name, s in bank.sites.items() if s.scalings}
        self.bank = bank
        self.sites = nn.ModuleDict({name.replace(".", "/"): site for name, site in sites.items()})
        self.to(next(iter(bank.sites.values())).base_layer.weight.device)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, every site adds its fusion to the base's output, whatever the gates are."""
        with ExitStack() as hooks, self.bank.context.disabled():
            for key, fusion in self.sites.items():
                site: nn.Module = self.bank.sites[key.replace("/", ".")]
                hooks.enter_context(site.register_forward_hook(partial(_add, fusion)))
            yield


def _add(fusion: nn.Module, site: ExpertLinear, args: tuple[Any, ...], out: Tensor) -> Tensor:
    x, a, b = args[0].float(), site.lora_A, site.lora_B
    outputs = [scaling * (x @ a[e].T @ b[e].T) for e, scaling in site.scalings.items()]
    return out + fusion(x, torch.stack(outputs, dim=-2)).to(out.dtype)


def learn_fusion(
    model: MixtureModel,
    batches: Sequence[Batch],
    *,
    steps: int = 100,
    lr: float = 0.003,
    identity: float = 0.01,
    dim: int = 16,
    seed: int = 0,
    on_step: Step = quiet,
) -> AdapterFusion:
    """Attentions that lower the answers' loss on `batches`, taken in turn; `identity` weighs W_v's distance from it."""
    if not batches or any(batch.labels is None for batch in batches):
        raise ValueError("fusion: needs batches with answers")
    fusion = AdapterFusion(model.bank, dim=dim, seed=seed)

    def loss(step: int) -> Tensor:
        batch = batches[step % len(batches)]
        off = torch.zeros(len(batch), len(model.bank.names), device=batch.input_ids.device)
        distance = sum(site.distance().to(off.device) for site in fusion.sites.values())  # type: ignore[operator]
        return model(batch, off).loss_per_sample.mean() + identity * distance

    with frozen(model), fusion.attached():
        descend(fusion.parameters(), loss, steps=steps, lr=lr, on_step=on_step)
    return fusion
