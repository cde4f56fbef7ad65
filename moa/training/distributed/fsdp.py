"""FSDP2 under the same loop: torch's `fully_shard`, set by the launch file's `fsdp_config`.

Accelerate carries FSDP only where there is an accelerator device, and matches an optimiser to its second stage's
parameters by address, which empty shards (a rank below the number of processes) have in common. So the model is
sharded here, block by block: once, before the first stage's optimiser is made.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from moa.training.distributed.plain import Plain


class Fsdp(Plain):
    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.accelerator, self.wrapped = accelerator, model
        self.optimizer = self.prepared = optimizer

    def forward(self, *inputs: Any) -> Any:
        with self.accelerator.autocast():
            return self.wrapped(*inputs)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        # without it every micro-batch would reduce its gradients over the processes
        self.wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return None if parameter.grad is None else full(parameter.grad)

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> float:
        norm = nn.utils.clip_grad_norm_(parameters, limit or math.inf)
        return float(full(norm))

    def optimizer_tensors(self, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
        return {key: full(value) for key, value in super().optimizer_tensors(names).items()}

    def restore_optimizer(self, names: Mapping[nn.Parameter, str], tensors: Mapping[str, dict[str, Tensor]]) -> None:
        super().restore_optimizer(names, tensors)
        for parameter, state in self.optimizer.state.items():
            for kind, value in state.items():
                if value.shape == parameter.shape:  # a moment
                    state[kind] = like(value, parameter)

    def close(self) -> None:
        reshard(self.wrapped)


def settings() -> FullyShardedDataParallelPlugin:
    """The launch file's `fsdp_config`; ValueError for what has no effect here, or another one."""
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version: {plugin.fsdp_version} does not run here; choices: 2")
    if plugin.activation_checkpointing:
        raise ValueError("fsdp_activation_checkpointing: choose train.gradient_checkpointing=true")
    return plugin


def shard(model: nn.Module, backbone: nn.Module) -> None:
    """Shard a model in place over all processes, block by block, and move it to their devices."""
    if isinstance(model, FSDPModule):  # by an earlier stage
        return
    plugin = settings()
    names = plugin.transformer_cls_names_to_wrap or getattr(backbone, "_no_split_modules", None)
    options: dict[str, Any] = {"offload_policy": plugin.cpu_offload}
    for path, module in [*backbone.named_modules()]:
        # A layer of a stack only. The router calls the embeddings by themselves, outside the forward of the
        # module that would gather them, so they must stay in the outermost group.
        if path.rpartition(".")[2].isdigit() and type(module).__name__ in (names or ()):
            fully_shard(module, reshard_after_forward=plugin.reshard_after_forward, **options)
    fully_shard(model, **options)


def reshard(model: nn.Module) -> None:
    """Free what a forward without a backward (such as validation) has left whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, shard: Tensor) -> Tensor:
    assert isinstance(shard, DTensor)
    return distribute_tensor(tensor, shard.device_mesh, shard.placements)


@contextmanager
def whole(model: nn.Module, parameters: Sequence[nn.Parameter], write: bool) -> Iterator[None]:
    """See `moa.training.distributed.strategy.whole`; copies stand in for the shards."""
    chosen = {id(parameter) for parameter in parameters}
    swapped, copies = [], dict[int, nn.Parameter]()  # experts may have one factor in common
    for module in model.modules():
        for key, shard in module._parameters.items():
            if shard is not None and id(shard) in chosen:
                # the optimiser refers to the shard, which is put back in the end
                if id(shard) not in copies:
                    copies[id(shard)] = nn.Parameter(full(shard.detach()), shard.requires_grad)
                copy = copies[id(shard)]
                swapped.append((module._parameters, key, shard, copy))
                module._parameters[key] = copy
    try:
        yield
    finally:
        for place, key, shard, _ in swapped:
            place[key] = shard
    if write:
        for _, _, shard, copy in swapped:
            shard.data.copy_(like(copy.data, shard))
