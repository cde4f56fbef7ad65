"""One optimiser step: forward, backward, check, clip, update.

    loss = sum over the step's samples on all processes / their number + weighted losses on gates

Sums and counts are reduced over processes, never means: micro-batches may differ in size where bad samples go.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from data.batch import Batch
from data.checks import BadSampleError, Rule
from data.collate import IGNORED
from moa.experts.crosstalk import Watch
from moa.model import MixtureModel, MixtureOutput
from moa.parts import Parameters
from moa.routing.losses import OF_EXPERTS, weights_at
from moa.routing.schedule import draw_gates
from moa.sections import LossConfig, StageConfig, TrainConfig
from moa.training.batches import Collated, TrainingError
from moa.training.distributed.plain import Plain
from moa.training.metrics import Metrics, non_finite
from moa.training.optimizer import names_of, rate_factor, set_rates
from moa.training.stages import stage_gates

RULES: tuple[str, ...] = get_args(Rule)
MAX_OVERFLOWS = 50  # fp16: in a row; the loss scale halves at each, and would be gone


@dataclass(kw_only=True)
class Trainer:
    model: MixtureModel
    accelerator: Accelerator
    strategy: Plain | None  # the optimiser, and the model on its processes; None: means are learned
    groups: dict[str, Parameters]  # what the optimiser moves, by part
    stage: StageConfig
    losses: LossConfig
    train: TrainConfig
    tasks: Sequence[str]  # that metrics are reported by
    sources: Sequence[str]
    watched: frozenset[str]  # sites whose crosstalk is measured
    log_every: int  # steps; crosstalk is measured at these alone, or at all where its loss has a weight
    overflows: int = 0  # fp16: steps in a row that the loss scale skipped

    def close(self) -> None:
        if self.strategy is not None:
            self.strategy.close()


@dataclass(frozen=True)
class StepResult:
    """What a step computed; alike on all processes."""

    metrics: dict[str, float]
    problem: str | None  # what was not finite; nothing was updated then
    rejected: Counter[str]  # samples that were left out, by rule
    stopping: bool  # one of the processes was asked to stop


def train_step(
    trainer: Trainer,
    micro_batches: Sequence[Collated],
    step: int,
    *,
    stop: Callable[[], bool] = lambda: False,
    extra_loss: Callable[[], Tensor] | None = None,
) -> StepResult:
    """Step 1, 2, ... of a stage; every process calls it with its own micro-batches.

    `extra_loss()` is added to the loss, such as a proximal term. `stop` is called once, after backward: a signal that
    arrives until then ends the run with this step.
    """
    accelerator, strategy = trainer.accelerator, trainer.strategy
    counts = count_step(micro_batches, accelerator)
    batches = [batch for batch, _ in micro_batches if batch is not None]
    names, choices = trainer.model.bank.names, trainer.model.routing.roles.choices
    metrics = Metrics(names, trainer.tasks, trainer.sources, accelerator.device, choices)
    if strategy is None:
        values, problem = learn_means(trainer, batches, metrics, stop)
    else:
        rates = set_rates(strategy.optimizer, rate_factor(trainer.stage, step))
        progress = (step - 1) / max(trainer.stage.steps - 1, 1)
        weights = weights_at(trainer.losses, progress)
        trainer.model.bank.context.watch = watch_at(trainer, step, weights)
        loads = {site: torch.zeros_like(bias) for site, bias in trainer.model.bank.token_biases.items()}
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)  # gradients are exchanged once, with the last
            batch = batch.to(accelerator.device, non_blocking=True)
            with strategy.accumulating(last):
                draws = draw_gates(trainer.stage.gates, progress, len(batch), len(choices))
                gates = stage_gates(trainer.model, batch, trainer.stage, draws)
                output = strategy.forward(batch, gates, draws)
                loss = objective(output, counts, weights, trainer.losses.reduction)
                if extra_loss is not None:
                    loss = loss + extra_loss() * len(batch) / counts.samples
                # gradients are averaged over processes; the shares are to be added up
                strategy.backward(loss * accelerator.num_processes, last)
            metrics.add(batch, output)
            for site, load in output.loads.items():
                loads[site] += load.to(loads[site].device)
        trainer.model.bank.context.watch = None
        values = metrics.reduced(accelerator, stop=stop())
        values |= metrics.crosstalk(accelerator, trainer.model.counted)
        grad_norm, problem = check_and_update(trainer, strategy, metrics, step)
        if loads and problem is None and trainer.stage.kind != "experts":  # alike on all processes
            update_biases(trainer.model, loads, lambda own: accelerator.reduce(own.to(accelerator.device), "sum"))
        values |= {"grad_norm": grad_norm} | {f"lr/{name}": rate for name, rate in rates.items()}
    return StepResult(values, problem, counts.rejected, metrics.num_stopping > 0)


def update_biases(model: MixtureModel, loads: Mapping[str, Tensor], add: Callable[[Tensor], Tensor]) -> None:
    """Move the biases of top-k by the loads of all processes, which `add` adds up; all of them call it."""
    total = add(torch.cat([*loads.values()])).cpu()
    counts = [len(load) for load in loads.values()]
    model.balance(dict(zip(loads, total.split(counts), strict=True)))


def watch_at(trainer: Trainer, step: int, weights: Mapping[str, float]) -> Watch | None:
    """What the sites measure at this step, alike on all processes: nothing at most steps, so that logging is free."""
    penalised = weights["crosstalk"] > 0
    due = penalised or step % trainer.log_every == 0
    sites, penalties = trainer.watched if due else frozenset(), tuple(n for n in OF_EXPERTS if weights[n] > 0)
    if trainer.stage.kind == "router" or not (sites or penalties):
        return None
    routed = frozenset(trainer.model.routing.roles.named("routed"))
    return Watch(sites=sites, gradient=penalised, penalties=penalties, routed=routed)


def check_and_update(trainer: Trainer, strategy: Plain, metrics: Metrics, step: int) -> tuple[float, str | None]:
    """The gradient's norm before clipping, and what is not finite; nothing is updated then."""
    accelerator, train = trainer.accelerator, trainer.train
    scaled = train.precision == "fp16"  # its scaler skips a step that overflows
    if problem := non_finite(metrics, 0.0, accelerator):
        strategy.discard()
        return math.nan, problem
    if step == 1:
        stop_at_nan = train.on_non_finite == "stop" and not scaled
        check_gradients(trainer.groups, strategy.gradient, finite=stop_at_nan)
    trained = [p for parameters in trainer.groups.values() for p in parameters.values()]
    grad_norm = strategy.clip(trained, train.clip_norm)
    if problem := non_finite(metrics, 0.0 if scaled else grad_norm, accelerator):
        strategy.discard()
        return math.nan, problem
    strategy.update()
    skipped = accelerator.optimizer_step_was_skipped
    trainer.overflows = trainer.overflows + 1 if skipped else 0
    if trainer.overflows > MAX_OVERFLOWS:
        happened = f"fp16 gradients overflowed {trainer.overflows} times in a row"
        raise TrainingError(f"{happened}; choose train.precision=bf16 or fp32, or a lower learning rate")
    return (grad_norm if math.isfinite(grad_norm) else -1.0), None


@dataclass(frozen=True, kw_only=True)
class Counts:
    samples: float
    tokens: float  # of answers
    rejected: Counter[str]


def count_step(micro_batches: Sequence[Collated], accelerator: Accelerator) -> Counts:
    """Samples, answer tokens and left-out samples by rule; every process must call it."""
    batches = [batch for batch, _ in micro_batches if batch is not None]
    rejected: Counter[str] = Counter(error.rule for _, errors in micro_batches for error in errors)
    samples = sum(len(batch) for batch in batches)
    tokens = sum(int((b.labels != IGNORED).sum()) for b in batches if b.labels is not None)
    local = torch.tensor([samples, tokens, *(rejected[rule] for rule in RULES)]).float()
    total = accelerator.reduce(local.to(accelerator.device), "sum").tolist()
    counts = {rule: int(n) for rule, n in zip(RULES, total[2:], strict=True) if n}
    return Counts(samples=total[0], tokens=total[1], rejected=Counter(counts))


def refuse_bad_samples(micro_batches: Sequence[Collated], policy: str) -> None:
    """Stop at a bad sample where the config says so, and where a micro-batch has no other."""
    for batch, errors in micro_batches:
        if errors and policy == "error":
            hint = "data.on_bad_sample=skip leaves such samples out, and counts them"
            raise BadSampleError(errors[0].where, errors[0].rule, f"{errors[0].detail} ({hint})")
        if batch is None:
            raise TrainingError(f"every sample of a micro-batch is bad: {errors[0]}")


def objective(output: MixtureOutput, counts: Counts, weights: Mapping[str, float], reduction: str) -> Tensor:
    """This micro-batch's share of the step's loss; the shares of all processes add up to it."""
    if reduction == "token":
        language = (output.loss_per_sample * output.num_tokens).sum() / counts.tokens
    else:
        language = output.loss_per_sample.sum() / counts.samples
    share = len(output.loss_per_sample) / counts.samples
    used = {name: weight for name, weight in weights.items() if weight and name in output.aux}
    return language + share * sum(weight * output.aux[name] for name, weight in used.items())


def check_gradients(
    groups: Mapping[str, Parameters], gradient: Callable[[nn.Parameter], Tensor | None], finite: bool
) -> None:
    """Every trainable tensor has a (finite) gradient, which may be zero, or TrainingError lists the others."""
    missing, broken = [], []
    for parameter, name in names_of(groups).items():
        found = gradient(parameter)
        if found is None:
            missing.append(name)
        elif finite and not torch.isfinite(found).all():
            broken.append(name)
    for names, what in ((missing, "no gradient"), (broken, "a gradient that is not finite")):
        if names:
            raise TrainingError(f"after the first step {len(names)} trainable tensors have {what}: {', '.join(names)}")


@torch.no_grad()
def learn_means(
    trainer: Trainer, batches: Sequence[Batch], metrics: Metrics, stop: Callable[[], bool]
) -> tuple[dict[str, float], str | None]:
    """Add the samples to the anchors of all processes, then measure the gates; undone where a loss is not finite."""
    model, accelerator = trainer.model, trainer.accelerator
    assert model.router is not None  # of a kind that learns by means
    buffers = dict(model.router.named_buffers())
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    for batch in batches:
        model.update_anchors(batch.to(accelerator.device))
    if accelerator.num_processes > 1:
        for name, buffer in buffers.items():
            added = accelerator.reduce(buffer - before[name], "sum")
            buffer.copy_(before[name] + added)
    for batch in batches:
        batch = batch.to(accelerator.device)
        metrics.add(batch, model(batch))
    values = metrics.reduced(accelerator, stop=stop())
    problem = non_finite(metrics, 0.0, accelerator)
    if problem is not None:
        for name, buffer in buffers.items():
            buffer.copy_(before[name])
    return values | {"grad_norm": 0.0}, problem
