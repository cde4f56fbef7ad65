"""Adapters, weights and bases as a user writes them, resolved to experts, numbers and folders."""

import glob
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from moa.backbones.fingerprint import base_fingerprint
from moa.experts.bank import ExpertBank
from moa.files.checkpoint_files import local_base as local_base
from moa.files.peft import CONFIG_FILE, site_scaling
from moa.files.spelling import match_spelling, plain
from moa.merging.core import Expert, expert_from_folder, expert_from_tensors, rename_sites
from moa.merging.plan import Weights, all_sites, weight_row

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


def respell(experts: Sequence[Expert], layers: Iterable[str] | None) -> list[Expert]:
    """The experts with sites as the base's model spells them, or, where it is not at hand, in one spelling.

    A site that no layer is stays as it is; matching it with the base's weights names it.
    """
    if layers is None:
        spellings: dict[str, list[str]] = {}
        for site in all_sites(experts):
            spellings.setdefault(plain(site), []).append(site)
        layers = [max(found, key=lambda s: s.startswith("model.")) for found in spellings.values()]
    matches = [match_spelling(expert.ranks, layers) for expert in experts]
    return [
        rename_sites(expert, {site: found.get(site, site) for site in expert.ranks})
        for expert, found in zip(experts, matches, strict=True)
    ]


def common_fingerprint(
    experts: Sequence[Expert], base: str | Path | None, other_base: bool
) -> str | None:
    """The fingerprint of the experts' base: the base's own where it is at hand, else what they record.

    Raises ValueError where an expert was trained on another base, unless `other_base`.
    """
    own = base_fingerprint(base) if base is not None else None
    recorded = {e.name: e.base_fingerprint for e in experts if e.base_fingerprint is not None}
    wanted = own or next(iter(recorded.values()), None)
    wrong = [name for name, found in recorded.items() if found != wanted]
    if wrong and not other_base:
        theirs = {e.name: e.config.get("base_model_name_or_path") for e in experts}[wrong[0]]
        other = f"the base {base}" if own else next(iter(recorded))
        raise ValueError(
            f"adapters: {wrong[0]} was trained on the base {theirs} with the fingerprint {recorded[wrong[0]]}, and "
            f"{other} has {wanted}; name the right base by base=, or go on by other_base=true"
        )
    return wanted


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
    """The weights of a file that scripts.learn_weights wrote: by expert, or by site and expert.

    Raises ValueError, naming the file and the key, for one that is no such file, or was learned with other experts,
    sites or values of the experts, or holds something that is no finite number.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"weights: {file} is missing; scripts.learn_weights writes one")
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
                "python -m scripts.learn_weights, or give the numbers by weights={NAME: NUMBER}"
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


def tasks_of(report: dict[str, Any], task: str | None) -> list[str]:
    """The tasks whose gates are meant: all trained ones, or the one that is named. ValueError for a lack."""
    if task is None and report["missing_tasks"]:
        raise ValueError(
            f"weights={GATES}: the trained tasks {report['missing_tasks']} were not evaluated; name them "
            f"in eval.sources, or use one task: {GATES}:{report['mean_over'][0]}"
        )
    if task is not None and task not in report["per_task"]:
        raise ValueError(f"weights: there is no task {task!r}; choices: {[*report['per_task']]}")
    return [task] if task else list(report["mean_over"])


def gates_line(report: dict[str, Any], tasks: Sequence[str]) -> str:
    counts = ", ".join(f"{task} ({report['samples_per_task'][task]} samples)" for task in tasks)
    return f"weights: the mean gates of {counts}, measured on {report.get('checkpoint')}"


def gates_of(report: dict[str, Any], experts: Sequence[Expert], tasks: Sequence[str]) -> Weights:
    """Mean gates of some tasks of a report of `read_routing`; by site where the report has them so."""
    names = [expert.name for expert in experts]
    if sorted(report["experts"]) != sorted(names):
        raise ValueError(f"weights: the gates are of {report['experts']}, the experts are {names}")
    if "per_site" not in report:
        rows = [report["per_task"][name] for name in tasks]
        return dict(zip(report["experts"], _mean(rows), strict=True))
    stacks = [dict(zip(report["sites"], report["per_site"][n], strict=True)) for n in tasks]
    sites = all_sites(experts)
    if lacking := [site for site in sites if site not in stacks[0]]:
        raise ValueError(f"weights: the gates have no site {lacking[0]}")
    return {
        site: dict(zip(report["experts"], _mean([stack[site] for stack in stacks]), strict=True))
        for site in sites
    }


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]
