"""AdamW over named groups, each with its own rate; every trainable parameter in exactly one."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from moa.model import MixtureModel
from moa.parts import PARTS, Parameters
from moa.sections import RateConfig, StageConfig, TrainConfig


def make_optimizer(
    model: nn.Module, groups: Mapping[str, Parameters], rates: RateConfig, train: TrainConfig
) -> torch.optim.AdamW:
    """One or two parameter groups per named group: weight decay is for matrices alone."""
    # a parameter in no group would never move, one in two would move twice
    grouped = [id(p) for parameters in groups.values() for p in parameters.values()]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped)), "a parameter is in two groups"
    assert set(grouped) == trainable, "the groups are not the trainable parameters"
    options: list[dict[str, Any]] = []
    for name, parameters, rate in rate_groups(groups, rates):
        for decay, matrices in ((train.weight_decay, True), (0.0, False)):
            # DeepSpeed keeps the shape of a tensor that lies elsewhere
            shapes = [(p, getattr(p, "ds_shape", p.shape)) for p in parameters.values()]
            if chosen := [p for p, shape in shapes if (len(shape) > 1) == matrices]:
                options.append({"params": chosen, "name": name, "lr": rate, "rate": rate, "weight_decay": decay})
    return torch.optim.AdamW(options, betas=(train.betas[0], train.betas[1]), fused=True)


def rate_groups(groups: Mapping[str, Parameters], rates: RateConfig) -> Iterator[tuple[str, Parameters, float]]:
    """Name, parameters and learning rate; lora_B apart where it has another one (LoRA+, arXiv 2402.12354)."""
    for name, parameters in groups.items():
        rate = getattr(rates, name)
        if name != "experts" or rates.b_ratio == 1:
            yield name, parameters, rate
            continue
        b = {key: p for key, p in parameters.items() if key.endswith(".lora_B.weight")}
        for own, chosen, times in (
            (name, {key: p for key, p in parameters.items() if key not in b}, 1.0),
            (f"{name}_b", b, rates.b_ratio),
        ):
            if chosen:
                yield own, chosen, rate * times


def rate_factor(stage: StageConfig, step: int) -> float:
    """Share of the learning rate at optimiser step 1, 2, ... of a stage: warm-up, then cosine."""
    if step <= stage.warmup_steps:
        return step / stage.warmup_steps
    # one more step would reach the end: the last one still learns
    done = (step - stage.warmup_steps) / (stage.steps - stage.warmup_steps + 1)
    return stage.lr_end + (1 - stage.lr_end) * 0.5 * (1 + math.cos(math.pi * done))


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Scale every group's rate; returns the rates by group name."""
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * factor
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def names_of(groups: Mapping[str, Parameters]) -> dict[nn.Parameter, str]:
    return {p: f"{group}/{name}" for group, ps in groups.items() for name, p in ps.items()}


def by_name(tensors: Mapping[str, Tensor], names: Mapping[nn.Parameter, str]) -> dict[str, dict[str, Tensor]]:
    """`name:kind` tensors as name -> kind -> tensor; ValueError unless the names are these."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition(":")
        found.setdefault(name, {})[kind] = value
    if different := sorted(found.keys() ^ set(names.values())):
        differ = f"{len(different)} differ, first {different[:2]}"
        raise ValueError(f"optimizer.safetensors: made for other parameters: {differ}")
    return found


def parameter_table(model: MixtureModel, groups: Mapping[str, Parameters], rates: RateConfig) -> Table:
    """Group -> parameters, trainable, learning rate, sites: shown before a stage begins."""
    table = Table("group", title="what is trained")
    for column in ("parameters", "trainable", "learning rate", "sites"):
        table.add_column(column, justify="right")
    holders = Counter(id(p) for name in model.bank.names for p in model.bank.parameters(name))
    for name in model.bank.names:
        sites, own = str(len(model.bank.experts[name].sites)), model.bank.parameters(name)
        add_row(table, f"expert {name}", [p for p in own if holders[id(p)] == 1], rates.experts, sites)
    if shared := [p for p in model.bank.parameters() if holders[id(p)] > 1]:
        add_row(table, "shared by experts", shared, rates.experts, "")
    router = [*PARTS["router"].parameters(model).values()]
    sites = str(len(model.bank.token_choices()) or "")
    add_row(table, "router", router, rates.router, sites)
    projector = [*groups.get("projector", {}).values()]
    if projector:
        add_row(table, "projector", projector, rates.projector, "")
    grouped = {id(p) for p in (*model.bank.parameters(), *router, *projector)}
    base = [p for p in model.model.parameters() if id(p) not in grouped]
    add_row(table, "base", base, 0.0, "")
    return table


def add_row(table: Table, name: str, parameters: list[nn.Parameter], rate: float, sites: str) -> None:
    # DeepSpeed keeps the size of a tensor that lies elsewhere
    sizes = [getattr(p, "ds_numel", p.numel()) for p in parameters]
    total = sum(sizes)
    trainable = sum(n for n, p in zip(sizes, parameters, strict=True) if p.requires_grad)
    shown = f"{rate:g}" if trainable else "-"
    table.add_row(name, f"{total:,}", f"{trainable:,}", shown, sites)
