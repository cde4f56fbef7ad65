"""The planner against the allocator: what a step takes, planned on shapes and measured on a device.

    python -m bench.planning [size=small|large] [device=cpu|cuda] [dtype=fp32|bf16]

A random LLaVA with its experts and router takes a training step, with and without gradient checkpointing. The plan
comes from a copy of the model without data; what is measured is the peak of torch's allocator: the profiler's on a CPU,
max_memory_allocated on a GPU. Ratios are planned over measured. Writes results/bench_planning.json.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING

from rich.console import Console

from bench.settings import SIZES, Sized, run_bench, write_results
from moa.cli.ranges import Count
from moa.sections import StageConfig, TrainConfig

if TYPE_CHECKING:
    from data.batch import Batch
    from moa.model import MixtureModel
    from moa.parts import Parameters
    from moa.planning.step import StepCosts

STAGE = StageConfig(name="joint", steps=1)


def groups_of(model: "MixtureModel") -> "dict[str, Parameters]":
    experts = {str(number): p for number, p in enumerate(model.bank.parameters())}
    router = dict(model.router.named_parameters()) if model.router is not None else {}
    return {"experts": experts, "router": router}


def planned(model: "MixtureModel", train: TrainConfig, batch: "Batch") -> "StepCosts":
    """From a copy of the model without data."""
    from torch._subclasses.fake_tensor import FakeCopyMode

    from moa.planning.step import measure_step
    from moa.planning.tensors import fake_mode

    with FakeCopyMode(fake_mode()):
        fake = copy.deepcopy(model)
    if train.gradient_checkpointing:
        fake.enable_gradient_checkpointing()  # the copy's own bank keeps its gates
    return measure_step(fake, groups_of(fake), STAGE, train, batch)


def allocated(run: Callable[[], object], device: str) -> int:
    """Bytes that a run adds at its peak to what is there before, as torch's allocator has it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def measured_peak(model: "MixtureModel", train: TrainConfig, batch: "Batch", device: str) -> int:
    """Of a micro-batch, forward and backward, after one that has left its gradients."""
    from moa.planning.step import autocast
    from moa.training.stages import stage_gates

    def step() -> None:
        with autocast(device, train):
            output = model(batch, stage_gates(model, batch, STAGE))
            loss = output.loss_per_sample.sum() + sum(output.aux.values())
        loss.backward()

    step()
    return allocated(step, device)


def optimizer_bytes(model: "MixtureModel", train: TrainConfig) -> int:
    from moa.planning.step import bytes_of
    from moa.training.optimizer import make_optimizer

    optimizer = make_optimizer(model, groups_of(model), STAGE.lr, train)
    optimizer.step()
    return bytes_of(value for state in optimizer.state.values() for value in state.values())


@dataclass(frozen=True, kw_only=True)
class Settings(Sized):
    experts: list[Count] = field(default_factory=lambda: [4])


def run(settings: Settings, console: Console) -> None:
    from bench.bench_model import make_backbone, make_batch, make_mixture

    size, device = SIZES[settings.size], settings.place
    batch = make_batch(size, device)
    mask = batch.attention_mask.clone()
    mask[-1, -1] = 0  # a padded token, and so a mask, as in most batches
    batch = replace(batch, attention_mask=mask)
    found: dict[str, object] = {}
    for count, checkpointing in product(settings.experts, (False, True)):
        setting = settings.at(size, count)
        train = TrainConfig(precision=settings.dtype, gradient_checkpointing=checkpointing)
        model = make_mixture(make_backbone(size, device, setting.dtype), count, setting.rank, device).train()
        plan = planned(model, train, batch)
        if checkpointing:
            model.enable_gradient_checkpointing()
        peak, states = measured_peak(model, train, batch, device), optimizer_bytes(model, train)
        label = f"{count} experts{', checkpointing' if checkpointing else ''}"
        moments = f"AdamW {plan.optimizer / 2**20:.2f} and {states / 2**20:.2f} MiB"
        peaks = f"planned {plan.peak / 2**20:.1f} MiB, measured {peak / 2**20:.1f} MiB"
        print(f"{label}: {peaks}; {moments}")
        found[label] = {"peak": plan.peak / peak, "optimizer": plan.optimizer / states}
    write_results("planning", {"where": settings.where(settings.size), "planned_over_measured": found})


if __name__ == "__main__":
    run_bench(Settings, run, __doc__)
