"""Weights of experts from a little data, by gradient descent.

The weights are the gates of the live mixture, one row for every site: a sum of the experts at these gates is the
merged model, exactly. So nothing is merged while they are learned, and `merge(weights=...)` takes them afterwards.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from data.batch import Batch
from moa.merging.methods.method import check_choice
from moa.merging.weights import Weights
from moa.model import MixtureModel

Step = Callable[[int, float], None]  # gets the number of a step and its loss


def quiet(step: int, loss: float) -> None:
    pass


def learn_weights(
    model: MixtureModel,
    batches: Sequence[Batch],
    *,
    objective: str = "answers",
    steps: int = 100,
    lr: float = 0.05,
    per_site: bool = True,
    fixed: Sequence[str] = (),
    on_step: Step = quiet,
) -> Weights:
    """Weights of every expert, per site, by gradient descent through the live mixture; the experts stay as they are.

    `answers` minimises the answers' loss on labelled batches with weights that sum to 1 (LoRA Soups, Prabhakar et al.
    2025, equation 4). `entropy` needs no labels: it minimises the entropy of the predicted tokens with weights in
    [0, 1] that start at 0.3 (AdaMerging, Yang et al. 2024, equation 6); a batch without answers should have the
    model's own. Takes `batches` in turn. Raises ValueError for batches without anything to predict.
    `fixed` experts are on at weight 1.
    """
    check_choice("objective", objective, ("answers", "entropy"), of="learn")
    if not batches or any(batch.labels is None for batch in batches):
        raise ValueError("learn: needs batches with answers, or with the model's own")
    names, sites = list(model.bank.names), list(model.bank.sites)
    experts = [name for name in names if name not in fixed]

    def gates_of(weights: Tensor) -> Tensor:
        own = F.pad(weights, (0, 1), value=1.0)
        return own[:, [experts.index(name) if name in experts else -1 for name in names]]

    def loss(step: int, weights: Tensor) -> Tensor:
        batch = batches[step % len(batches)]
        out = model(batch, gates_of(weights)[None].expand(len(batch), -1, -1))
        if objective == "answers":
            return out.loss_per_sample.mean()
        return mean_entropy(out.logits[out.labels != -100])

    with frozen(model):
        shape, device = (len(sites) if per_site else 1, len(experts)), batches[0].input_ids.device
        options: dict[str, Any] = {"steps": steps, "lr": lr, "device": device, "on_step": on_step}
        rows = gates_of(descend_weights(loss, shape, simplex=objective == "answers", **options))
    each = zip(sites, rows.expand(len(sites), -1).tolist(), strict=True)
    return {site: dict(zip(names, row, strict=True)) for site, row in each}


def descend(
    parameters: Iterable[Tensor], loss: Callable[[int], Tensor], *, steps: int, lr: float, on_step: Step = quiet
) -> None:
    """Lower `loss(step)` by Adam; `on_step` gets each step's loss before its update."""
    optimizer = torch.optim.Adam(list(parameters), lr=lr)
    for step in range(steps):
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        on_step(step, float(value.detach()))


def descend_weights(
    loss: Callable[[int, Tensor], Tensor],
    shape: tuple[int, int],
    *,
    simplex: bool,
    steps: int = 100,
    lr: float = 0.05,
    device: torch.device | str = "cpu",
    on_step: Step = quiet,
) -> Float[Tensor, "site expert"]:
    """The weights where `loss(step, weights)` went, by Adam: on the `simplex` from the mean, else 0.3, in [0, 1]."""
    raw = torch.full(shape, 0.0 if simplex else 0.3, device=device, requires_grad=True)

    def weights() -> Tensor:
        return raw.softmax(-1) if simplex else raw.clamp(0, 1)

    descend([raw], lambda step: loss(step, weights()), steps=steps, lr=lr, on_step=on_step)
    return weights().detach()


def mean_entropy(logits: Float[Tensor, "*rows option"]) -> Float[Tensor, ""]:
    """How unsure the predictions are, in nats: of tokens, or of the classes of a zero-shot classifier (AdaMerging)."""
    log_probs = logits.float().log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1).mean()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and none of its parameters requires a gradient."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    training = model.training
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in trainable:
            parameter.requires_grad_(True)
