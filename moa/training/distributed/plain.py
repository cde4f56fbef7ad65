"""One process, or several that each hold the whole model (DDP), as Accelerate prepares them."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from moa.training import optimizer as states


class Plain:
    """See `moa.training.distributed.strategy.Strategy`."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.accelerator, self.optimizer = accelerator, optimizer
        self.wrapped, self.prepared = accelerator.prepare(model, optimizer)

    def forward(self, *inputs: Any) -> Any:
        return self.wrapped(*inputs)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.accelerator.backward(loss)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return parameter.grad

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> float:
        return float(self.accelerator.clip_grad_norm_(parameters, limit or math.inf))

    def update(self) -> None:
        self.prepared.step()
        self.prepared.zero_grad()

    def discard(self) -> None:
        self.prepared.zero_grad()

    def optimizer_tensors(self, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
        return states.optimizer_tensors(self.optimizer, names)

    def restore_optimizer(
        self, names: Mapping[nn.Parameter, str], tensors: Mapping[str, dict[str, Tensor]]
    ) -> None:
        states.restore_optimizer(self.optimizer, names, tensors)

    def close(self) -> None:
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
