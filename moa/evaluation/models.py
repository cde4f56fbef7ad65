"""What eval.py can score: a run, a PEFT adapter, a merged checkpoint, a model of the hub.

runs/demo, runs/demo/checkpoints/step-000200    its own config says all
FOLDER with adapter_config.json                 + the config of another run, or a YAML file
FOLDER with config.json, or a hub name          + the same; no experts, no router
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from moa.build import build_base, build_model, only_adapter
from moa.checkpoint import CONFIG, load_model, sha256, step_folder, weights_fingerprint
from moa.cli.settings import Override
from moa.config import RunConfig, load_config
from moa.evaluation.fingerprints import digest
from moa.model import MixtureModel
from moa.parts import beside_experts

ALONE: tuple[Override, ...] = (
    ("data.expert", "base"),
    ("experts", {"base": {"rank": 1}}),
    ("router", {"kind": "fixed"}),
    ("stages", {}),
    ("model.fingerprint", None),  # it is another base than that of the config
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to score, by the path or hub name that the user gave; `label` in tables and folders."""

    path: str
    kind: Literal["run", "adapter", "checkpoint"]
    label: str

    def folder(self, like: str | None) -> Path:
        """Where its results go: a run's own folder, one of this label in that of `like`, or in runs/others/."""
        if self.kind == "run":
            return run_folder(self.path)
        root = run_folder(like) if like and not Path(like).is_file() else Path("runs")
        return root / "others" / self.label

    def fingerprint(self) -> str | None:
        """Of its weights, to tell whether a file of results is about them; None for one of the hub."""
        folder = Path(self.path)
        if self.kind == "run":
            return weights_fingerprint(step_folder(folder))
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")])
        return digest(str([(file.name, sha256(file)) for file in files])) if files else None


def subjects_of(paths: Sequence[str]) -> list[Subject]:
    """The models of some paths, each with a label of its own; ValueError for a path that comes twice."""
    found = [subject_of(path) for path in paths]
    names = [parts_of(subject) for subject in found]
    for subject, name in zip(found, names, strict=True):
        if names.count(name) > 1:
            raise ValueError(f"--checkpoint {subject.path}: is given twice")
    return [
        replace(subject, label=label_among(name, names))
        for subject, name in zip(found, names, strict=True)
    ]


def parts_of(subject: Subject) -> tuple[str, ...]:
    path = Path(subject.path)
    return path.resolve().parts if path.exists() else path.parts


def label_among(name: tuple[str, ...], names: Sequence[tuple[str, ...]]) -> str:
    """The last parts of a path, as many as it takes to differ from the others: `soups`, or `a-soups`."""
    count = next(
        n for n in range(1, len(name) + 1) if [o[-n:] for o in names].count(name[-n:]) == 1
    )
    return "-".join(part.strip("/\\") for part in name[-count:])


def subject_of(path: str) -> Subject:
    """ValueError for what is neither a local model nor a hub name."""
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        return Subject(path=path, kind="adapter", label=folder.resolve().name)
    if (folder / "config.json").is_file():
        return Subject(path=path, kind="checkpoint", label=folder.resolve().name)
    try:
        step_folder(path)
    except ValueError as error:
        if not folder.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
            return Subject(path=path, kind="checkpoint", label=folder.name)  # ORG/MODEL of the hub
        others = "an adapter with adapter_config.json, a checkpoint with config.json"
        raise ValueError(f"{error}; choices too: {others}, ORG/MODEL of the hub") from None
    return Subject(path=path, kind="run", label=folder.resolve().name)


def run_folder(checkpoint: str | Path) -> Path:
    """The run that a run folder or one of its step folders belongs to."""
    step = step_folder(checkpoint)
    return step.parent.parent if step.parent.name == "checkpoints" else step


def open_subject(
    subject: Subject, like: str | None, device: str, *, other_base: bool = False
) -> tuple[MixtureModel, RunConfig, str]:
    """The model, the config that says how it is asked and scored, and where its weights lie.

    Raises ValueError for weights that are not finite, for a base that they do not belong to (unless
    `other_base`), and as `config_of` does.
    """
    config = config_of(subject, like)
    if other_base:
        config = replace(config, model=replace(config.model, other_base=True))
    if subject.kind == "run":
        step = step_folder(subject.path)
        model, _, config = load_model(step, device, other_base=other_base)
        return checked(model, config, step), config, str(step)
    build = build_model if subject.kind == "adapter" else build_base
    return checked(build(config).to(device).eval(), config, subject.path), config, subject.path


def config_of(subject: Subject, like: str | None) -> RunConfig:
    """The config that a model is asked by; ValueError where it is no run and `like` names no other's."""
    if subject.kind == "run":
        return load_config(step_folder(subject.path) / CONFIG)
    if like is None:
        raise ValueError(
            f"{subject.path}: is not a run, so nothing says how to ask it and on what; add --like RUN "
            "or --like FILE.yaml, whose prompt and data sets then hold"
        )
    overrides = only_adapter(subject.path)
    if subject.kind == "checkpoint":
        overrides = [*ALONE, ("model.name", subject.path)]
    return load_config(config_file(like), overrides)


def config_file(like: str) -> Path:
    try:
        return Path(like) if Path(like).is_file() else step_folder(like) / CONFIG
    except ValueError as error:
        raise ValueError(f"--like {error}, nor a YAML file") from None


def checked(model: MixtureModel, config: RunConfig, path: str | Path) -> MixtureModel:
    """The model; ValueError for a trained tensor or a scaling that is NaN or infinite."""
    parts = {f"expert {name}": model.bank.state(name) for name in model.bank.names}
    parts |= {name: part.state(model) for name, part in beside_experts(config).items()}
    for part, tensors in parts.items():
        for key, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{path}: {part}: {key} is not finite (NaN or infinity)")
    for site, layer in model.bank.sites.items():
        for name, scaling in layer.scalings.items():
            if not math.isfinite(scaling):
                raise ValueError(f"{path}: expert {name}: its scaling at {site} is {scaling}")
    return model
