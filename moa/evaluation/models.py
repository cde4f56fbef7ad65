"""The models that are evaluated: runs, PEFT adapters, merged checkpoints, models of the hub.

runs/demo, runs/demo/checkpoints/step-000200    with its own config
FOLDER with adapter_config.json                 + the config of a run, or a YAML file (`like`)
FOLDER with config.json, or a hub name          + the same; no experts, no router
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from moa.build import build_base, build_model, only_adapters
from moa.checkpoint import CONFIG, load_model, sha256, step_folder, weights_fingerprint
from moa.cli.settings import Override
from moa.config import RunConfig, load_config
from moa.evaluation.fingerprints import digest
from moa.evaluation.gates_file import run_of
from moa.evaluation.settings import EvalCommand, check_gates, chosen_sources
from moa.model import MixtureModel
from moa.parts import beside_experts

Kind = Literal["run", "adapter", "checkpoint"]
BASE_ONLY: tuple[Override, ...] = (
    ("data.expert", "base"),
    ("experts", {"base": {"rank": 1}}),
    ("router", {"kind": "fixed"}),
    ("losses", {}),  # which may need another router
    ("stages", {}),
    ("model.fingerprint", None),  # it is another base than that of the config
)


@dataclass(frozen=True)
class EvaluatedModel:
    """A model by the path or hub name that the user gave, with the config of its prompt and data sets."""

    path: str
    kind: Kind
    label: str  # in tables and names of folders
    config: RunConfig
    folder: Path  # of its results: a run's own, or one in others/ of the run or folder `like`
    is_full: bool  # every sample of the run's own data sets is scored

    @property
    def weights(self) -> str:
        return str(step_folder(self.path)) if self.kind == "run" else self.path

    @property
    def gate_rules(self) -> list[str]:
        """The gates to score it with; of a run also those to compare with. A checkpoint has no experts to gate."""
        settings = self.config.eval
        if self.kind == "checkpoint":
            return ["router"]
        others = settings.compare if self.kind == "run" else []
        return list(dict.fromkeys([settings.gates, *others]))

    def fingerprint(self) -> str | None:
        """Of its weights; None for a model of the hub."""
        if self.kind == "run":
            return weights_fingerprint(step_folder(self.path))
        folder = Path(self.path)
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")])
        return digest(str([(file.name, sha256(file)) for file in files])) if files else None

    @contextmanager
    def named(self) -> Iterator[None]:
        """Inside, a user's mistake names the model."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.label}: {error}") from error


def models_of(command: EvalCommand, overrides: Sequence[tuple[str, Any]]) -> list[EvaluatedModel]:
    """The models of a command; ValueError for settings that one of them cannot be evaluated with."""
    if command.run is not None and kind_of(command.run) != "run":
        raise ValueError(f"run: {command.run} is not a run; name it by models=[...] with like=RUN")
    paths = [*([command.run] if command.run is not None else []), *command.models]
    if not paths:
        raise ValueError("run: missing; run=RUN, or models=[...] with like=RUN")
    pick_device(command.device)
    if command.other_base:
        overrides = [*overrides, ("model.other_base", True)]
    models = find_models(paths, command.like, overrides)
    if command.like is not None and all(model.kind == "run" for model in models):
        raise ValueError("like: has no effect on a run, which has its own prompt and data sets")
    if "eval.gates" in dict(overrides) and all(model.kind == "checkpoint" for model in models):
        raise ValueError("eval.gates: has no effect on checkpoints, which have no experts")
    if "eval.compare" in dict(overrides) and all(model.kind != "run" for model in models):
        raise ValueError("eval.compare: has no effect on models that are not runs")
    for model in models:
        with model.named():
            chosen_sources(model.config)
            for rule in model.gate_rules:
                check_gates(rule, list(model.config.experts), model.config.router.granularity)
    return models


def find_models(paths: Sequence[str], like: str | None, overrides: Sequence[Override] = ()) -> list[EvaluatedModel]:
    """The models of some paths, each with a label of its own; a model that is not a run has the config of `like`."""
    if like is not None:
        config_file(like)
    kinds = [kind_of(path) for path in paths]
    places = [Path(path).resolve() if Path(path).exists() else Path(path) for path in paths]
    names = [place.parts for place in places]
    for path, name in zip(paths, names, strict=True):
        if names.count(name) > 1:
            raise ValueError(f"models: {path} is given twice")
    like = like or next((p for p, kind in zip(paths, kinds, strict=True) if kind == "run"), None)
    return [
        find_model(path, kind, label_among(name, names), like, overrides)
        for path, kind, name in zip(paths, kinds, names, strict=True)
    ]


def find_model(path: str, kind: Kind, label: str, like: str | None, overrides: Sequence[Override]) -> EvaluatedModel:
    own: list[Override] = []
    if kind == "run":
        file, folder = step_folder(path) / CONFIG, run_of(step_folder(path))
    elif like is None:
        raise ValueError(
            f"{path}: is not a run, so it has neither prompt nor data sets; add like=RUN or like=FILE.yaml"
        )
    else:
        file = config_file(like)
        own = [*BASE_ONLY, ("model.name", path)] if kind == "checkpoint" else only_adapters({"merged": path})
        root = Path("runs") if Path(like).is_file() else run_of(step_folder(like))
        folder = root / "others" / label
    config = load_config(file, [*own, *overrides])
    settings, stored = config.eval, load_config(file, own).eval
    part = settings.only, settings.num_samples
    whole = part == (None, None) and settings.score and settings.sources == stored.sources
    return EvaluatedModel(path, kind, label, config, folder, kind == "run" and whole)


def kind_of(path: str) -> Kind:
    """ValueError for what is neither a local model nor a hub name."""
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    if (folder / "config.json").is_file():
        return "checkpoint"
    try:
        step_folder(path)
    except ValueError as error:
        if not folder.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
            return "checkpoint"  # ORG/MODEL of the hub
        others = "an adapter with adapter_config.json, a checkpoint with config.json"
        raise ValueError(f"{error}; choices too: {others}, ORG/MODEL of the hub") from None
    return "run"


def label_among(name: tuple[str, ...], names: Sequence[tuple[str, ...]]) -> str:
    """The last parts of a path, as many as it takes to differ from the others: `soups`, or `a-soups`."""
    lengths = range(1, len(name) + 1)
    count = next(n for n in lengths if [other[-n:] for other in names].count(name[-n:]) == 1)
    return "-".join(part.strip("/\\") for part in name[-count:])


def config_file(like: str) -> Path:
    try:
        return Path(like) if Path(like).is_file() else step_folder(like) / CONFIG
    except ValueError as error:
        raise ValueError(f"like: {error}, nor a YAML file") from None


def open_model(model: EvaluatedModel, device: str) -> MixtureModel:
    """ValueError for weights that are not finite, and for a base that they do not belong to."""
    if model.kind == "run":
        other = model.config.model.other_base
        network, _, _ = load_model(step_folder(model.path), device, other_base=other)
    else:
        build = build_model if model.kind == "adapter" else build_base
        network = build(model.config).to(device).eval()
    check_weights(network, model.config, model.weights)
    return network


def check_weights(model: MixtureModel, config: RunConfig, path: str) -> None:
    """ValueError for a trained tensor or a scaling that is NaN or infinite."""
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


def pick_device(name: str, local_rank: int = 0) -> str:
    """By default each process of a machine takes a GPU of its own, while there are some."""
    num_gpus = torch.cuda.device_count()
    if name == "auto":
        return f"cuda:{local_rank % num_gpus}" if num_gpus else "cpu"
    gpus = ["cuda", *(f"cuda:{i}" for i in range(num_gpus))] if num_gpus else []
    if name not in (choices := ["cpu", "auto", *gpus]):
        raise ValueError(f"device: no {name!r} on this machine; choices: {', '.join(choices)}")
    return name
