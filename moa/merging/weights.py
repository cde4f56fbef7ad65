"""Weights of experts: a list, a mapping, a file of scripts.learn_weights, or the gates that eval.py measured."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moa.files import peft as peft_io
from moa.merging.adapters import Expert, all_sites

GATES = "gates"
Number = int | float
Weights = Mapping[str, Number] | Mapping[str, Mapping[str, Number]]  # by expert, or site -> expert


def parse_weights(raw: Any, names: Sequence[str]) -> dict[str, Any] | None:
    """Weights by expert from a list in the experts' order, or a mapping by name; `weight_row` checks the values."""
    if raw is None:
        return None
    if isinstance(raw, list | tuple):
        if len(raw) != len(names):
            raise ValueError(f"weights: {len(raw)} for {len(names)} experts {list(names)}")
        raw = dict(zip(names, raw, strict=True))
    if not isinstance(raw, Mapping):
        raise ValueError(
            f"weights: must be a list [1,1], a mapping {{NAME: 1}}, '{GATES}', '{GATES}:TASK' or FILE.json, got {raw!r}"
        )
    return dict(raw)


def read_weights(
    file: str | Path, experts: Sequence[Expert], method: str | None = None, options: Mapping[str, Any] | None = None
) -> Weights:
    """The weights of a file that scripts.learn_weights wrote: by expert, or by site and expert.

    Raises ValueError, naming the file and the key, for another kind of file, for weights that were learned with other
    experts, sites or values of the experts, or for another `method` than the merge's or other `options` of it, and for
    a value that is not a finite number.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"weights: {file} is missing; scripts.learn_weights writes one")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"weights: {file} is not JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("weights"), dict):
        raise ValueError(f"weights: {file} has no key `weights` with a mapping")
    check_digests(record.get("experts"), experts, file)
    made, given = record.get("merge"), {"method": method, "options": options or {}}
    if (
        method is not None
        and isinstance(made, dict)
        and not all(made.get(key, own) == own for key, own in given.items())
    ):
        wanted = f"method={made.get('method')}" + (f" options={made['options']}" if made.get("options") else "")
        raise ValueError(f"weights: {file} was learned for {wanted}; give this too, or the numbers by weights={{...}}")
    where, sites = f"{file}: weights", all_sites(experts)
    for key, value in record["weights"].items():
        if isinstance(value, dict) and key not in sites:
            raise ValueError(f"{where}.{key}: no expert has this site")
    weight_table(experts, record["weights"], where=where)
    return record["weights"]


def check_digests(digests: Any, experts: Sequence[Expert], file: Path) -> None:
    """ValueError where weights were learned with other values of an expert; nothing for a file without digests."""
    for expert in experts if isinstance(digests, dict) else []:
        if expert.name in digests and digests[expert.name] != digest(expert):
            raise ValueError(
                f"weights: {file} was learned with other values of the expert {expert.name}; learn it again by "
                "python -m scripts.learn_weights, or give the numbers by weights={NAME: NUMBER}"
            )


def digest(expert: Expert) -> str:
    """Of an expert's factors as they are stored, and of their scaling."""
    return peft_io.digest(expert.config, expert.ranks, expert.read)


def gates_of(
    report: dict[str, Any], experts: Sequence[Expert], task: str | None, folded: Collection[str] = ()
) -> tuple[Weights, str]:
    """Mean gates of all trained tasks, or of one, of a report of `read_routing`, by site where it has them so; a line.

    Those of `folded` experts are left out: each is those of another.

    Raises ValueError for a task that was not evaluated, and for a report of other experts or sites.
    """
    if task is None and report["missing_tasks"]:
        raise ValueError(
            f"weights={GATES}: the trained tasks {report['missing_tasks']} were not evaluated; name them "
            f"in eval.sources, or use one task: {GATES}:{report['mean_over'][0]}"
        )
    if task is not None and task not in report["per_task"]:
        raise ValueError(f"weights: there is no task {task!r}; choices: {[*report['per_task']]}")
    tasks = [task] if task else list(report["mean_over"])
    counts = ", ".join(f"{task} ({report['samples_per_task'][task]} samples)" for task in tasks)
    line = f"weights: the mean gates of {counts}, measured on {report.get('checkpoint')}"
    names = [expert.name for expert in experts]
    if sorted(report["experts"]) != sorted([*names, *folded]):
        raise ValueError(f"weights: the gates are of {report['experts']}, the experts are {names}")

    def mean(rows: Sequence[Sequence[float]]) -> dict[str, float]:
        columns = zip(report["experts"], zip(*rows, strict=True), strict=True)
        return {name: sum(column) / len(rows) for name, column in columns if name not in folded}

    if "per_site" not in report:
        return mean([report["per_task"][name] for name in tasks]), line
    stacks = [dict(zip(report["sites"], report["per_site"][n], strict=True)) for n in tasks]
    sites = all_sites(experts)
    if lacking := [site for site in sites if site not in stacks[0]]:
        raise ValueError(f"weights: the gates have no site {lacking[0]}")
    return {site: mean([stack[site] for stack in stacks]) for site in sites}, line


def weight_table(
    experts: Sequence[Expert],
    weights: Mapping[str, Any] | None,  # `Weights`, once they are checked here
    default: str = "ones",
    sites: Sequence[str] | None = None,
    added: Collection[str] = (),
    where: str = "weights",
) -> dict[str, Float[Tensor, " expert"]]:
    """Site -> weight of each expert, float64, 1 by default of `added` ones; ValueError names an odd one and `where`."""
    names = [expert.name for expert in experts]
    sites = all_sites(experts) if sites is None else sites
    if weights is None or not any(isinstance(value, Mapping) for value in weights.values()):
        if weights is None:
            share = 1 / max(len(set(names) - set(added)), 1) if default == "mean" else 1.0
            weights = {name: 1.0 if name in added else share for name in names}
        return dict.fromkeys(sites, weight_row(names, weights, default, where))
    table: dict[str, Tensor] = {}
    for site in sites:
        if site not in weights:
            raise ValueError(f"{where}.{site}: missing; weights per site must cover every site")
        table[site] = weight_row(names, weights[site], default, where=f"{where}.{site}")
    return table


def weight_row(
    names: Sequence[str], weights: Any, default: str = "ones", where: str = "weights"
) -> Float[Tensor, " expert"]:
    """The weight of each name, float64; ValueError names a missing, unknown or odd weight."""
    if weights is None:
        weights = dict.fromkeys(names, 1 / len(names) if default == "mean" else 1.0)
    if not isinstance(weights, Mapping):
        raise ValueError(f"{where}: must be a mapping by expert, got {weights!r}")
    for name in (*weights, *names):
        value = weights.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, Number):
            raise ValueError(f"{where}.{name}: must be a number, got {value!r}")
        if name not in names:
            raise ValueError(f"{where}.{name}: no such expert; choices: {list(names)}")
        if name not in weights:
            raise ValueError(f"{where}.{name}: missing; weights must cover every expert")
    values = torch.tensor([float(weights[name]) for name in names], dtype=torch.float64)
    if not torch.isfinite(values).all():
        raise ValueError(f"{where}: must be finite, got {dict(weights)}")
    return values
