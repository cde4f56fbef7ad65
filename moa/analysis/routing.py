"""What the router does, measured: which expert each task gets, how surely, and whether all are needed.

Gates are `[sample, expert]` (mean over sites where they differ by site). Where a share is meant they
are first normalised, so that sigmoid gates can be compared with softmax ones.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moa.routing.roles import NONE

Factors = Mapping[str, tuple[Tensor, Tensor]]  # site -> lora_A [rank, in] with scale, lora_B


def shares(gates: Float[Tensor, "sample expert"]) -> Float[Tensor, "sample expert"]:
    """Rows that sum to one; a row of zeros (every expert off) has no share and stays zero."""
    return gates / gates.sum(-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)


def gates_per_task(
    gates: Float[Tensor, "sample *site expert"], tasks: Sequence[str]
) -> dict[str, Float[Tensor, "*site expert"]]:
    """The mean gate of every expert (and site) for each task, in the order of first appearance."""
    rows: dict[str, list[int]] = {}
    for row, task in enumerate(tasks):
        rows.setdefault(task, []).append(row)
    return {task: gates[index].mean(0) for task, index in rows.items()}


def sample_kinds(tasks: Sequence[str], wanted: Sequence[str | None]) -> list[str]:
    """Each sample's task, with its expert beside it where the task's samples have several."""
    experts: dict[str, set[str | None]] = {}
    for task, expert in zip(tasks, wanted, strict=True):
        experts.setdefault(task, set()).add(expert)
    return [
        task if len(experts[task]) == 1 else f"{task} · {expert or 'unknown'}"
        for task, expert in zip(tasks, wanted, strict=True)
    ]


def entropy(probabilities: Float[Tensor, "*lead expert"]) -> Float[Tensor, "*lead"]:
    """In bits: 0 for one expert alone, log2(experts) for all alike."""
    return -(torch.xlogy(probabilities, probabilities)).sum(-1) / torch.log(torch.tensor(2.0))


def mutual_information(gates: Float[Tensor, "sample expert"], tasks: Sequence[str]) -> float:
    """I(task; expert) = H(expert) - H(expert | task) in bits: 0 when every task gets the same mixture."""
    each = shares(gates)
    means = gates_per_task(each, tasks)
    conditional = sum(tasks.count(task) * float(entropy(mean)) for task, mean in means.items())
    return float(entropy(each.mean(0))) - conditional / len(tasks)


def routing_accuracy(
    gates: Float[Tensor, "sample expert"], wanted: Sequence[str | None], experts: Sequence[str]
) -> float | None:
    """The share of samples whose largest gate is that of their own expert; None if none has one."""
    known = [i for i, name in enumerate(wanted) if name in experts]
    if not known:
        return None
    truth = torch.tensor([list(experts).index(str(wanted[i])) for i in known])
    return float((gates[known].argmax(-1).cpu() == truth).float().mean())


def dead_experts(
    per_task: Mapping[str, Float[Tensor, " expert"]], experts: Sequence[str], floor: float = 0.02
) -> list[str]:
    """The experts whose mean share stays under `floor` in every task."""
    highest = torch.stack([shares(mean[None])[0] for mean in per_task.values()]).amax(0)
    return [name for name, share in zip(experts, highest.tolist(), strict=True) if share < floor]


def delta_cosines(factors: Mapping[str, Factors]) -> Float[Tensor, "expert expert"]:
    """Cosine of the experts' whole updates, all sites as one vector; 0 for an expert of zeros. None is formed whole:
    <B_i A_i, B_j A_j> = sum((B_i^T B_j) * (A_i A_j^T))."""
    names = list(factors)
    inner = torch.zeros(len(names), len(names), dtype=torch.float64)
    for i, first in enumerate(names):
        for j, second in enumerate(names[: i + 1]):
            for site in factors[first].keys() & factors[second].keys():
                a, b, c, d = (t.double() for t in (*factors[first][site], *factors[second][site]))
                inner[i, j] += float(((b.T @ d) * (a @ c.T)).sum())
            inner[j, i] = inner[i, j]
    norms = inner.diagonal().sqrt()
    return torch.where(inner == 0, inner, inner / torch.outer(norms, norms))


def duplicates(
    cosines: Float[Tensor, "expert expert"], experts: Sequence[str], least: float = 0.95
) -> list[tuple[str, str, float]]:
    """Pairs of experts that have learned the same update, up to its size."""
    return [
        (experts[i], experts[j], round(float(cosines[i, j]), 4))
        for i in range(len(experts))
        for j in range(i + 1, len(experts))
        if cosines[i, j] >= least
    ]


def summary(
    gates: Float[Tensor, "sample site expert"],
    tasks: Sequence[str],
    wanted: Sequence[str | None],
    experts: Sequence[str],
    *,
    trained_tasks: Sequence[str] = (),
    chosen_among: Sequence[str] | None = None,
    sites: Sequence[str] = (),
    cosines: Float[Tensor, "expert expert"] | None = None,
) -> dict[str, Any]:
    """Everything above as one record for a JSON file.

    `mean_gates`, the weights of a merge, weighs the tasks alike (the trained ones, where any is among the samples).
    `per_kind` has a row for each task, or for each expert of a task that has several. Mutual information, entropy,
    accuracy and the dead ones are of the experts that the router chooses among (None: all); all but the last also of
    none, where samples are meant for it.
    """
    mean = gates.float().mean(1)
    among = [*experts] if chosen_among is None else [*chosen_among]
    choices = among
    columns = [experts.index(name) for name in among]
    decided = mean[:, columns]
    if NONE in wanted:  # the rest of one is the weight of the null expert
        rest = 1 - decided.sum(-1, keepdim=True)
        choices, decided = [*among, NONE], torch.cat([decided, rest], dim=-1).clamp(min=0)
    per_task, kinds = gates_per_task(mean, tasks), sample_kinds(tasks, wanted)
    chosen = [task for task in per_task if task in trained_tasks] or list(per_task)
    held_out = {kind for kind, task in zip(kinds, tasks, strict=True) if task not in chosen}
    record: dict[str, Any] = {
        "experts": list(experts),
        "choices": among,
        "sites": list(sites),
        "mean_gates": torch.stack([per_task[task] for task in chosen]).mean(0).tolist(),
        "mean_over": chosen,
        "per_kind": {k: values.tolist() for k, values in gates_per_task(mean, kinds).items()},
        "held_out": sorted(held_out),
        "per_task": {task: values.tolist() for task, values in per_task.items()},
        "mutual_information": mutual_information(decided, list(tasks)),
        "entropy": float(entropy(shares(decided)).mean()),
        "routing_accuracy": routing_accuracy(decided, wanted, choices),
        "dead": dead_experts({task: row[columns] for task, row in per_task.items()}, among),
        "num_samples": len(tasks),
        "samples_per_task": dict(Counter(tasks)),
    }
    if gates.shape[1] > 1:
        record["per_site"] = {task: values.tolist() for task, values in gates_per_task(gates.float(), tasks).items()}
    if cosines is not None:
        record["duplicates"] = duplicates(cosines, experts)
        # the last digits depend on where in memory the factors lie, and would differ between runs
        record["cosines"] = cosines.round(decimals=12).tolist()
    return record
