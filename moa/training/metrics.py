"""What a step reports: sums over its samples on all processes, and whether they are finite."""

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from data.batch import Batch
from data.checks import name_of
from data.sample import Sample
from moa.experts.crosstalk import crosstalk_by_pair
from moa.model import MixtureOutput
from moa.routing.losses import AUX


class Metrics:
    """Sums over samples by task and by source, in tensors that one reduction adds up over processes."""

    COLUMNS = ("samples", "loss", "tokens", "entropy")  # then a gate per expert

    def __init__(
        self,
        experts: Sequence[str],
        tasks: Sequence[str],
        sources: Sequence[str],
        device: torch.device,
        choices: Sequence[int] | None = None,
    ):
        self.experts, self.tasks, self.sources = experts, tasks, sources
        self.choices = [*(range(len(experts)) if choices is None else choices)]  # whose entropy is reported
        self.table = torch.zeros(len(tasks), len(self.COLUMNS) + len(experts), device=device)
        self.by_source = torch.zeros(len(sources), 2, device=device)  # samples, loss
        self.rest = torch.zeros(3 + len(AUX), device=device)  # tokens, non-finite, stop, aux
        self.num_broken = self.num_stopping = 0.0  # losses that are not finite; processes
        self.aux: list[str] = []
        self.energies: Tensor | None = None  # [site, owner, expert], where the step measures crosstalk
        self.seen: list[tuple[list[Sample], Tensor]] = []

    @torch.no_grad()
    def add(self, batch: Batch, output: MixtureOutput) -> None:
        loss, gates = output.loss_per_sample.float(), output.gates.float().mean(1)
        chosen = gates[:, self.choices]
        shares = chosen / chosen.sum(-1, keepdim=True).clamp(min=1e-9)
        entropy = torch.special.entr(shares).sum(-1)
        columns = torch.stack([torch.ones_like(loss), loss, output.num_tokens.float(), entropy], 1)
        # by the samples' own tasks: task_ids do not tell them where the task is withheld
        rows = torch.tensor([self.tasks.index(s.task) for s in batch.samples], device=loss.device)
        self.table.index_add_(0, rows, torch.cat([columns, gates], 1))
        rows = torch.tensor([self.sources.index(s.source) for s in batch.samples])
        self.by_source.index_add_(0, rows.to(loss.device), columns[:, :2])
        self.rest[0] += batch.attention_mask.sum()
        self.rest[1] += (~torch.isfinite(loss)).sum()
        if output.energies is not None:
            self.energies = output.energies if self.energies is None else self.energies + output.energies
        self.aux = list(output.aux)
        for name, value in output.aux.items():
            self.rest[3 + AUX.index(name)] += value * len(batch)
        self.seen.append((batch.samples, loss))

    def reduced(self, accelerator: Accelerator, stop: bool) -> dict[str, float]:
        """Means by task, by source and over all samples of all processes, which all call it; `stop` travels along."""
        self.rest[2] = float(stop)
        parts = [self.table.flatten(), self.by_source.flatten(), self.rest]
        total = accelerator.reduce(torch.cat(parts), "sum").double().cpu()
        flat, by_source, rest = total.split([part.numel() for part in parts])
        table = flat.view_as(self.table)
        read, self.num_broken, self.num_stopping, *aux = rest.tolist()
        count, loss, tokens, entropy = table.sum(0)[: len(self.COLUMNS)].tolist()
        metrics = {"loss": loss / count, "entropy": entropy / count, "samples": count,
                   "tokens_read": read, "tokens_answer": tokens}  # fmt: skip
        for task, row in zip(self.tasks, table.tolist(), strict=True):
            if row[0]:
                metrics[f"loss/{task}"] = row[1] / row[0]
                gates = zip(self.experts, row[len(self.COLUMNS) :], strict=True)
                metrics |= {f"gates/{task}/{expert}": gate / row[0] for expert, gate in gates}
        pairs = by_source.view(-1, 2).tolist()
        for source, (number, total_loss) in zip(self.sources, pairs, strict=True):
            if number:
                metrics[f"source_loss/{source}"] = total_loss / number
        names = [name for name in AUX if name in self.aux]
        return metrics | {f"aux/{name}": aux[AUX.index(name)] / count for name in names}

    def crosstalk(self, accelerator: Accelerator, counted: Tensor) -> dict[str, float]:
        """Of the samples of all processes, which all call it; empty where the step does not measure it."""
        if self.energies is None:
            return {}
        total = accelerator.reduce(self.energies, "sum")
        return crosstalk_by_pair(total.double().cpu(), counted.cpu(), self.experts)

    def suspects(self, all_samples: bool) -> list[str]:
        """This process's samples whose loss is not finite, or all that it read."""
        return [
            name_of(sample)
            for samples, loss in self.seen
            for sample, value in zip(samples, loss.tolist(), strict=True)
            if all_samples or not math.isfinite(value)
        ]


def non_finite(metrics: Metrics, grad_norm: float, accelerator: Accelerator) -> str | None:
    """What is not finite, with the ranks and their samples; every process must call it."""
    bad_loss = metrics.num_broken > 0
    if not bad_loss and math.isfinite(grad_norm):
        return None
    found = gather_object([(accelerator.process_index, metrics.suspects(not bad_loss))])
    ranks = "; ".join(f"rank {rank}: {', '.join(names)}" for rank, names in found if names)
    what = "the loss is" if bad_loss else f"the norm of the gradient is {grad_norm},"
    return f"{what} not finite; nothing was updated. Samples: {ranks}"
