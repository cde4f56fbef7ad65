"""What a run trains beside the frozen base: one row per part.

experts     lora_A and lora_B of every expert, each in a PEFT folder of its own
router      all that decides gates: the router, its buffers, the token routers of the sites, the gates of ranks
projector   the layers between vision tower and language model, with `model.train_projector`
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from moa.config import RunConfig
from moa.model import MixtureModel

Parameters = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Part:
    """One part; the names of its parameters are those of the optimiser's file."""

    parameters: Callable[[MixtureModel], Parameters]
    state: Callable[[MixtureModel], dict[str, Tensor]]  # as in the file; shares the model's memory
    file: str  # in a step folder; * stands for the name of each expert
    is_trained: Callable[[RunConfig], bool] = lambda config: True


def expert_parameters(model: MixtureModel) -> Parameters:
    """Each parameter once, by the name of the first expert and site that have it."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name in model.bank.names:
        for key, parameter in model.bank.named_parameters(name):
            found.setdefault(id(parameter), (f"{name}.{key.replace('base_model.model.', '', 1)}", parameter))
    return dict(found.values())


def expert_state(model: MixtureModel) -> dict[str, Tensor]:
    return {key: parameter.detach() for key, parameter in expert_parameters(model).items()}


def router_parameters(model: MixtureModel) -> Parameters:
    own = dict(model.router.named_parameters()) if model.router is not None else {}
    return own | site_routers(model)


def router_state(model: MixtureModel) -> dict[str, Tensor]:
    own = model.router.state_dict(prefix="router.") if model.router is not None else {}
    biases = {f"token_bias.{site}": bias for site, bias in model.bank.token_biases.items()}
    return dict(own) | {key: p.detach() for key, p in site_routers(model).items()} | biases


def site_routers(model: MixtureModel) -> Parameters:
    ranks = {f"rank_gates.{key}": p for key, p in model.bank.rank_gates().items()}
    return model.bank.site_routers() | ranks


def projector_parameters(model: MixtureModel) -> Parameters:
    """The projector's own parameters, under the names that they have in the base."""
    others = {id(p) for p in (*model.bank.parameters(), *site_routers(model).values())}
    starts = tuple(f"{path}." for path in model.backbone.family.projectors)
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.model.named_parameters()
        if name.startswith(starts) and id(parameter) not in others
    }


def projector_state(model: MixtureModel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in projector_parameters(model).items()}


PARTS = {
    "experts": Part(expert_parameters, expert_state, "experts/*/adapter_model.safetensors"),
    "router": Part(router_parameters, router_state, "router.safetensors"),
    "projector": Part(
        projector_parameters,
        projector_state,
        "projector.safetensors",
        is_trained=lambda config: config.model.train_projector,
    ),
}


def trained_parts(config: RunConfig) -> dict[str, Part]:
    return {name: part for name, part in PARTS.items() if part.is_trained(config)}


def beside_experts(config: RunConfig) -> dict[str, Part]:
    """The trained parts that have one file in a step folder: all but the experts."""
    return {name: part for name, part in trained_parts(config).items() if "*" not in part.file}
