"""RegMean: the linear layer whose outputs are nearest to each expert's on that expert's own inputs.

    W = (sum_i w_i W_i G_i) (sum_i w_i G_i)^-1,   G_i = X_i^T X_i / tokens          (Jin et al. 2023, equation 2)

The base's part cancels, so this holds for the updates; and B_i (A_i G_i P) is again an update of the expert's rank. So
RegMean turns experts into experts, `linear` at weights of 1 adds them up, and the result can have any rank.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data.batch import Batch
from moa.merging.adapters import Expert
from moa.merging.learn.gradient import frozen
from moa.model import MixtureModel

Grams = dict[str, Float[Tensor, "expert in in"]]  # by site


@torch.no_grad()
def gather_grams(model: MixtureModel, batches: Mapping[str, Sequence[Batch]]) -> Grams:
    """G_i of every site: the inputs of each expert, it alone being on, in its own batches.

    Padding does not count. A site's Gram matrices take experts * in^2 numbers: gather some sites at a time for large
    models. Raises ValueError for an expert without batches.
    """
    names = list(model.bank.names)
    if missing := [name for name in names if not batches.get(name)]:
        raise ValueError(f"batches.{missing[0]}: none; RegMean needs inputs of every expert")
    pairs = zip(names, torch.eye(len(names)), strict=True)
    found = [input_grams(model, model.bank.sites, batches[name], alone) for name, alone in pairs]
    sites = dict.fromkeys(chain.from_iterable(found))
    return {site: torch.stack([own[site] for own in found if site in own]) for site in sites}


@torch.no_grad()
def input_grams(
    model: MixtureModel,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    gates: Float[Tensor, " expert"] | None = None,
) -> dict[str, Float[Tensor, "in in"]]:
    """X^T X / tokens of some linear layers, such as the projector's, at these gates, or at the model's own."""
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def add(site: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        (x,) = args
        rows = (x[real] if x.shape[:2] == real.shape else x.flatten(0, -2)).double()
        sums[site] = sums.get(site, 0) + rows.T @ rows
        tokens[site] = tokens.get(site, 0) + len(rows)

    with frozen(model), ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_pre_hook(partial(add, name)))
        for batch in batches:
            real = batch.attention_mask.bool()
            model(batch, None if gates is None else gates.expand(len(batch), -1))
    return {site: total / tokens[site] for site, total in sums.items()}


def regmean(
    experts: Sequence[Expert],
    grams: Mapping[str, Float[Tensor, "expert in in"]],
    *,
    weights: Mapping[str, float] | None = None,
    nondiagonal: float = 0.9,
    ridge: float = 1e-6,
) -> list[Expert]:
    """The experts whose plain sum is the RegMean merge; `grams` have the experts' order.

    `nondiagonal` scales all but the diagonal of each Gram matrix, which keeps the inverse apart from noise; `ridge`,
    a share of the mean diagonal, is what a direction without any input falls back to. Both as in the paper's section
    4.2 and its released code, which has no ridge and cannot invert fewer inputs than dimensions.
    """
    shares = [1.0 if weights is None else weights[expert.name] for expert in experts]

    def solver(index: int) -> Expert:
        expert = experts[index]

        def read(site: str) -> tuple[Tensor, Tensor]:
            lora_a, lora_b = expert.read(site)
            shrunk = shrink(grams[site].double(), nondiagonal)
            total = torch.einsum("e,eij->ij", torch.tensor(shares).double(), shrunk)
            mean = total.diagonal().mean().clamp(min=torch.finfo(total.dtype).tiny)
            total = total + ridge * mean * torch.eye(len(total), dtype=total.dtype)
            turned = torch.linalg.solve(total, shares[index] * shrunk[index] @ lora_a.double().T).T
            return turned, lora_b.double()

        return replace(expert, read=read)

    return [solver(index) for index in range(len(experts))]


def shrink(grams: Float[Tensor, "expert in in"], nondiagonal: float = 0.9) -> Float[Tensor, "expert in in"]:
    """All but the diagonals times `nondiagonal`."""
    diagonal = torch.diag_embed(grams.diagonal(dim1=1, dim2=2))
    return diagonal + nondiagonal * (grams - diagonal)
