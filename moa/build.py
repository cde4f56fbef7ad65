"""From a config to a model: load the base, wrap its layers, add experts and router."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.collate import Intake
from moa.backbones.clip import ClipBackbone, is_clip, load_clip
from moa.backbones.llava import Backbone, load_backbone, open_intake
from moa.backbones.open_clip import is_open_clip, load_open_clip
from moa.clip_model import ClipMixture
from moa.config import ExpertConfig, ModelConfig, RunConfig
from moa.experts import ExpertBank
from moa.model import MixtureModel
from moa.peft_io import read_expert
from moa.router import AnchorRouter, Router

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(config: RunConfig, experts: Path | None = None) -> MixtureModel:
    """The model of a config, on the CPU; every initial weight is a function of `config.seed`.

    `experts` is the folder of a checkpoint whose experts take the place of fresh ones. Raises
    ValueError for targets that match nothing, and for adapters of another base.
    """
    return build_mixture(config, open_base(config.model), experts)


def build_mixture(
    config: RunConfig, backbone: Backbone | ClipBackbone, experts: Path | None = None
) -> MixtureModel:
    """The experts and the router of a config around a base that is at hand."""
    bank = ExpertBank.attach(
        backbone.model,
        config.model.targets,
        exclude=config.model.exclude,
        unused=backbone.unused_sites(),
        stream_of=backbone.stream_of,
    )
    for name, expert in config.experts.items():
        folder = experts / name if experts is not None else expert.init_from
        add_expert(bank, name, expert, folder, config.seed)
    router = build_router(config, bank, backbone.dims)
    if config.router.granularity == "token":
        bank.add_token_routers(seed=config.seed)
    weights = config.router.weights
    routing: dict[str, Any] = {
        "kind": config.router.kind,
        "top_k": config.router.top_k,
        "null_expert": config.router.null_expert,
        "temperature": config.router.temperature,
        "granularity": config.router.granularity,
        "weights": [weights.get(name, 0.0) for name in config.experts] if weights else None,
    }
    if not isinstance(backbone, ClipBackbone):
        return MixtureModel(backbone, bank, router, **routing)
    check_for_clip(config)
    losses = config.losses
    return ClipMixture(
        backbone, bank, router, objective=losses.pairs, negatives=losses.negatives, **routing
    )


def build_base(config: RunConfig) -> MixtureModel:
    """The base of a config alone: no experts, no router, the answers that transformers would give."""
    backbone = open_base(config.model)
    idle = set(backbone.unused_sites())
    layers = backbone.model.named_modules()
    # a bank wants a site; one without experts is the layer that it wraps
    site = next(n for n, m in layers if isinstance(m, nn.Linear) and n not in idle)
    bank = ExpertBank.attach(backbone.model, [re.escape(site)], stream_of=backbone.stream_of)
    if isinstance(backbone, ClipBackbone):
        return ClipMixture(backbone, bank, kind="fixed")
    return MixtureModel(backbone, bank, kind="fixed")


def open_base(model: ModelConfig) -> Backbone | ClipBackbone:
    dtype = DTYPES[model.dtype]
    return open_backbone(model.name, dtype, model.quantization, model.image_processor)


def intake_of(model: ModelConfig) -> Intake:
    """What data must know of a base; a CLIP is small, and loaded for it."""
    if is_open_clip(model.name) or is_clip(model.name):
        return open_base(model).intake
    return open_intake(model.name, model.image_processor)


def open_backbone(
    name: str,
    dtype: torch.dtype = torch.float32,
    quantization: str | None = None,
    image_processor: Mapping[str, Any] | None = None,
) -> Backbone | ClipBackbone:
    """The base model that a name means: open_clip's, a dual encoder of transformers, or a LLaVA."""
    if not is_open_clip(name) and not is_clip(name):
        return load_backbone(name, dtype, quantization, image_processor)
    if image_processor is not None:
        raise ValueError(
            "model.image_processor: has no effect on a CLIP, which crops as it learned"
        )
    if quantization is not None:
        raise ValueError(
            f"model.quantization: {quantization} is for language models; a CLIP is small"
        )
    return load_open_clip(name, dtype) if is_open_clip(name) else load_clip(name, dtype)


def check_for_clip(config: RunConfig) -> None:
    """ValueError for settings that mean nothing where there is no language model."""
    if config.model.train_projector:
        raise ValueError("model.train_projector: a CLIP has no projector")
    if config.losses.reduction == "token":
        raise ValueError("losses.reduction=token: a CLIP answers with no tokens; choices: sample")


def add_expert(
    bank: ExpertBank, name: str, expert: ExpertConfig, folder: str | Path | None, seed: int
) -> None:
    """A fresh expert, or one from a PEFT folder, whose own rank and alpha then hold."""
    if folder is not None:
        bank.import_expert(name, *read_expert(folder))
    else:
        bank.add(
            name,
            rank=expert.rank,
            alpha=expert.alpha,
            use_rslora=expert.use_rslora,
            targets=expert.targets,
            seed=seed,
        )
    bank.freeze(name, expert.frozen)


def only_adapter(folder: str | Path) -> list[str]:
    """Overrides that make a PEFT folder, such as a merged adapter, a config's only expert, always on."""
    return [
        "data.expert=merged",
        "router={kind: fixed}",
        "stages=[]",
        "experts={merged: {init_from: " + str(folder) + "}}",
    ]


def build_router(
    config: RunConfig, bank: ExpertBank, dims: dict[str, int]
) -> Router | AnchorRouter | None:
    router, num_tasks = config.router, len(config.data.tasks)
    if router.kind == "anchors":
        return AnchorRouter(
            experts=len(bank.names), evidence=router.evidence, dims=dims, num_tasks=num_tasks
        )
    if router.kind in ("one_hot", "fixed") or router.granularity == "token":
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Router(
            experts=len(bank.names),
            sites=len(bank.sites),
            evidence=router.evidence,
            dims=dims,
            num_tasks=num_tasks,
            hidden=router.hidden,
            pooling=router.pooling,
            per_site=router.per_site,
            modality_dropout=router.modality_dropout,
        )


def projector_parameters(model: MixtureModel) -> dict[str, nn.Parameter]:
    """The projector's own parameters, under the names that they have in the base."""
    experts = {id(p) for p in (*model.bank.parameters(), *model.bank.token_routers().values())}
    starts = tuple(f"{path}." for path in model.backbone.family.projectors)
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.model.named_parameters()
        if name.startswith(starts) and id(parameter) not in experts
    }


def projector_state(model: MixtureModel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in projector_parameters(model).items()}


def router_state(model: MixtureModel) -> dict[str, Tensor]:
    """All that decides gates: the router's parameters and buffers, and the sites' token routers."""
    state = model.router.state_dict(prefix="router.") if model.router is not None else {}
    tokens = model.bank.token_routers()
    return dict(state) | {f"token_router.{site}": p.detach() for site, p in tokens.items()}
