"""The inputs of a live model's layers, summed over batches by hooks; padding does not count."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batch import Batch
from moa.model import MixtureModel
from moa.packing import next_labels
from moa.statistics.moments import InputSums, Moments

GROUP_BYTES = 4e9  # of the sums that one pass over the batches makes
Tick = Callable[[], None]


@torch.no_grad()
def input_sums(
    model: MixtureModel,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    gates_of: Callable[[Batch], Tensor | None] = lambda batch: None,
    *,
    answer_share: float | None = None,
    tick: Tick = lambda: None,
) -> dict[str, InputSums]:
    """By name, in the order in which the layers first run; empty for one that no token reaches.

    `gates_of` a batch, None for the model's own. The positions that predict an answer's tokens have `answer_share` of
    the moments, however few they are; None: every token counts alike. The batches are read once for each group of
    layers whose sums fit `GROUP_BYTES`.
    """
    answers, others = dict[str, InputSums](), dict[str, InputSums]()

    def add(name: str, rows: Tensor, predicts: Tensor | None) -> None:
        if predicts is None or len(rows) != len(predicts) or not is_text(model, name):
            others.setdefault(name, InputSums()).add(rows)
            return
        answers.setdefault(name, InputSums()).add(rows[predicts])
        others.setdefault(name, InputSums()).add(rows[~predicts])

    training = model.training
    model.eval()
    for group in groups(moment_bytes(modules)):
        for batch in batches:
            predicts = None
            if answer_share is not None and batch.labels is not None:
                predicts = (next_labels(batch.labels, batch.segments) != -100)[batch.token_samples() >= 0]
            with watch_inputs(model, {name: modules[name] for name in group}, batch, partial(add, predicts=predicts)):
                model(batch, gates_of(batch))
            tick()
    model.train(training)
    if answer_share is not None:
        others = {n: InputSums.mixed(answers.get(n, InputSums()), own, answer_share) for n, own in others.items()}
    return others | {name: InputSums() for name in modules if name not in others}


def is_text(model: MixtureModel, name: str) -> bool:
    return model.backbone.stream_of(name) == "text"


def watch_inputs(
    model: MixtureModel, modules: Mapping[str, nn.Module], batch: Batch, seen: Callable[[str, Tensor], None]
) -> ExitStack:
    """Inside, `seen(name, rows)` gets a layer's inputs [token, in], without padding or an image of no prompt."""
    real, blank = batch.token_samples() >= 0, batch.is_blank

    def hook(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        (x,) = args
        by_image = not is_text(model, name)
        if by_image and blank:
            return
        rows = x[real] if not by_image and x.shape[:2] == real.shape else x.flatten(0, -2)
        if len(rows):
            seen(name, rows)

    hooks = ExitStack()
    for name, module in modules.items():
        hooks.enter_context(module.register_forward_pre_hook(partial(hook, name)))
    return hooks


def watch_outputs(model: nn.Module, names: Iterable[str], seen: Callable[[str, Tensor], Tensor | None]) -> ExitStack:
    """Inside, `seen(name, output)` gets the output of each module; what it returns, if anything, takes its place."""

    def hook(name: str, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        return seen(name, output[0] if isinstance(output, tuple) else output)

    hooks = ExitStack()
    for name in dict.fromkeys(names):
        hooks.enter_context(model.get_submodule(name).register_forward_hook(partial(hook, name)))
    return hooks


def groups(needed: Mapping[str, float]) -> Iterator[list[str]]:
    """The names in their order, as many together as fit `GROUP_BYTES`."""
    group, size = list[str](), 0.0
    for name, own in needed.items():
        if group and size + own > GROUP_BYTES:
            yield group
            group, size = [], 0.0
        group, size = [*group, name], size + own
    yield group


def moment_bytes(modules: Mapping[str, Any]) -> dict[str, float]:
    return {name: 8.0 * getattr(module, "base_layer", module).in_features ** 2 for name, module in modules.items()}


def sites_of(model: MixtureModel, expert: str) -> dict[str, nn.Module]:
    return {site: model.bank.sites[site] for site in model.bank.experts[expert].sites}


def own_gates(model: MixtureModel, expert: str) -> Callable[[Batch], Tensor]:
    """The gates of an expert's own samples: it is on with the shared experts, a shared one with each sample's expert.
    One that the routing does not have, such as a merge on trial, is on alone."""
    names, roles = model.bank.names, model.routing.roles

    def gates(batch: Batch) -> Tensor:
        device = batch.input_ids.device
        if expert not in roles.experts:
            return torch.tensor([float(name == expert) for name in names], device=device).expand(len(batch), -1)
        place = roles.experts.index(expert)
        ids = torch.full_like(batch.expert_ids, place) if place in roles.choices else batch.expert_ids
        own = F.pad(model.routing.oracle(ids)[:, 0].to(device), (0, 1))  # the last column is of all others
        return own[:, [roles.experts.index(name) if name in roles.experts else -1 for name in names]]

    return gates


def expert_moments(
    model: MixtureModel, batches: Mapping[str, Sequence[Batch]], answer_share: float | None = None
) -> dict[str, dict[str, Moments]]:
    """Expert -> site -> exact moments of what it gets on its own batches; `answer_share` as in `input_sums`. Raises
    ValueError for an expert without batches, and for one with a site that no token reaches."""
    found = {}
    for name, own_batches in batches.items():
        if not own_batches:
            raise ValueError(f"batches.{name}: none; its inputs are needed")
        options = sites_of(model, name), own_batches, own_gates(model, name)
        sums = input_sums(model, *options, answer_share=answer_share)
        if idle := [site for site, own in sums.items() if not own.tokens]:
            raise ValueError(f"{idle[0]}: no token of the expert {name} reaches it, so nothing is known of its inputs")
        found[name] = {site: own.sketch(width := len(own.gram), width) for site, own in sums.items()}
    return found
