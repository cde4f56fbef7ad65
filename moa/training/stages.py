"""What a stage trains, which gates it uses, and where its weights start.

experts   all experts at once, each on its own samples: gates are the sample's one-hot
router    experts frozen, gates by the router
joint     both
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from data.batch import Batch
from moa.build import projector_parameters, projector_state, router_state
from moa.checkpoint import (
    CONFIG,
    load_strictly,
    load_tensors,
    step_folder,
    verify,
)
from moa.config import RunConfig, StageConfig, load_config
from moa.gating import one_hot_gates
from moa.model import MixtureModel
from moa.peft_io import read_expert, site_scaling

GROUPS = ("experts", "router", "projector")
TRAINED = {
    "experts": ("experts", "projector"),
    "router": ("router",),
    "joint": ("experts", "router", "projector"),
}

Parameters = dict[str, nn.Parameter]


def parameter_groups(model: MixtureModel, config: RunConfig) -> dict[str, Parameters]:
    """Group -> name -> parameter, for everything that any stage may train.

    Frozen experts are in no group, nor is the base, nor a projector that the config leaves alone.
    """
    bank = model.bank
    trained = [name for name in bank.names if not config.experts[name].frozen]
    experts = {
        f"{name}.{key.removeprefix('base_model.model.')}": parameter
        for name in trained
        for key, parameter in zip(bank.state(name), bank.parameters(name), strict=True)
    }
    router = dict(model.router.named_parameters()) if model.router is not None else {}
    router |= {f"token_router.{site}": p for site, p in bank.token_routers().items()}
    projector = projector_parameters(model) if config.model.train_projector else {}
    return {"experts": experts, "router": router, "projector": projector}


def set_trainable(
    model: MixtureModel, groups: Mapping[str, Parameters], stage: StageConfig
) -> dict[str, Parameters]:
    """Let exactly the stage's groups require gradients, and return them.

    Raises ValueError for a stage without anything to train (anchors learn without gradients).
    """
    model.requires_grad_(False)
    chosen = {name: groups[name] for name in TRAINED[stage.name] if groups[name]}
    for parameters in chosen.values():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
    if not chosen and model.kind != "anchors":
        raise ValueError(f"stages.{stage.name}: nothing to train with router.kind={model.kind}")
    return chosen


def stage_gates(
    model: MixtureModel, batch: Batch, stage: str
) -> Float[Tensor, "batch expert"] | None:
    """The stage's override of the gates; None where the model's own router decides."""
    if stage != "experts":
        return None
    return one_hot_gates(batch.expert_ids, len(model.bank.names))


def start_weights(model: MixtureModel, config: RunConfig, stage: StageConfig) -> list[str]:
    """Load what the stage starts from; returns one line for each part, to be shown."""
    source = stage.init_from
    if source is None:
        return []
    if isinstance(source, dict):
        return [load_expert(model, name, Path(folder)) for name, folder in source.items()]
    folder = step_folder(source)
    verify(folder)
    names = sorted(path.name for path in (folder / "experts").iterdir())
    if names != sorted(model.bank.names):
        raise ValueError(
            f"stages.{stage.name}.init_from: {folder} has the experts {names}, "
            f"this run has {sorted(model.bank.names)}"
        )
    lines = [load_expert(model, name, folder / "experts" / name) for name in names]
    return [*lines, load_rest(model, config, folder)]


def load_expert(model: MixtureModel, name: str, folder: Path) -> str:
    """Overwrite an expert by a PEFT folder of the same sites, ranks and scaling."""
    tensors, found = read_expert(folder)
    for site_name in model.bank.experts[name].sites:
        own = model.bank.sites[site_name].scalings[name]
        if abs(site_scaling(found, site_name) - own) > 1e-9 * own:
            raise ValueError(
                f"{folder}: scaling (alpha / rank) is {site_scaling(found, site_name)} at "
                f"{site_name}, and {own} by experts.{name}; give both the same alpha and rank"
            )
    model.bank.load_state(name, tensors)
    return f"expert {name} from {folder}"


def load_rest(model: MixtureModel, config: RunConfig, folder: Path) -> str:
    """Projector and router of a checkpoint; a router of another config stays behind, and says so."""
    if config.model.train_projector and (folder / "projector.safetensors").is_file():
        file = folder / "projector.safetensors"
        load_strictly(projector_state(model), load_tensors(file), file)
    other = load_config(folder / CONFIG)
    if router_identity(other) != router_identity(config):
        return "router starts fresh: the checkpoint's has another config"
    file = folder / "router.safetensors"
    load_strictly(router_state(model), load_tensors(file), file)
    return f"router from {folder}"


def router_identity(config: RunConfig) -> tuple[Any, ...]:
    return config.router, tuple(config.data.tasks), tuple(config.experts)
