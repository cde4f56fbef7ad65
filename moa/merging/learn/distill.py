"""Distillation: one LoRA that answers as a routed mixture does, whatever its gates are.

    loss = over tasks (mean or worst) of the mean over samples of
           T^2 mean over answer tokens KL(p_teacher^T || p_student^T)                   (Hinton et al. 2015, section 2)
           + weight * mean over blocks mean over tokens |h_student - h_teacher|^2 / |h_teacher|^2

Both share the base: the student is one more expert of the teacher's bank, and each runs with the other absent.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data.batch import Batch
from moa.experts.ties import FACTORS
from moa.files.peft import site_keys
from moa.model import MixtureModel, MixtureOutput
from moa.statistics.gather import watch_outputs

STUDENT = "_student"  # its name in the bank
BLOCK = re.compile(r".*?\.\d+(?=\.)")  # of a site's path: the layer of the stack that it is in
Gates = Callable[[Batch], Mapping[str, Tensor]]  # options of the teacher's forward


def divergence(
    teacher: Float[Tensor, "batch answer vocab"],
    student: Float[Tensor, "batch answer vocab"],
    labels: Int[Tensor, "batch answer"],
    temperature: float | int = 1.0,
) -> Float[Tensor, " batch"]:
    """T^2 KL(teacher || student) of the tokens' probabilities at temperature T, each sample's mean over its answer."""
    expected, found = ((logits.float() / temperature).log_softmax(-1) for logits in (teacher, student))
    each = (expected.exp() * (expected - found)).sum(-1)
    return temperature**2 * mean_where(each, labels != -100)


def mean_where(values: Float[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]) -> Float[Tensor, " batch"]:
    """Each row's mean over its marked places; 0 where it has none."""
    return values.where(mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def over_tasks(losses: Float[Tensor, " batch"], tasks: Sequence[str], rule: str) -> Float[Tensor, ""]:
    """The `mean` of the tasks' mean losses, or the `worst` of them."""
    means = torch.stack([losses[[t == task for t in tasks]].mean() for task in dict.fromkeys(tasks)])
    return means.max() if rule == "worst" else means.mean()


def distance(
    teacher: Float[Tensor, "batch seq width"],
    student: Float[Tensor, "batch seq width"],
    mask: Bool[Tensor, "batch seq"],
) -> Float[Tensor, " batch"]:
    """|h_student - h_teacher|^2 / |h_teacher|^2 of each token, and each sample's mean over its tokens."""
    teacher, student = teacher.float(), student.float()
    size = teacher.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return mean_where((student - teacher).square().sum(-1) / size, mask)


@dataclass(kw_only=True)
class Lesson:
    """Teacher and student in one model."""

    model: MixtureModel
    gates: Gates  # of the teacher
    temperature: float | int = 1.0
    by_labels: bool = False  # cross-entropy of the answers' tokens in place of the divergence
    hidden: float | int = 0.0  # weight of the hidden states' distance

    @property
    def teachers(self) -> list[str]:
        return [name for name in self.model.bank.names if name != STUDENT]

    @torch.no_grad()
    def teach(self, batch: Batch) -> MixtureOutput:
        with self.model.bank.only(self.teachers):
            return self.model(batch, **self.gates(batch))

    def study(self, batch: Batch) -> MixtureOutput:
        """The student alone, at gate 1."""
        with self.model.bank.only([STUDENT]):
            return self.model(batch, batch.input_ids.new_ones(len(batch), 1, dtype=torch.float32))

    def losses(self, batch: Batch) -> Float[Tensor, " batch"]:
        """Each sample's loss, with the student's gradient."""
        if self.by_labels and not self.hidden:
            return self.study(batch).loss_per_sample
        with hidden_states(self.model, bool(self.hidden)) as expected:
            teacher = self.teach(batch)
        with hidden_states(self.model, bool(self.hidden)) as found:
            student = self.study(batch)
        if self.by_labels:
            losses = student.loss_per_sample
        else:
            assert teacher.labels is not None
            losses = divergence(teacher.logits, student.logits, teacher.labels, self.temperature)
        if self.hidden:
            mask = batch.attention_mask.bool()
            blocks = [distance(h, found[name], mask) for name, h in expected.items()]
            losses = losses + self.hidden * torch.stack(blocks).mean(0)
        return losses

    @torch.no_grad()
    def agreement(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Over the answers' tokens: the share where both find the same token likeliest, and the mean divergence."""
        same, total, count = 0.0, 0.0, 0
        for batch in batches:
            teacher, student = self.teach(batch), self.study(batch)
            assert teacher.labels is not None
            real = teacher.labels != -100
            same += float((teacher.logits.argmax(-1) == student.logits.argmax(-1))[real].sum())
            total += float((divergence(teacher.logits, student.logits, teacher.labels) * real.sum(1)).sum())
            count += int(real.sum())
        return {"token_agreement": same / count, "kl": total / count, "tokens": count}


@contextmanager
def hidden_states(model: MixtureModel, wanted: bool) -> Iterator[dict[str, Tensor]]:
    """Inside, the outputs of the language model's blocks that have sites are kept, by the block's path."""
    found: dict[str, Tensor] = {}
    bank = model.bank
    texts = [site for site in bank.sites if bank.streams[site] == "text"]
    blocks = dict.fromkeys(m[0] for site in texts if (m := BLOCK.match(site))) if wanted else {}
    if wanted and not blocks:
        raise ValueError("hidden: no block of the language model has experts; use hidden=0")
    with watch_outputs(model.model, blocks, found.__setitem__):
        yield found


def add_student(model: MixtureModel, rank: int, alpha: float | int, seed: int, start: Mapping[str, Any]) -> None:
    """Put the student beside the experts, the one parameter that learns; `start` are (A, B) by site, all scale in B.

    Its further ranks are fresh and change no output. Raises ValueError for a start of a larger rank.
    """
    bank = model.bank
    for site, (a, _) in start.items():
        if len(a) > rank:
            raise ValueError(f"rank: {rank}, and start has rank {len(a)} at {site}; raise it, or cut the start")
    bank.add(STUDENT, rank=rank, alpha=alpha, seed=seed, routed=False)
    own = bank.state(STUDENT)
    for site, (a, b) in start.items():
        key_a, key_b = site_keys(site)
        own[key_a][: len(a)] = a.to(own[key_a])
        own[key_b][:, : len(a)] = b.to(own[key_b]) / bank.sites[site].scalings[STUDENT]
    model.eval().requires_grad_(False)
    bank.train({STUDENT: FACTORS})


def student_factors(model: MixtureModel) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of the student by site on the CPU, all scale in B."""
    state, sites = model.bank.state(STUDENT), model.bank.experts[STUDENT].sites
    scalings = {site: model.bank.sites[site].scalings[STUDENT] for site in sites}
    pairs = {site: [state[key].cpu() for key in site_keys(site)] for site in sites}
    return {site: (a.clone(), b * scalings[site]) for site, (a, b) in pairs.items()}
