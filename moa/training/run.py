"""A run under way: its model and data, its counters, its log and its checkpoints.

A run is a function of its config: data by position, dropout by restored random states, rates by step.
So a killed run that continues from its last checkpoint repeats the losses of the unbroken run.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from data.collate import Collator
from data.mixture import Mixture, Source
from moa.checkpoint import TrainState, point, pointed, prune, save_checkpoint, step_name
from moa.config import RunConfig
from moa.model import MixtureModel
from moa.sections import StageConfig
from moa.statistics.measure import Measurement
from moa.training.batches import Collated, Layout, TrainingError, dead_worker, training_loader
from moa.training.distributed.strategy import is_zero_3, kind_of, make_strategy, place, whole
from moa.training.optimizer import by_name, make_optimizer, names_of, parameter_table
from moa.training.random_state import restore_rng, rng_tensors, seed_stage
from moa.training.report import Reporter, memory_gib
from moa.training.signals import StopRequest
from moa.training.stages import (
    crosstalk_sites,
    first_position,
    keep_largest,
    parameter_groups,
    set_trainable,
    stage_gates,
    start_weights,
)
from moa.training.step import StepResult, Trainer, refuse_bad_samples
from moa.training.validation import import_lines, validation_losses

COUNTERS = ("step", "stage", "stage_step", "best", "skipped", "non_finite_steps")


@dataclass(kw_only=True)
class Run:
    """Everything that lives as long as a run; the counters are stored in its checkpoints."""

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
    stopping: bool = False  # on all processes: the step under way is the last
    began: float = 0.0  # when the step under way began to wait for its samples
    waited: float = 0.0  # seconds

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    @property
    def done(self) -> bool:
        return self.stage == len(self.config.stages)

    @property
    def current(self) -> StageConfig:
        return [*self.config.stages.values()][self.stage]

    @property
    def validation_due(self) -> bool:
        every = self.config.eval.every
        return self.stage_step == self.current.steps or bool(every and self.step % every == 0)

    @property
    def save_due(self) -> bool:
        """At the end of a stage, which `end_stage` has left at its step 0, and every so often."""
        often = self.step % self.config.train.save_every == 0
        return often or self.stopping or self.stage_step == 0

    def header(self) -> dict[str, Any]:
        return {"step": self.step, "stage": self.current.name, "stage_step": self.stage_step}

    def begin_stage(self, state: TrainState | None) -> Trainer:
        """What the next stage trains, from its start, or from its middle where `state` was saved there.

        Weights are loaded while they are whole, placed or sharded next, and the optimiser is made of what this leaves.
        The random streams come last, so that nothing of the set-up draws from them.
        """
        stage, config, accelerator = self.current, self.config, self.accelerator
        resumed = state if self.stage_step > 0 else None
        with whole(self.model, config, write=True):
            lines = start_weights(self.model, config, stage) if resumed is None else []
            lines += keep_largest(self.model, stage)
        if resumed is None:
            self.best = []
        for line in lines:
            self.reporter.print(f"starts with {line}")
        place(accelerator, self.model)
        if self.step == 0 and not is_zero_3(accelerator):  # whose weights are in pieces
            sources = self.mixture.sources
            for line in import_lines(self.model, config, sources, self.collator, accelerator):
                self.reporter.print(line)
        groups = set_trainable(self.model, parameter_groups(self.model, config), stage)
        done = f", {self.stage_step} of them done" if self.stage_step else ""
        named = f", drawn from {', '.join(stage.sources)}" if stage.sources else ""
        self.reporter.print(f"\nstage {stage.name}: {stage.steps} steps{done}{named}")
        self.reporter.print(parameter_table(self.model, groups, stage.lr))
        strategy = None
        if groups:
            optimizer = make_optimizer(self.model, groups, stage.lr, config.train)
            strategy = make_strategy(accelerator, self.model, optimizer, self.layout, config)
        seed_stage(config.seed, self.stage, accelerator.process_index)
        trainer = Trainer(
            model=self.model, accelerator=accelerator, strategy=strategy, groups=groups, stage=stage,
            losses=config.losses, train=config.train, tasks=config.data.tasks, sources=self.mixture.names,
            watched=crosstalk_sites(self.model, config.losses), log_every=config.logging.every,
        )  # fmt: skip
        if resumed is not None:
            names, scaler = names_of(groups), accelerator.scaler
            if strategy is not None and resumed.optimizer:  # none before the first update
                strategy.restore_optimizer(names, by_name(resumed.optimizer, names))
            restore_rng(resumed.rng, accelerator)
            if scaler is not None and resumed.progress["scaler"]:
                scaler.load_state_dict(resumed.progress["scaler"])
        return trainer

    def steps(self) -> Iterator[list[Collated]]:
        """The micro-batches of each step that is left of the stage; counts the steps."""
        stage, size = self.current, self.layout.batch_size
        first = first_position(self.config, self.stage, size)
        loader = training_loader(
            self.mixture.only(stage.sources),
            self.collator,
            self.layout,
            start=first + self.stage_step * size,
            num_steps=stage.steps - self.stage_step,
            process=self.accelerator.process_index,
            num_workers=self.config.data.num_workers,
        )
        self.model.train()
        self.began = time.perf_counter()
        for micro_batches in loader:
            self.waited = time.perf_counter() - self.began
            self.step, self.stage_step = self.step + 1, self.stage_step + 1
            refuse_bad_samples(micro_batches, self.config.data.on_bad_sample)
            yield micro_batches
            self.began = time.perf_counter()

    def end_stage(self) -> None:
        """After the last step: the next checkpoint starts the next stage."""
        if self.stage_step == self.current.steps:
            self.stage, self.stage_step = self.stage + 1, 0

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """The log is open inside. Errors of training get the step that they belong to."""
        show = self.reporter.print
        self.reporter.start(self.step, sum(s.steps for s in self.config.stages.values()))
        try:
            yield
        except RuntimeError as error:
            died = dead_worker(error)
            if died is None and not isinstance(error, TrainingError):
                raise
            raise TrainingError(f"step {self.step}: {died or error}") from error
        finally:
            self.reporter.close()
        show(self.reporter.waiting())
        if self.skipped:
            rules = ", ".join(f"{count} x {rule}" for rule, count in sorted(self.skipped.items()))
            show(f"left out: {rules}")
        if self.non_finite_steps:
            show(f"not updated at {self.non_finite_steps} steps: loss or gradient not finite")

    def log(self, result: StepResult) -> None:
        """One line of a step, also of one that updated nothing; TrainingError where that stops the run."""
        self.skipped += result.rejected
        self.stopping = result.stopping
        if result.problem is not None:
            self.leave_out(result.problem)
            return
        values, seconds = result.metrics, time.perf_counter() - self.began
        speed = {
            "step_s": seconds,
            "data_wait_s": self.waited,
            "samples_per_s": values["samples"] / seconds,
            "tokens_per_s": values["tokens_read"] / seconds,
            "memory_gib": memory_gib(self.accelerator.device),
            "skipped": sum(self.skipped.values()),
            "non_finite_steps": self.non_finite_steps,
        }
        self.reporter.step(self.header() | values | speed)

    def leave_out(self, problem: str) -> None:
        """Count a step that updated nothing, where the config lets the run continue."""
        train = self.config.train
        if train.on_non_finite == "stop":
            raise TrainingError(f"{problem} (train.on_non_finite=skip leaves such a step out, and counts it)")
        self.non_finite_steps += 1
        if self.non_finite_steps > train.max_non_finite_steps:
            raise TrainingError(f"{problem} (train.max_non_finite_steps={train.max_non_finite_steps} were before)")
        self.reporter.left_out(self.header(), problem, self.non_finite_steps)

    def validate(self) -> bool:
        """Log the losses of the validation sources; whether their mean is among the stage's best."""
        if not self.validation:
            return False
        losses = validation_losses(
            self.model,
            self.validation,
            self.collator,
            self.accelerator,
            self.config,
            gates=lambda batch: stage_gates(self.model, batch, self.current),
        )
        self.reporter.validation(self.header() | losses)
        score = {"step": self.step, "validation": losses["validation"]}
        if not math.isfinite(score["validation"]):
            return False
        ranked = sorted([*self.best, score], key=itemgetter("validation"))  # of equals, the first
        self.best = ranked[: self.config.train.keep_best]
        return score in self.best

    def save(self, trainer: Trainer, improved: bool) -> None:
        """Every process takes part; the first one writes."""
        rng, optimizer = rng_tensors(self.accelerator), {}
        if trainer.strategy is not None:
            optimizer = trainer.strategy.optimizer_tensors(names_of(trainer.groups))
        with whole(self.model, self.config):
            if self.accelerator.is_main_process:
                state = TrainState(progress=self.progress(), optimizer=optimizer, rng=rng)
                save_checkpoint(self.folder, self.step, self.model, self.config, state)
                if improved:
                    point(self.folder, "best", step_name(self.best[0]["step"]))
                prune(self.folder, self.config.train.keep_last, [s["step"] for s in self.best])
        self.accelerator.wait_for_everyone()

    def write_statistics(self) -> None:
        """Statistics of inputs beside the last checkpoint's experts, where asked for; every process takes part."""
        if not self.config.train.statistics:
            return
        last, best = (pointed(self.folder, name) for name in ("last", "best"))
        chosen: dict[str, Any] = {"num_samples": self.config.train.statistics}
        chosen["batch_size"] = self.config.eval.batch_size
        measurement = Measurement(model=self.model, config=self.config, mixture=self.mixture, **chosen)
        with self.accelerator.autocast():
            main = self.accelerator.is_main_process
            lines = measurement.write(self.folder / "checkpoints" / str(last), main=main)
        if best not in (None, last):
            lines.append(
                f"the best checkpoint is {best}; python -m scripts.statistics run={self.folder} writes its statistics"
            )
        for line in lines:
            self.reporter.print(line)
        self.accelerator.wait_for_everyone()

    def progress(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {name: getattr(self, name) for name in COUNTERS} | {
            "num_processes": self.layout.num_processes,
            "distributed": kind_of(self.accelerator),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def restore(self, progress: Mapping[str, Any]) -> None:
        for name in COUNTERS:
            setattr(self, name, progress[name])
        self.skipped = Counter(self.skipped)

    def resume_hint(self) -> str:
        last = pointed(self.folder, "last")
        start = self.folder / "checkpoints" / last if last else "the start: nothing was saved yet"
        return f"the same command with --resume continues from {start}"
