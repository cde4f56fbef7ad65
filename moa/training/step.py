"""What one optimiser step computes: its loss, its figures, and what stops it.

    loss = sum over the step's samples on all processes / their number + weighted losses on gates

Sums and counts are reduced over processes, never means: micro-batches may differ in size where bad
samples were left out.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from data.batch import Batch
from data.checks import BadSampleError, Rule, name_of
from data.collate import IGNORED
from data.sample import Sample
from moa.model import MixtureModel, MixtureOutput
from moa.parts import Parameters
from moa.routing.losses import AUX
from moa.training.batches import Collated
from moa.training.optimizer import names_of

RULES: tuple[str, ...] = get_args(Rule)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, on which rank, for which samples."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a step holds, over all processes."""

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


def refuse_bad_samples(micro_batches: Sequence[Collated], policy: str, step: int) -> None:
    """Stop at a bad sample where the config says so, and where a micro-batch has no other."""
    for batch, errors in micro_batches:
        if errors and policy == "error":
            hint = "data.on_bad_sample=skip leaves such samples out, and counts them"
            raise BadSampleError(errors[0].where, errors[0].rule, f"{errors[0].detail} ({hint})")
        if batch is None:
            raise TrainingError(f"step {step}: every sample of a micro-batch is bad: {errors[0]}")


def objective(
    output: MixtureOutput, counts: Counts, weights: Mapping[str, float], reduction: str
) -> Tensor:
    """This micro-batch's share of the step's loss; the shares of all processes add up to it."""
    if reduction == "token":
        language = (output.loss_per_sample * output.num_tokens).sum() / counts.tokens
    else:
        language = output.loss_per_sample.sum() / counts.samples
    share = len(output.loss_per_sample) / counts.samples
    used = {name: weight for name, weight in weights.items() if weight and name in output.aux}
    return language + share * sum(weight * output.aux[name] for name, weight in used.items())


class Figures:
    """Sums over samples by task and by source, in tensors that one reduction adds up over processes."""

    COLUMNS = ("samples", "loss", "tokens", "entropy")  # then a gate per expert

    def __init__(
        self,
        experts: Sequence[str],
        tasks: Sequence[str],
        sources: Sequence[str],
        device: torch.device,
    ):
        self.experts, self.tasks, self.sources = experts, tasks, sources
        self.table = torch.zeros(len(tasks), len(self.COLUMNS) + len(experts), device=device)
        self.by_source = torch.zeros(len(sources), 2, device=device)  # samples, loss
        self.rest = torch.zeros(3 + len(AUX), device=device)  # tokens, non-finite, stop, aux
        self.num_broken = self.num_stopping = 0.0  # losses that are not finite; processes
        self.aux: list[str] = []
        self.seen: list[tuple[list[Sample], Tensor]] = []

    @torch.no_grad()
    def add(self, batch: Batch, output: MixtureOutput) -> None:
        loss, gates = output.loss_per_sample.float(), output.gates.float().mean(1)
        shares = gates / gates.sum(-1, keepdim=True).clamp(min=1e-9)
        entropy = torch.special.entr(shares).sum(-1)
        columns = torch.stack([torch.ones_like(loss), loss, output.num_tokens.float(), entropy], 1)
        # by the samples' own tasks: task_ids do not tell them where the task is withheld
        rows = torch.tensor([self.tasks.index(s.task) for s in batch.samples], device=loss.device)
        self.table.index_add_(0, rows, torch.cat([columns, gates], 1))
        rows = torch.tensor([self.sources.index(s.source) for s in batch.samples])
        self.by_source.index_add_(0, rows.to(loss.device), columns[:, :2])
        self.rest[0] += batch.attention_mask.sum()
        self.rest[1] += (~torch.isfinite(loss)).sum()
        self.aux = list(output.aux)
        for name, value in output.aux.items():
            self.rest[3 + AUX.index(name)] += value * len(batch)
        self.seen.append((batch.samples, loss))

    def reduced(self, accelerator: Accelerator, stop: bool) -> dict[str, float]:
        """Means by task, by source and over all samples of all processes; every process calls it.

        Whether this one was asked to `stop` travels with the figures.
        """
        self.rest[2] = float(stop)
        parts = [self.table.flatten(), self.by_source.flatten(), self.rest]
        total = accelerator.reduce(torch.cat(parts), "sum").double().cpu()
        flat, by_source, rest = total.split([part.numel() for part in parts])
        table = flat.view_as(self.table)
        read, self.num_broken, self.num_stopping, *aux = rest.tolist()
        count, loss, tokens, entropy = table.sum(0)[: len(self.COLUMNS)].tolist()
        figures = {"loss": loss / count, "entropy": entropy / count, "samples": count,
                   "tokens_read": read, "tokens_answer": tokens}  # fmt: skip
        for task, row in zip(self.tasks, table.tolist(), strict=True):
            if row[0]:
                figures[f"loss/{task}"] = row[1] / row[0]
                gates = zip(self.experts, row[len(self.COLUMNS) :], strict=True)
                figures |= {f"gates/{task}/{expert}": gate / row[0] for expert, gate in gates}
        for source, (number, total_loss) in zip(
            self.sources, by_source.view(-1, 2).tolist(), strict=True
        ):
            if number:
                figures |= {f"source_loss/{source}": total_loss / number}
        names = [name for name in AUX if name in self.aux]
        return figures | {f"aux/{name}": aux[AUX.index(name)] / count for name in names}

    def suspects(self, all_samples: bool) -> list[str]:
        """This process's samples whose loss is not finite, or all that it read."""
        return [
            name_of(sample)
            for samples, loss in self.seen
            for sample, value in zip(samples, loss.tolist(), strict=True)
            if all_samples or not math.isfinite(value)
        ]


def non_finite(figures: Figures, grad_norm: float, accelerator: Accelerator) -> str | None:
    """What is not finite, with the ranks and their samples; every process must call it."""
    bad_loss = figures.num_broken > 0
    if not bad_loss and math.isfinite(grad_norm):
        return None
    found = gather_object([(accelerator.process_index, figures.suspects(not bad_loss))])
    ranks = "; ".join(f"rank {rank}: {', '.join(names)}" for rank, names in found if names)
    what = "the loss is" if bad_loss else f"the norm of the gradient is {grad_norm},"
    return f"{what} not finite; nothing was updated. Samples: {ranks}"


def check_gradients(
    groups: Mapping[str, Parameters],
    gradient: Callable[[nn.Parameter], Tensor | None],
    finite: bool,
) -> None:
    """Every trainable tensor has a (finite) gradient, or TrainingError lists those that have none.

    Zero counts as a gradient: lora_A has one while lora_B is zero, and so have experts that no
    sample of the first step belongs to.
    """
    missing, broken = [], []
    for parameter, name in names_of(groups).items():
        found = gradient(parameter)
        if found is None:
            missing.append(name)
        elif finite and not torch.isfinite(found).all():
            broken.append(name)
    for names, what in ((missing, "no gradient"), (broken, "a gradient that is not finite")):
        if names:
            count = f"{len(names)} trainable tensors have {what}"
            raise TrainingError(f"after the first step {count}: {', '.join(names)}")


@torch.no_grad()
def update_anchors(
    model: MixtureModel, batches: Sequence[Batch], accelerator: Accelerator
) -> dict[str, Tensor]:
    """Add the step's samples to the anchors; every process ends with those of all.

    Returns the anchors as they were before.
    """
    assert model.router is not None  # kind anchors
    buffers = dict(model.router.named_buffers())
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    for batch in batches:
        model.update_anchors(batch.to(accelerator.device))
    if accelerator.num_processes > 1:
        for name, buffer in buffers.items():
            added = accelerator.reduce(buffer - before[name], "sum")
            buffer.copy_(before[name] + added)
    return before


@torch.no_grad()
def restore_anchors(model: MixtureModel, before: Mapping[str, Tensor]) -> None:
    assert model.router is not None  # kind anchors
    for name, buffer in model.router.named_buffers():
        buffer.copy_(before[name])
