"""A run folder and its checkpoints: written whole or not at all, read strictly, without pickle.

<run>/config.yaml  versions.json  log.jsonl
<run>/checkpoints/last, best             text files that name a step folder
<run>/checkpoints/step-000200/
    experts/<name>/adapter_config.json, adapter_model.safetensors     plain PEFT
    experts/<name>/stats.safetensors                                  of its inputs, where asked for
    router.safetensors, projector.safetensors, processor/, config.yaml
    state.json, optimizer.safetensors, rng.safetensors                to go on training
    manifest.json                        every file with its size and sha256
"""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moa.build import build_model
from moa.card import CARD, Card
from moa.cli.settings import to_yaml
from moa.config import RunConfig, load_config
from moa.experts.kinds import KINDS
from moa.files.atomic import atomic_folder, remove_folder, write_file, write_json
from moa.files.peft import STATISTICS_FILE, base_reference, write_expert
from moa.files.peft_config import read_json_object
from moa.model import MixtureModel
from moa.parts import beside_experts

MANIFEST, STATE, CONFIG = "manifest.json", "state.json", "config.yaml"
NO_MODEL = (STATE, "optimizer.safetensors", "rng.safetensors")  # only training reads these
STATE_FORMAT = 2  # of state.json: to be raised when a run counts other things
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "pycocoevalcap")


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a run needs, beside the weights, to go on as if it had never stopped."""

    progress: dict[str, Any]  # step, stage, stage_step, best, ...: JSON
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    rng: dict[str, Tensor] = field(default_factory=dict)


def save_checkpoint(run: Path, step: int, model: MixtureModel, config: RunConfig, state: TrainState) -> Path:
    """Write checkpoint `step` of a run and let `last` name it; OSError, which names the one before, on a full disk."""
    target = run / "checkpoints" / step_name(step)
    try:
        with atomic_folder(target) as folder:
            write_model(folder, model, config)
            write_json(folder / STATE, {"format": STATE_FORMAT, **state.progress})
            save_tensors(folder / "optimizer.safetensors", state.optimizer)
            save_tensors(folder / "rng.safetensors", state.rng)
            write_json(folder / MANIFEST, manifest_of(folder))
        point(run, "last", target.name)
    except OSError as error:
        before = pointed(run, "last")
        kept = f"the checkpoint before, {before}, is whole" if before else "there is none before"
        line = f"checkpoint {target.name} not written; {kept}: {error.strerror}"
        raise OSError(error.errno, line) from error
    return target


def write_model(folder: Path, model: MixtureModel, config: RunConfig) -> None:
    """The trained parts of a model: experts, router, projector, and what describes them."""
    backbone = model.backbone
    for name in model.bank.names:
        target, described = folder / "experts" / name, model.bank.peft_config(name)
        target.mkdir(parents=True)
        base = base_reference(backbone.name)
        own = {"base_model_name_or_path": base, "task_type": backbone.task_type}
        write_expert(
            target,
            model.bank.state(name),
            described | own,
            name=f"expert {name}",
            base_fingerprint=backbone.fingerprint,
        )
        about = KINDS[config.experts[name].kind].about.format(r=described["r"])
        if config.experts[name].rank_gates != "none":
            about += " It is not all of the expert: the gates of its ranks are in the run's router.safetensors."
        everyone = config.data.expert
        card = Card(
            name=name,
            kind="adapter",
            about=about,
            base=backbone.name,
            fingerprint=backbone.fingerprint,
            config=config,
            sources=[s for s in config.data.sources.values() if everyone or s.expert == name],
        )
        write_file(target / CARD, card.text())
    for part in beside_experts(config).values():
        save_tensors(folder / part.file, part.state(model))
    backbone.processor.save_pretrained(folder / "processor")
    (folder / CONFIG).write_text(stored(config))


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """ValueError for an empty tensor: what ZeRO-3 has in the place of one that was not gathered."""
    if empty := sorted(key for key, tensor in tensors.items() if not tensor.numel()):
        raise ValueError(f"{file}: {empty[0]} is empty, and {len(empty) - 1} others; not written")
    ready = {key: t.detach().cpu().contiguous().clone() for key, t in sorted(tensors.items())}
    save_file(ready, file)


def manifest_of(folder: Path, later: Collection[str] = (STATISTICS_FILE,)) -> dict[str, Any]:
    """Of every file but those that may come `later`: statistics name the weights that they belong to themselves."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (MANIFEST, *later))
    return {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}


def weights_fingerprint(step: Path) -> str:
    """What a measurement belongs to: experts, router, projector, processor and config of a step folder."""
    manifest = read_json(step / MANIFEST)
    rows = sorted((n, entry["sha256"]) for n, entry in manifest.items() if n not in NO_MODEL)
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:32]


def sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def point(run: Path, name: str, folder_name: str) -> None:
    write_file(run / "checkpoints" / name, folder_name + "\n")


def pointed(run: Path, name: str) -> str | None:
    file = run / "checkpoints" / name
    return file.read_text().strip() if file.is_file() else None


def prune(run: Path, keep_last: int, best: Collection[int] = ()) -> None:
    """Delete all but the newest checkpoints, the `best` and the named ones; also what killed runs left half written."""
    root = run / "checkpoints"
    steps = sorted(p.name for p in root.glob("step-*"))
    kept = {*steps[-keep_last:], *map(step_name, best), pointed(run, "best"), pointed(run, "last")}
    for name in set(steps) - kept:
        remove_folder(root / name)
    for remnant in {*root.glob(".step-*"), *root.glob(".*.tmp")}:
        shutil.rmtree(remnant) if remnant.is_dir() else remnant.unlink()


def write_run_header(run: Path, config: RunConfig) -> None:
    """config.yaml and versions.json: what was asked for, and what ran it."""
    run.mkdir(parents=True, exist_ok=True)
    write_file(run / CONFIG, stored(config))
    write_json(run / "versions.json", versions())


def stored(config: RunConfig) -> str:
    """The config as YAML, with the folder that its relative paths are taken from."""
    return to_yaml(replace(config, root=config.root or str(Path.cwd())))


def versions() -> dict[str, str | None]:
    """Versions of Python and the libraries, and the git commit, with `+` for local changes."""
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found | {"commit": git_commit()}


def git_commit() -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return None


def load_model(
    path: str | Path, device: torch.device | str = "cpu", *, other_base: bool = False
) -> tuple[MixtureModel, Any, RunConfig]:
    """The model of a run (its best checkpoint, else its last) or of a step folder, for evaluation. ValueError for a
    missing or changed file, and for a base that changed since (unless `other_base`)."""
    folder = step_folder(path)
    verify(folder)
    config = load_config(folder / CONFIG)
    if other_base:
        config = replace(config, model=replace(config.model, other_base=True))
    model = build_model(config, experts=folder / "experts")
    restore_model(model, folder, config)
    return model.to(device).eval(), model.backbone.processor, config


def step_folder(path: str | Path, prefer: str = "best") -> Path:
    """The step folder that `path` is, or that a run folder's `best` or `last` names."""
    path = Path(path)
    if (path / STATE).is_file() or (path / MANIFEST).is_file():
        return path
    if step := pointed(path, prefer) or pointed(path, "last"):
        return path / "checkpoints" / step
    raise ValueError(f"{path}: neither a run with checkpoints/last nor a step folder with {MANIFEST}")


def verify(folder: Path) -> None:
    """Raise ValueError naming the first file that is missing or not as it was written."""
    manifest = read_json(folder / MANIFEST)
    for name, entry in manifest.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file}: missing; its manifest lists {len(manifest)} files")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(f"{file}: has {size} bytes, was written with {entry['bytes']}")
        if sha256(file) != entry["sha256"]:
            raise ValueError(f"{file}: its content is not what was written (sha256 differs)")


def check_there(file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"{file}: missing; {file.parent} is no whole checkpoint")


def read_json(file: Path) -> dict[str, Any]:
    check_there(file)
    return read_json_object(file)


def restore_model(model: MixtureModel, folder: Path, config: RunConfig) -> None:
    """Router and projector of a step folder into a model built with its experts."""
    for part in beside_experts(config).values():
        file = folder / part.file
        load_strictly(part.state(model), load_tensors(file), file)


@torch.no_grad()
def load_strictly(own: Mapping[str, Tensor], found: Mapping[str, Tensor], file: Path) -> None:
    """Copy into tensors that share memory with the model; every key must fit, none be left over."""
    missing, extra = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    if missing or extra:
        raise ValueError(
            f"{file}: made for another config: lacks {len(missing)} tensors {missing[:2]}, "
            f"has {len(extra)} that nothing here reads {extra[:2]}"
        )
    for key, tensor in found.items():
        if own[key].shape != tensor.shape:
            raise ValueError(f"{file}: {key} is {list(tensor.shape)} in the file, {list(own[key].shape)} in the model")
        own[key].copy_(tensor)


def load_tensors(file: Path) -> dict[str, Tensor]:
    check_there(file)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not readable as safetensors: {error}") from None


def load_train_state(folder: Path) -> TrainState:
    """ValueError for a missing or unreadable file, and for the state of another version's run."""
    progress = read_json(folder / STATE)
    if progress.pop("format", 1) != STATE_FORMAT:
        raise ValueError(
            f"{folder / STATE}: another version wrote it, which counted otherwise. To start from its "
            "weights, use stages.*.init_from and another out="
        )
    return TrainState(
        progress=progress,
        optimizer=load_tensors(folder / "optimizer.safetensors"),
        rng=load_tensors(folder / "rng.safetensors"),
    )
