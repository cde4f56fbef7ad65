"""One process, or several that each hold the whole model (DDP), as Accelerate prepares them."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn


class Plain:
    """A model and its optimiser, from the first step of a stage to the last; `Fsdp` and `Zero` shard them.

    Tensors passed in and returned are whole, so every process must call.
    """

    optimizer: torch.optim.Optimizer  # as it was made: its groups have the rates

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.accelerator, self.optimizer = accelerator, optimizer
        self.wrapped, self.prepared = accelerator.prepare(model, optimizer)

    def forward(self, *inputs: Any) -> Any:
        return self.wrapped(*inputs)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch's forward and backward: the last one exchanges the gradients."""
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.accelerator.backward(loss)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The whole gradient, exchanged; None where backward has left none."""
        return parameter.grad

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> float:
        """Clip to a norm of `limit` (0: do not); returns the norm before."""
        return float(self.accelerator.clip_grad_norm_(parameters, limit or math.inf))

    def update(self) -> None:
        """Step and drop the gradients; DeepSpeed has done both with `clip`."""
        self.prepared.step()
        self.prepared.zero_grad()

    def discard(self) -> None:
        """Drop the gradients, before or after `clip` found them not finite, and update nothing."""
        self.prepared.zero_grad()

    def optimizer_tensors(self, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
        """The optimiser's state by `name:kind`."""
        return {
            f"{name}:{kind}": torch.as_tensor(value)
            for parameter, name in names.items()
            for kind, value in self.optimizer.state.get(parameter, {}).items()
        }

    def restore_optimizer(self, names: Mapping[nn.Parameter, str], tensors: Mapping[str, dict[str, Tensor]]) -> None:
        for parameter, name in names.items():
            self.optimizer.state[parameter] = {
                kind: value.to(parameter.device, copy=True)  # fused: its count of steps lies there too
                for kind, value in tensors[name].items()
                if kind != "master"  # fp32 copy that DeepSpeed keeps of a parameter
            }

    def close(self) -> None:
        """Release the model: the next stage trains other parameters."""
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
