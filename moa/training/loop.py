"""The one loop: stages of steps, with validation, checkpoints and logs where they fall due.

    for each stage: weights -> trainable groups -> optimiser -> steps
    each step:      read -> forward, backward -> checks -> update -> log -> validate? -> save?

A run is a function of its config: data by position, dropout by restored random states, rates by
step. So a killed run that goes on from its last checkpoint repeats the unbroken run's losses.
"""

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from data.batch import Batch
from data.collate import Collator
from data.mixture import Mixture, Source
from moa.checkpoint import TrainState, point, prune, save_checkpoint
from moa.config import RunConfig
from moa.model import MixtureModel
from moa.training.batches import Collated, Layout, training_loader
from moa.training.optimizer import (
    by_name,
    make_optimizer,
    names_of,
    parameter_table,
    rate_factor,
    set_rates,
)
from moa.training.random_state import restore_rng, rng_tensors, seed_stage
from moa.training.report import Reporter, count_rules, memory_gib
from moa.training.stages import parameter_groups, set_trainable, stage_gates, start_weights
from moa.training.step import (
    Counts,
    Figures,
    TrainingError,
    aux_weights,
    check_gradients,
    count_step,
    objective,
    refuse_bad_samples,
    stop_if_not_finite,
    update_anchors,
)
from moa.training.strategy import Strategy, make_strategy, place, whole
from moa.training.validation import validation_losses

MAX_OVERFLOWS = 50  # fp16: in a row; the loss scale halves at each, and would be gone


@dataclass(kw_only=True)
class Run:
    """Everything that lives as long as a run; the counters go into its checkpoints."""

    config: RunConfig
    accelerator: Accelerator
    model: MixtureModel
    mixture: Mixture
    validation: dict[str, Source]
    collator: Collator
    reporter: Reporter
    layout: Layout
    step: int = 0  # optimiser steps done, over all stages
    stage: int = 0  # index of the stage under way, or that comes next
    stage_step: int = 0
    best: dict[str, Any] | None = None  # step and validation loss, of the stage under way
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    def progress(self) -> dict[str, Any]:
        """The counters as JSON."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "stage": self.stage,
            "stage_step": self.stage_step,
            "best": self.best,
            "position": self.step * self.layout.batch_size,
            "skipped": dict(self.skipped),
            "num_processes": self.layout.num_processes,
            "distributed": self.accelerator.distributed_type.value.lower(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def restore(self, progress: Mapping[str, Any]) -> None:
        self.step, self.stage = progress["step"], progress["stage"]
        self.stage_step, self.best = progress["stage_step"], progress["best"]
        self.skipped = Counter(progress["skipped"])


def train(run: Run, state: TrainState | None) -> None:
    """Run all stages, or what a checkpoint's `state` leaves of them."""
    run.reporter.start(run.step, sum(stage.steps for stage in run.config.stages))
    try:
        while run.stage < len(run.config.stages):
            Stage(run, state).run_steps()
            state = None
    finally:
        run.reporter.close()
    if run.skipped:
        run.reporter.say(f"left out: {count_rules(run.skipped)}")


class Stage:
    """A stage under way: what it trains, the optimiser, the wrapped model."""

    def __init__(self, run: Run, state: TrainState | None):
        """From the stage's start, or from its middle where `state` was saved there."""
        self.run, self.config = run, run.config.stages[run.stage]
        in_the_middle = state is not None and run.stage_step > 0
        if not in_the_middle:
            run.best = None
            with whole(run.model, run.config, write=True):
                lines = start_weights(run.model, run.config, self.config)
            for line in lines:
                run.reporter.say(f"starts with {line}")
        place(run.accelerator, run.model)
        self.groups = set_trainable(run.model, parameter_groups(run.model, run.config), self.config)
        self.show()
        self.strategy: Strategy | None = None
        if self.groups:  # anchors learn without gradients
            optimizer = make_optimizer(run.model, self.groups, self.config.lr, run.config.train)
            self.strategy = make_strategy(
                run.accelerator, run.model, optimizer, run.layout, run.config
            )
        seed_stage(run.config.seed, run.stage, run.accelerator)
        if state is not None and in_the_middle:
            self.restore(state)
        self.overflows = 0

    def show(self) -> None:
        run, stage = self.run, self.config
        done = f", {run.stage_step} of them done" if run.stage_step else ""
        run.reporter.say(f"\nstage {stage.name}: {stage.steps} steps{done}")
        run.reporter.say(parameter_table(run.model, self.groups, stage.lr))

    def restore(self, state: TrainState) -> None:
        run, names = self.run, names_of(self.groups)
        if self.strategy is not None:
            self.strategy.restore_optimizer(names, by_name(state.optimizer, names))
        restore_rng(state.rng, run.accelerator)
        if run.accelerator.scaler is not None and state.progress["scaler"]:
            run.accelerator.scaler.load_state_dict(state.progress["scaler"])

    def run_steps(self) -> None:
        run, stage = self.run, self.config
        steps = training_loader(
            run.mixture,
            run.collator,
            run.layout,
            start=run.step * run.layout.batch_size,
            num_steps=stage.steps - run.stage_step,
            process=run.accelerator.process_index,
            num_workers=run.config.data.num_workers,
        )
        run.model.train()
        began = time.perf_counter()
        for micro_batches in steps:
            run.step, run.stage_step = run.step + 1, run.stage_step + 1
            line = self.step(micro_batches)
            now = time.perf_counter()
            run.reporter.step(self.header() | line | self.speed(line, now - began))
            last = run.stage_step == stage.steps
            every = run.config.eval.every
            improved = (last or bool(every and run.step % every == 0)) and self.validate()
            if last:
                run.stage, run.stage_step = run.stage + 1, 0
            if last or improved or run.step % run.config.train.save_every == 0:
                self.save(improved)
            began = time.perf_counter()
        if self.strategy is not None:
            self.strategy.close()

    def step(self, micro_batches: list[Collated]) -> dict[str, Any]:
        """Read, learn, check before anything is changed, update; returns the step's figures."""
        run = self.run
        refuse_bad_samples(micro_batches, run.config.data.on_bad_sample, run.step)
        counts = count_step(micro_batches, run.accelerator)
        run.skipped += counts.rejected
        batches = [batch for batch, _ in micro_batches if batch is not None]
        figures = Figures(
            run.model.bank.names, run.config.data.tasks, run.mixture.names, run.accelerator.device
        )
        if self.strategy is None:
            return self.anchor_step(batches, figures)
        rates = set_rates(self.strategy.optimizer, rate_factor(self.config, run.stage_step))
        self.forward_backward(self.strategy, batches, counts, figures)
        values = figures.reduced(run.accelerator)
        grad_norm = self.check_and_update(self.strategy, figures, values)
        del values["non_finite"]
        named = {f"lr/{name}": rate for name, rate in rates.items()}
        return values | {"grad_norm": grad_norm} | named

    def forward_backward(
        self, strategy: Strategy, batches: list[Batch], counts: Counts, figures: Figures
    ) -> None:
        run = self.run
        progress = (run.stage_step - 1) / max(self.config.steps - 1, 1)
        weights = aux_weights(run.config.losses, progress)
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)  # gradients are exchanged once, with the last
            batch = batch.to(run.accelerator.device)
            with strategy.accumulating(last):
                output = strategy.forward(batch, stage_gates(run.model, batch, self.config.name))
                loss = objective(output, counts, weights, run.config.losses.reduction)
                # gradients are averaged over processes; the shares are to be added up
                strategy.backward(loss * run.layout.num_processes, last)
            figures.add(batch, output)

    def check_and_update(
        self, strategy: Strategy, figures: Figures, values: Mapping[str, float]
    ) -> float:
        """Clip and step, unless something is not finite; the gradient's norm before clipping."""
        run = self.run
        scaled = run.config.train.precision == "fp16"  # overflows are its scaler's business
        stop_if_not_finite(figures, values, 0.0, run.accelerator, run.step)
        if run.stage_step == 1:
            check_gradients(self.groups, strategy.gradient, finite=not scaled)
        trained = [p for parameters in self.groups.values() for p in parameters.values()]
        grad_norm = strategy.clip(trained, run.config.train.clip_norm)
        stop_if_not_finite(figures, values, 0.0 if scaled else grad_norm, run.accelerator, run.step)
        strategy.update()
        self.watch_overflows()
        return grad_norm if math.isfinite(grad_norm) else -1.0

    def watch_overflows(self) -> None:
        skipped = self.run.accelerator.optimizer_step_was_skipped
        self.overflows = self.overflows + 1 if skipped else 0
        if self.overflows > MAX_OVERFLOWS:
            raise TrainingError(
                f"step {self.run.step}: fp16 gradients overflowed {self.overflows} times in a "
                "row; choose train.precision=bf16 or fp32, or a lower learning rate"
            )

    def anchor_step(self, batches: list[Batch], figures: Figures) -> dict[str, Any]:
        """Training-free: add the samples to the anchors, then look at what the gates now are."""
        run = self.run
        update_anchors(run.model, batches, run.accelerator)
        with torch.no_grad():
            for batch in batches:
                batch = batch.to(run.accelerator.device)
                figures.add(batch, run.model(batch))
        values = figures.reduced(run.accelerator)
        stop_if_not_finite(figures, values, 0.0, run.accelerator, run.step)
        return values | {"grad_norm": 0.0}

    def validate(self) -> bool:
        """Log the losses of the validation sources; whether their mean is the stage's best yet."""
        run = self.run
        if not run.validation:
            return False
        losses = validation_losses(
            run.model,
            run.validation,
            run.collator,
            run.accelerator,
            batch_size=run.config.eval.batch_size,
            num_workers=run.config.data.num_workers,
            on_bad_sample=run.config.data.on_bad_sample,
            gates=lambda batch: stage_gates(run.model, batch, self.config.name),
        )
        run.reporter.validation(self.header() | losses)
        improved = run.best is None or losses["validation"] < run.best["validation"]
        if improved:
            run.best = {"step": run.step, "validation": losses["validation"]}
        return improved

    def save(self, improved: bool) -> None:
        """Every process takes part; the first one writes."""
        run = self.run
        rng, optimizer = rng_tensors(run.accelerator), {}
        if self.strategy is not None:
            optimizer = self.strategy.optimizer_tensors(names_of(self.groups))
        with whole(run.model, run.config):
            if run.accelerator.is_main_process:
                state = TrainState(progress=run.progress(), optimizer=optimizer, rng=rng)
                folder = save_checkpoint(run.folder, run.step, run.model, run.config, state)
                if improved:
                    point(run.folder, "best", folder.name)
                prune(run.folder, run.config.train.keep_last)
        run.accelerator.wait_for_everyone()

    def header(self) -> dict[str, Any]:
        run = self.run
        return {"step": run.step, "stage": self.config.name, "stage_step": run.stage_step}

    def speed(self, values: Mapping[str, float], seconds: float) -> dict[str, Any]:
        return {
            "samples_per_s": values["samples"] / seconds,
            "tokens_per_s": values["tokens_read"] / seconds,
            "memory_gib": memory_gib(self.run.accelerator.device),
            "skipped": sum(self.run.skipped.values()),
        }
