"""Adapters, weights and bases as a user writes them, resolved to experts, numbers and folders."""

import glob
import json
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from moa.experts import ExpertBank
from moa.merging.base_files import local_base as local_base
from moa.merging.core import Expert, expert_from_folder, expert_from_tensors
from moa.merging.plan import Weights, all_sites, weight_row
from moa.peft_io import CONFIG_FILE, site_scaling

GATES = "gates"


def adapter_folders(patterns: Sequence[str]) -> list[Path]:
    """A pattern with * stands for every adapter folder it meets; ValueError where it meets none."""
    return [folder for pattern in patterns for folder in _folders(pattern)]


def open_adapters(folders: Sequence[str | Path]) -> list[Expert]:
    """The experts in the given folders, called after them; of two with one name the later gets a number.

    Raises ValueError as `peft_io.read_header` does.
    """
    experts: list[Expert] = []
    for folder in map(Path, folders):
        stem = re.sub(r"[^\w-]", "_", folder.resolve().name)
        taken = {expert.name for expert in experts}
        names = (stem, *(f"{stem}_{number}" for number in range(2, len(folders) + 2)))
        experts.append(expert_from_folder(folder, next(n for n in names if n not in taken)))
    return experts


def _folders(pattern: Any) -> list[Path]:
    if not isinstance(pattern, str):
        raise ValueError(f"adapters: each must be a folder, got {pattern!r}")
    path = Path(pattern).expanduser()
    if path.is_dir() or not glob.has_magic(pattern):
        return [path]
    found = sorted(Path(name) for name in glob.glob(str(path)))
    found = [folder for folder in found if (folder / CONFIG_FILE).is_file()]
    if not found:
        raise ValueError(f"adapters: {pattern} matches no folder with {CONFIG_FILE}")
    return found


def experts_of_bank(bank: ExpertBank) -> list[Expert]:
    """The experts of a live model, as they are now; merge them as any others."""
    return [expert_from_tensors(n, bank.state(n), bank.peft_config(n)) for n in bank.names]


def parse_weights(raw: Any, names: Sequence[str]) -> Weights | None:
    """Weights by expert from a list in the experts' order, or from a mapping by name."""
    if raw is None:
        return None
    if isinstance(raw, list | tuple):
        if len(raw) != len(names):
            raise ValueError(f"weights: {len(raw)} for {len(names)} experts {list(names)}")
        raw = dict(zip(names, raw, strict=True))
    if not isinstance(raw, Mapping):
        raise ValueError(
            f"weights: must be a list [1,1], a mapping {{NAME: 1}}, '{GATES}', '{GATES}:TASK' or "
            f"FILE.json, got {raw!r}"
        )
    for name, value in raw.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"weights.{name}: must be a number, got {value!r}")
    return dict(raw)


def is_weights_file(raw: Any) -> bool:
    return isinstance(raw, str) and raw.endswith(".json")


def read_weights(file: str | Path, experts: Sequence[Expert]) -> Weights:
    """The weights of a file that scripts/learn_weights.py wrote: by expert, or by site and expert.

    Raises ValueError, naming the file and the key, for one that is no such file, or was learned with other experts,
    sites or values of the experts, or holds something that is no finite number.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"weights: {file} is missing; scripts/learn_weights.py writes one")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"weights: {file} is no JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("weights"), dict):
        raise ValueError(f"weights: {file} has no key `weights` with a mapping")
    check_digests(record.get("experts"), experts, file)
    weights = record["weights"]
    names, sites = [expert.name for expert in experts], all_sites(experts)
    if not any(isinstance(row, dict) for row in weights.values()):
        _check_row(weights, names, f"{file}: weights")
        return weights
    for site in (*weights, *sites):
        if site not in sites:
            raise ValueError(f"{file}: weights.{site}: no expert has this site")
        if site not in weights:
            raise ValueError(f"{file}: weights.{site}: missing; every site needs its weights")
        _check_row(weights[site], names, f"{file}: weights.{site}")
    return weights


def check_digests(digests: Any, experts: Sequence[Expert], file: Path) -> None:
    """ValueError where weights were learned with other values of an expert; nothing for a file without digests."""
    for expert in experts if isinstance(digests, dict) else []:
        if expert.name in digests and digests[expert.name] != digest(expert):
            raise ValueError(
                f"weights: {file} was learned with other values of the expert {expert.name}; learn it again by "
                "scripts/learn_weights.py, or give the numbers by weights={NAME: NUMBER}"
            )


def digest(expert: Expert) -> str:
    """Of an expert's factors as they are stored, and of their scaling."""
    found = sha256()
    for site in sorted(expert.ranks):
        found.update(f"{site} {site_scaling(expert.config, site)}".encode())
        for factor in expert.read(site):
            found.update(factor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


def _check_row(row: Any, names: Sequence[str], where: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be a mapping by expert, got {row!r}")
    for name, value in row.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{where}.{name}: must be a number, got {value!r}")
    weight_row(names, row, where=where)


def read_gates(file: str | Path, experts: Sequence[Expert], task: str | None = None) -> Weights:
    """Mean gates of a routing report as weights: of all its tasks alike, or of one task.

    Per site where the report has them. Raises ValueError for a report that is missing or was made
    with other experts, and for a task that it does not have.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"weights: {file} is missing; `python eval.py` on the run writes it")
    report = json.loads(file.read_text(encoding="utf-8"))
    names = [expert.name for expert in experts]
    if sorted(report["experts"]) != sorted(names):
        raise ValueError(
            f"weights: {file} is about {report['experts']}, and the experts are {names}"
        )
    tasks = [task] if task else list(report.get("mean_over") or report["per_task"])
    for name in tasks:
        if name not in report["per_task"]:
            raise ValueError(
                f"weights: {file} has no task {name!r}; it has {[*report['per_task']]}"
            )
    rows = [report["per_task"][name] for name in tasks]
    mean = dict(zip(report["experts"], _mean(rows), strict=True))
    if "per_site" not in report:
        return mean
    # The rows stand in the order of the model's modules, as an expert of all sites names them.
    stacks = [report["per_site"][name] for name in tasks]
    orders = [e.config["target_modules"] for e in experts]
    sites = next((order for order in orders if len(order) == len(stacks[0])), None)
    if sites is None or isinstance(sites, str) or set(sites) != set(all_sites(experts)):
        raise ValueError(f"weights: {file} has {len(stacks[0])} sites, which no expert names")
    return {
        site: dict(zip(report["experts"], _mean([stack[i] for stack in stacks]), strict=True))
        for i, site in enumerate(sites)
    }


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]
