"""What one training step needs, by running it: on fake tensors for a plan, on real ones to check it.

    parameters + gradients + optimiser      there all the time
    kept                                    activations that wait for the backward pass
    peak                                    the most that a step adds to what is there all the time

The step is the loop's: autocast, the model's own forward and backward, make_optimizer.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from data.batch import Batch
from moa.build import DTYPES
from moa.model import MixtureModel
from moa.parts import Parameters
from moa.planning.tensors import LiveBytes, RealMasks
from moa.sections import StageConfig, TrainConfig
from moa.training.optimizer import make_optimizer
from moa.training.stages import stage_gates


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Bytes of one micro-batch on one device, and its floating-point operations."""

    frozen: int
    trained: dict[str, int]  # by group
    gradients: int
    optimizer: int
    kept: int
    peak: int
    flops: int
    backward: int  # parameters whose layers the backward pass goes through, in bytes


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of the storages behind tensors, each once: tied weights share one."""
    storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


def measure_step(
    model: MixtureModel, groups: Mapping[str, Parameters], stage: StageConfig, train: TrainConfig, batch: Batch
) -> StepCosts:
    """Run a micro-batch that is not the first of its step, so that gradients are there, and update. The model is as a
    stage has set it up (`set_trainable`, checkpointing, training mode)."""
    trained = [p for parameters in groups.values() for p in parameters.values()]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in trained if p.grad is not None]
    live = LiveBytes([*model.parameters(), *model.buffers(), *gradients])
    static = live.now
    with RealMasks(), live, visited() as backward:
        with autocast(batch.input_ids.device.type, train):
            output = model(batch, stage_gates(model, batch, stage))
            loss = output.loss_per_sample.sum() + sum(output.aux.values())
        kept = live.now - static
        loss.backward()
    optimizer = make_optimizer(model, groups, stage.lr, train)
    with RealMasks():
        optimizer.step()
    states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    return StepCosts(
        frozen=bytes_of(p for p in model.parameters() if not p.requires_grad),
        trained={name: bytes_of(parameters.values()) for name, parameters in groups.items()},
        gradients=bytes_of(gradients),
        optimizer=bytes_of(states),
        kept=kept,
        peak=live.peak - static,
        flops=live.flops,
        backward=bytes_of(backward),
    )


def autocast(device: str, train: TrainConfig) -> AbstractContextManager[Any]:
    return nullcontext() if train.precision == "fp32" else torch.autocast(device, DTYPES[train.precision])


@contextmanager
def visited() -> Iterator[list[Tensor]]:
    """Inside, collects the parameters of layers whose output has a gradient."""
    found: list[Tensor] = []

    def collect(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            found.extend(module.parameters(recurse=False))

    with register_module_forward_hook(collect):
        yield found
