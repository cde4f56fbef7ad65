"""The one loop: stages of steps, with validation, checkpoints and logs where they fall due.

    for each stage: weights -> trainable groups -> optimiser -> steps
    each step:      read -> forward, backward -> checks -> update -> log -> validate? -> save? -> stop?

A run is a function of its config: data by position, dropout by restored random states, rates by
step. So a killed run that goes on from its last checkpoint repeats the unbroken run's losses.
"""

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from data.batch import Batch
from data.collate import Collator
from data.mixture import Mixture, Source
from moa.checkpoint import TrainState, point, pointed, prune, save_checkpoint, step_name
from moa.config import RunConfig
from moa.model import MixtureModel
from moa.routing.losses import weights_at
from moa.training.batches import Collated, Layout, dead_worker, training_loader
from moa.training.distributed.strategy import (
    Strategy,
    is_zero_3,
    kind_of,
    make_strategy,
    place,
    whole,
)
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
from moa.training.signals import StopRequest
from moa.training.stages import (
    first_position,
    parameter_groups,
    set_trainable,
    stage_gates,
    start_weights,
)
from moa.training.step import (
    Counts,
    Figures,
    TrainingError,
    check_gradients,
    count_step,
    non_finite,
    objective,
    refuse_bad_samples,
    restore_anchors,
    update_anchors,
)
from moa.training.validation import import_lines, validation_losses

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
    # steps with the lowest validation losses of the stage under way, the best first
    best: list[dict[str, Any]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    non_finite_steps: int = 0  # at which nothing was updated
    stop: StopRequest = field(default_factory=StopRequest)
    stopping: bool = False  # all processes agree: the step under way is the last

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    @property
    def done(self) -> bool:
        return self.stage == len(self.config.stages)

    def progress(self) -> dict[str, Any]:
        """The counters as JSON."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "stage": self.stage,
            "stage_step": self.stage_step,
            "best": self.best,
            "skipped": dict(self.skipped),
            "non_finite_steps": self.non_finite_steps,
            "num_processes": self.layout.num_processes,
            "distributed": kind_of(self.accelerator),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def restore(self, progress: Mapping[str, Any]) -> None:
        self.step, self.stage = progress["step"], progress["stage"]
        self.stage_step, self.best = progress["stage_step"], progress["best"]
        self.skipped = Counter(progress["skipped"])
        self.non_finite_steps = progress["non_finite_steps"]

    def how_to_go_on(self) -> str:
        last = pointed(self.folder, "last")
        start = self.folder / "checkpoints" / last if last else "the start: nothing was saved yet"
        return f"the same command with --resume goes on from {start}"


def train(run: Run, state: TrainState | None) -> None:
    """Run all stages, or what a checkpoint's `state` leaves of them, until they are done or `run.stop`
    asks for an end.

    Raises TrainingError, BadSampleError or OSError where it cannot go on; the last checkpoint is whole.
    """
    run.reporter.start(run.step, sum(stage.steps for stage in run.config.stages.values()))
    try:
        while not run.done and not run.stopping:
            Stage(run, state).run_steps()
            state = None
    except Exception as error:
        if died := dead_worker(error):
            raise TrainingError(f"step {run.step}: {died}") from error
        raise
    finally:
        run.reporter.close()
    run.reporter.say(run.reporter.waiting())
    if run.skipped:
        run.reporter.say(f"left out: {count_rules(run.skipped)}")
    if run.non_finite_steps:
        run.reporter.say(
            f"not updated at {run.non_finite_steps} steps: loss or gradient not finite"
        )


class Stage:
    """A stage under way: what it trains, the optimiser, the wrapped model."""

    def __init__(self, run: Run, state: TrainState | None):
        """From the stage's start, or from its middle where `state` was saved there."""
        self.run, self.config = run, [*run.config.stages.values()][run.stage]
        self.mixture = run.mixture.only(self.config.sources)
        self.first_position = first_position(run.config, run.stage, run.layout.batch_size)
        in_the_middle = state is not None and run.stage_step > 0
        if not in_the_middle:
            run.best = []
            with whole(run.model, run.config, write=True):
                lines = start_weights(run.model, run.config, self.config)
            for line in lines:
                run.reporter.say(f"starts with {line}")
        place(run.accelerator, run.model)
        if run.step == 0 and not is_zero_3(run.accelerator):  # whose weights are in pieces
            for line in import_lines(
                run.model, run.config, run.mixture.sources, run.collator, run.accelerator
            ):
                run.reporter.say(line)
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
        named = f", drawn from {', '.join(stage.sources)}" if stage.sources else ""
        run.reporter.say(f"\nstage {stage.name}: {stage.steps} steps{done}{named}")
        run.reporter.say(parameter_table(run.model, self.groups, stage.lr))

    def restore(self, state: TrainState) -> None:
        run, names = self.run, names_of(self.groups)
        if self.strategy is not None and state.optimizer:  # none before the first update
            self.strategy.restore_optimizer(names, by_name(state.optimizer, names))
        restore_rng(state.rng, run.accelerator)
        if run.accelerator.scaler is not None and state.progress["scaler"]:
            run.accelerator.scaler.load_state_dict(state.progress["scaler"])

    def run_steps(self) -> None:
        run, stage = self.run, self.config
        steps = training_loader(
            self.mixture,
            run.collator,
            run.layout,
            start=self.first_position + run.stage_step * run.layout.batch_size,
            num_steps=stage.steps - run.stage_step,
            process=run.accelerator.process_index,
            num_workers=run.config.data.num_workers,
        )
        run.model.train()
        began = time.perf_counter()
        for micro_batches in steps:
            waited = time.perf_counter() - began
            run.step, run.stage_step = run.step + 1, run.stage_step + 1
            line = self.step(micro_batches)
            if line is not None:
                seconds = time.perf_counter() - began
                run.reporter.step(self.header() | line | self.speed(line, seconds, waited))
            last = run.stage_step == stage.steps
            every = run.config.eval.every
            improved = (last or bool(every and run.step % every == 0)) and self.validate()
            if last:
                run.stage, run.stage_step = run.stage + 1, 0
            if last or improved or run.stopping or run.step % run.config.train.save_every == 0:
                self.save(improved)
            if run.stopping:
                break
            began = time.perf_counter()
        if self.strategy is not None:
            self.strategy.close()

    def step(self, micro_batches: list[Collated]) -> dict[str, Any] | None:
        """Read, learn, check before anything is changed, update; returns the step's figures.

        None where they are not finite and the config lets the run go on: nothing was updated.
        """
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
        values = self.reduced(figures)
        grad_norm = self.check_and_update(self.strategy, figures)
        if grad_norm is None:
            return None
        named = {f"lr/{name}": rate for name, rate in rates.items()}
        return values | {"grad_norm": grad_norm} | named

    def forward_backward(
        self, strategy: Strategy, batches: list[Batch], counts: Counts, figures: Figures
    ) -> None:
        run = self.run
        progress = (run.stage_step - 1) / max(self.config.steps - 1, 1)
        weights = weights_at(run.config.losses, progress)
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)  # gradients are exchanged once, with the last
            batch = batch.to(run.accelerator.device, non_blocking=True)
            with strategy.accumulating(last):
                output = strategy.forward(batch, stage_gates(run.model, batch, self.config.kind))
                loss = objective(output, counts, weights, run.config.losses.reduction)
                # gradients are averaged over processes; the shares are to be added up
                strategy.backward(loss * run.layout.num_processes, last)
            figures.add(batch, output)

    def reduced(self, figures: Figures) -> dict[str, float]:
        """The step's figures over all processes; and whether one of these was asked to stop."""
        asked = self.run.stop.signal is not None
        values = figures.reduced(self.run.accelerator, stop=asked)
        self.run.stopping = figures.num_stopping > 0
        return values

    def check_and_update(self, strategy: Strategy, figures: Figures) -> float | None:
        """Clip and step; the gradient's norm before clipping.

        None, and nothing is updated, where loss or gradient is not finite.
        """
        train = self.run.config.train
        scaled = train.precision == "fp16"  # overflows are its scaler's business
        if not self.accepted(figures):
            strategy.discard()
            return None
        if self.run.stage_step == 1:
            stop_at_nan = train.on_non_finite == "stop" and not scaled
            check_gradients(self.groups, strategy.gradient, finite=stop_at_nan)
        trained = [p for parameters in self.groups.values() for p in parameters.values()]
        grad_norm = strategy.clip(trained, train.clip_norm)
        if not self.accepted(figures, 0.0 if scaled else grad_norm):
            strategy.discard()
            return None
        strategy.update()
        self.watch_overflows()
        return grad_norm if math.isfinite(grad_norm) else -1.0

    def accepted(self, figures: Figures, grad_norm: float = 0.0) -> bool:
        """Whether all is finite; if not, the run stops, or counts a step without an update."""
        run, train = self.run, self.run.config.train
        problem = non_finite(figures, grad_norm, run.accelerator)
        if problem is None:
            return True
        if train.on_non_finite == "stop":
            hint = "train.on_non_finite=skip leaves such a step out, and counts it"
            raise TrainingError(f"step {run.step}: {problem} ({hint})")
        run.non_finite_steps += 1
        if run.non_finite_steps > train.max_non_finite_steps:
            limit = f"train.max_non_finite_steps={train.max_non_finite_steps} were before"
            raise TrainingError(f"step {run.step}: {problem} ({limit})")
        run.reporter.left_out(self.header(), problem, run.non_finite_steps)
        return False

    def watch_overflows(self) -> None:
        skipped = self.run.accelerator.optimizer_step_was_skipped
        self.overflows = self.overflows + 1 if skipped else 0
        if self.overflows > MAX_OVERFLOWS:
            raise TrainingError(
                f"step {self.run.step}: fp16 gradients overflowed {self.overflows} times in a "
                "row; choose train.precision=bf16 or fp32, or a lower learning rate"
            )

    def anchor_step(self, batches: list[Batch], figures: Figures) -> dict[str, Any] | None:
        """Training-free: add the samples to the anchors, then look at what the gates now are."""
        run = self.run
        before = update_anchors(run.model, batches, run.accelerator)
        with torch.no_grad():
            for batch in batches:
                batch = batch.to(run.accelerator.device)
                figures.add(batch, run.model(batch))
        values = self.reduced(figures)
        if not self.accepted(figures):
            restore_anchors(run.model, before)
            return None
        return values | {"grad_norm": 0.0}

    def validate(self) -> bool:
        """Log the losses of the validation sources; whether their mean is among the stage's best."""
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
            gates=lambda batch: stage_gates(run.model, batch, self.config.kind),
        )
        run.reporter.validation(self.header() | losses)
        score = {"step": run.step, "validation": losses["validation"]}
        if not math.isfinite(score["validation"]):
            return False
        ranked = sorted([*run.best, score], key=itemgetter("validation"))  # of equals, the first
        run.best = ranked[: run.config.train.keep_best]
        return score in run.best

    def save(self, improved: bool) -> None:
        """Every process takes part; the first one writes."""
        run = self.run
        rng, optimizer = rng_tensors(run.accelerator), {}
        if self.strategy is not None:
            optimizer = self.strategy.optimizer_tensors(names_of(self.groups))
        with whole(run.model, run.config):
            if run.accelerator.is_main_process:
                state = TrainState(progress=run.progress(), optimizer=optimizer, rng=rng)
                save_checkpoint(run.folder, run.step, run.model, run.config, state)
                if improved:
                    point(run.folder, "best", step_name(run.best[0]["step"]))
                prune(run.folder, run.config.train.keep_last, [s["step"] for s in run.best])
        run.accelerator.wait_for_everyone()

    def header(self) -> dict[str, Any]:
        run = self.run
        return {"step": run.step, "stage": self.config.name, "stage_step": run.stage_step}

    def speed(self, values: Mapping[str, float], seconds: float, waited: float) -> dict[str, Any]:
        return {
            "step_s": seconds,
            "data_wait_s": waited,
            "samples_per_s": values["samples"] / seconds,
            "tokens_per_s": values["tokens_read"] / seconds,
            "memory_gib": memory_gib(self.run.accelerator.device),
            "skipped": sum(self.run.skipped.values()),
            "non_finite_steps": self.run.non_finite_steps,
        }
