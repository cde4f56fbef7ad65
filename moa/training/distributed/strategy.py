"""How the processes hold a stage's model: whole on each, or sharded by DeepSpeed or by FSDP2.

The launch file decides (configs/accelerate/); the loop calls the same methods for all of them.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from moa.backbones.opening import class_of
from moa.config import RunConfig
from moa.model import MixtureModel
from moa.parts import trained_parts
from moa.training.batches import Layout
from moa.training.distributed import fsdp, zero
from moa.training.distributed.fsdp import Fsdp
from moa.training.distributed.plain import Plain
from moa.training.distributed.zero import Zero


def is_zero(accelerator: Accelerator) -> bool:
    return accelerator.state.deepspeed_plugin is not None


def is_fsdp() -> bool:
    return asked_for("ACCELERATE_USE_FSDP")


def kind_of(accelerator: Accelerator) -> str:
    """How the processes share the model, in a word: no, multi_gpu, zero2, zero3, fsdp2, ..."""
    if is_zero(accelerator):
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    return "fsdp2" if is_fsdp() else accelerator.distributed_type.value.lower()


def asked_for(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1")


def is_zero_3(accelerator: Accelerator) -> bool:
    return is_zero(accelerator) and accelerator.state.deepspeed_plugin.zero_stage == 3


def check_sharding(accelerator: Accelerator, config: RunConfig) -> None:
    """ValueError for what cannot run under DeepSpeed or FSDP2, and for settings of FSDP that cannot."""
    if is_fsdp():
        fsdp.settings()
    name, where = config.model.name, "of configs/accelerate/"
    if (is_fsdp() or is_zero(accelerator)) and not class_of(name).shardable:
        raise ValueError(f"model.name: {name} is a CLIP, not to be sharded; choices {where}: ddp")
    # FSDP2 gathers block by block: a parameter of several would fall apart into one each.
    tied = [name for name, expert in config.experts.items() if expert.tie_layers]
    if is_fsdp() and tied:
        raise ValueError(f"experts.{tied[0]}.tie_layers: not for FSDP2; choices {where}: ddp, zero2, zero3")
    # Such a stage has no optimiser, and so nothing that gathers for it.
    if (is_fsdp() or is_zero_3(accelerator)) and config.router.row.learns == "means":
        raise ValueError(f"router.kind={config.router.kind}: parameters are not sharded; choices {where}: ddp, zero2")


def place(accelerator: Accelerator, model: MixtureModel) -> None:
    """Move a model to its device, or shard it over all of them, before a stage."""
    if is_fsdp():
        fsdp.shard(model, model.model)
    else:
        model.to(accelerator.device)


def make_strategy(
    accelerator: Accelerator, model: MixtureModel, optimizer: torch.optim.Optimizer, layout: Layout, config: RunConfig
) -> Plain:
    if is_zero(accelerator):
        return Zero(accelerator, model, optimizer, layout, config.train)
    return (Fsdp if is_fsdp() else Plain)(accelerator, model, optimizer)


def whole(model: MixtureModel, config: RunConfig, *, write: bool = False) -> AbstractContextManager[Any]:
    """Inside, what a checkpoint holds of the model is whole on every process. With `write`, values written inside are
    kept; every process must write the same ones."""
    # A forward without a backward (validation) leaves gathered parameters, which are not DTensors.
    fsdp.reshard(model)
    parts = trained_parts(config).values()
    parameters = [p for part in parts for p in part.parameters(model).values()]
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return fsdp.whole(model, parameters, write)
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return zero.whole(parameters, write)
    return nullcontext()
