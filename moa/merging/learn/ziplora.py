"""ZipLoRA: every expert's input columns get weights of their own, such that the sum still does what each expert does.

    dW = sum_i dW_i diag(m_i) = sum_i B_i (A_i diag(m_i)),    m_i [in] from 1         (Shah et al. 2023, equation 3)

The merger m_i scales the columns of A_i, the input side, so the result is a set of experts of the old ranks whose plain
sum is the merge, exactly. The paper merges two experts of a diffusion model; here N experts of any mixture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from data.batch import Batch
from moa.merging.adapters import Expert
from moa.merging.learn.gradient import Step, descend, frozen, quiet
from moa.model import MixtureModel

Mergers = dict[str, dict[str, Tensor]]  # site -> expert -> [in]


def learn_mergers(
    model: MixtureModel,
    batches: Mapping[str, Sequence[Batch]],
    *,
    steps: int = 100,
    lr: float = 0.01,
    similarity: float = 0.01,
    on_step: Step = quiet,
) -> Mergers:
    """Mergers by gradient descent on `zip_loss`; `batches` are each expert's own, with answers, taken in turn."""
    targets = expert_outputs(model, batches)
    mergers = unit_mergers(model)
    parameters = [m.requires_grad_() for site in mergers.values() for m in site.values()]

    def loss(step: int) -> Tensor:
        chosen = {name: own[step % len(own)] for name, own in targets.items()}
        return zip_loss(model, mergers, chosen) + similarity * overlap(mergers)

    with frozen(model):
        descend(parameters, loss, steps=steps, lr=lr, on_step=on_step)
    return {site: {name: m.detach() for name, m in own.items()} for site, own in mergers.items()}


def unit_mergers(model: MixtureModel) -> Mergers:
    """All ones: the plain sum of the experts."""
    return {
        name: {e: torch.ones_like(a[0], dtype=torch.float32) for e, a in site.lora_A.items()}
        for name, site in model.bank.sites.items()
    }


@torch.no_grad()
def expert_outputs(
    model: MixtureModel, batches: Mapping[str, Sequence[Batch]]
) -> dict[str, list[tuple[Batch, Tensor]]]:
    """Each expert's batches with the logits that it alone gives for their answers."""
    found: dict[str, list[tuple[Batch, Tensor]]] = {}
    with frozen(model):
        for index, name in enumerate(model.bank.names):
            if not batches.get(name) or any(batch.labels is None for batch in batches[name]):
                raise ValueError(f"batches.{name}: none with answers; ZipLoRA needs every expert's own")
            alone = torch.eye(len(model.bank.names))[index]
            for batch in batches[name]:
                gates = alone.to(batch.input_ids.device).expand(len(batch), -1)
                found.setdefault(name, []).append((batch, model(batch, gates).logits))
    return found


def zip_loss(model: MixtureModel, mergers: Mergers, chosen: Mapping[str, tuple[Batch, Tensor]]) -> Float[Tensor, ""]:
    """Sum over the experts: mean squared difference of the merge's logits from the expert's own, on its data."""
    turned = {
        f"model.{site}.lora_A_{expert}": model.bank.sites[site].lora_A[expert] * merger
        for site, own in mergers.items()
        for expert, merger in own.items()
    }
    total = torch.zeros(())
    for batch, expected in chosen.values():
        device = batch.input_ids.device
        ones = torch.ones(len(batch), len(model.bank.names), device=device)
        out = functional_call(model, turned, (batch, ones))
        answer = out.labels != -100
        total = total.to(device) + F.mse_loss(out.logits[answer], expected[answer])
    return total


def overlap(mergers: Mergers) -> Float[Tensor, ""]:
    """Mean |cos(m_i, m_j)| over the pairs of experts at a site, and over the sites; 0 without a pair."""
    sites = []
    for own in mergers.values():
        if len(own) > 1:
            unit = F.normalize(torch.stack(list(own.values())), dim=1)
            rows, cols = torch.triu_indices(len(unit), len(unit), 1)
            sites.append((unit @ unit.T)[rows, cols].abs().mean())
    return torch.stack(sites).mean() if sites else torch.zeros(())


def apply_mergers(experts: Sequence[Expert], mergers: Mergers) -> list[Expert]:
    """The experts with their columns scaled: `task_arithmetic` of them is the merge."""

    def zipped(expert: Expert) -> Expert:
        def read(site: str) -> tuple[Tensor, Tensor]:
            lora_a, lora_b = expert.read(site)
            return lora_a.double() * mergers[site][expert.name].cpu().double(), lora_b.double()

        return replace(expert, read=read)

    return [zipped(expert) for expert in experts]
