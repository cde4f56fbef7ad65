"""What eval.py can score: a run, a PEFT adapter, a merged checkpoint, a model of the hub.

runs/demo, runs/demo/checkpoints/step-000200    its own config says all
FOLDER with adapter_config.json                 + the config of another run, or a YAML file
FOLDER with config.json, or a hub name          + the same; no experts, no router
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moa.build import build_base, build_model, only_adapter
from moa.checkpoint import CONFIG, load_model, step_folder
from moa.config import RunConfig, load_config
from moa.model import MixtureModel

ALONE = ("data.expert=base", "experts={base: {rank: 1}}", "router={kind: fixed}", "stages=[]")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to score, by the path or hub name that the user gave."""

    path: str
    kind: Literal["run", "adapter", "checkpoint"]

    @property
    def label(self) -> str:
        """Its name in tables and folders."""
        return Path(self.path).resolve().name if self.kind != "checkpoint" else Path(self.path).name

    def folder(self, like: str | None) -> Path:
        """Where its results go: a run's own folder, or one of this label beside those of `like`."""
        if self.kind == "run":
            return run_folder(self.path)
        return run_folder(like) / "others" / self.label if like else Path("runs") / self.label


def subjects_of(paths: Sequence[str]) -> list[Subject]:
    """ValueError where two have one name: the results of one would replace the other's."""
    subjects = [subject_of(path) for path in paths]
    labels = [subject.label for subject in subjects]
    for subject in subjects:
        if labels.count(subject.label) > 1:
            raise ValueError(f"{subject.path}: another model is called {subject.label} too")
    return subjects


def subject_of(path: str) -> Subject:
    """ValueError for what is neither a local model nor a hub name."""
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        return Subject(path=path, kind="adapter")
    if (folder / "config.json").is_file():
        return Subject(path=path, kind="checkpoint")
    try:
        step_folder(path)
    except ValueError as error:
        if not folder.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
            return Subject(path=path, kind="checkpoint")  # ORG/MODEL of the hub
        others = "an adapter with adapter_config.json, a checkpoint with config.json"
        raise ValueError(f"{error}; choices too: {others}, ORG/MODEL of the hub") from None
    return Subject(path=path, kind="run")


def run_folder(checkpoint: str | Path) -> Path:
    """The run that a run folder or one of its step folders belongs to; a YAML file's own folder."""
    if Path(checkpoint).is_file():
        return Path(checkpoint).parent
    step = step_folder(checkpoint)
    return step.parent.parent if step.parent.name == "checkpoints" else step


def open_subject(
    subject: Subject, like: str | None, device: str
) -> tuple[MixtureModel, RunConfig, str]:
    """The model, the config that says how it is asked and scored, and where its weights lie."""
    if subject.kind == "run":
        step = step_folder(subject.path)
        model, _, config = load_model(step, device)
        return model, config, str(step)
    if like is None:
        raise ValueError(
            f"{subject.path}: is no run, so nothing says how to ask it and on what; add --like RUN "
            "or --like FILE.yaml, whose prompt and data sets then hold"
        )
    file = Path(like) if Path(like).is_file() else step_folder(like) / CONFIG
    if subject.kind == "adapter":
        config = load_config(file, only_adapter(subject.path))
        return build_model(config).to(device).eval(), config, subject.path
    config = load_config(file, [*ALONE, f"model.name={subject.path}"])
    return build_base(config).to(device).eval(), config, subject.path
