"""From a config to a model: load the base, wrap its layers, add experts and router."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from moa.backbones.llava import load_backbone
from moa.config import ExpertConfig, RunConfig
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
    backbone = load_backbone(
        config.model.name, DTYPES[config.model.dtype], config.model.quantization
    )
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
    return MixtureModel(
        backbone,
        bank,
        router,
        kind=config.router.kind,
        top_k=config.router.top_k,
        temperature=config.router.temperature,
        granularity=config.router.granularity,
        weights=[weights.get(name, 0.0) for name in config.experts] if weights else None,
    )


def build_base(config: RunConfig) -> MixtureModel:
    """The base of a config alone: no experts, no router, the answers that transformers would give."""
    backbone = load_backbone(config.model.name, DTYPES[config.model.dtype])
    idle = set(backbone.unused_sites())
    layers = backbone.model.named_modules()
    # a bank wants a site; one without experts is the layer that it wraps
    site = next(n for n, m in layers if isinstance(m, nn.Linear) and n not in idle)
    bank = ExpertBank.attach(backbone.model, [re.escape(site)], stream_of=backbone.stream_of)
    return MixtureModel(backbone, bank, kind="fixed")


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
