"""From a config to a model: load the base, wrap its layers, add experts and router."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from data.prompt import Intake
from moa.backbones.fingerprint import base_fingerprint
from moa.backbones.llava import open_intake
from moa.backbones.opening import AnyBackbone, class_of, open_backbone
from moa.cli.command import note
from moa.cli.settings import Override
from moa.clip_model import ClipMixture
from moa.config import RunConfig
from moa.experts.bank import ExpertBank
from moa.experts.kinds import KINDS, kind_of
from moa.experts.rank_gates import RankGates
from moa.experts.starts import STARTS, Starts
from moa.experts.ties import Ties
from moa.files.peft import ExpertHeader, read_header, read_tensors
from moa.files.spelling import match_spelling
from moa.files.targets import ALL_LINEAR, select
from moa.model import LanguageMixture, MixtureModel
from moa.routing.losses import OF_EXPERTS
from moa.routing.roles import WITH
from moa.routing.router import bank_numbers
from moa.routing.scores import ARROW, ATTENTION
from moa.sections import ADAPTERS, ALPHA, RANK, ExpertConfig, ModelConfig
from moa.statistics.moments import Moments, null_space_rows
from moa.statistics.stored import read_statistics

NULL_SHARE = 0.1  # of a layer's input directions that init=null_space leaves to the others
OTHER_BASE = "model.other_base=true (eval.py and scripts.merge: other_base=true)"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(config: RunConfig, experts: Path | None = None, *, to_train: bool = False) -> MixtureModel:
    """The model of a config, on the CPU; every initial weight is a function of `config.seed`.

    `experts` is the folder of a checkpoint whose experts take the place of fresh ones; `to_train` lets them hold their
    starts, else these are ranks like others. Raises ValueError for targets that match nothing, and for adapters of
    another base.
    """
    adapters = open_adapters(config, experts)
    for header in adapters.values():
        read_tensors(header)  # a broken one is found before the base is loaded
    place = import_to_train if to_train and experts is not None else import_adapter
    return build_mixture(config, open_base(config.model), adapters, place)


def open_adapters(config: RunConfig, experts: Path | None = None) -> dict[str, ExpertHeader]:
    """The headers of the PEFT folders that a config's experts start from, or of a checkpoint's."""
    folders = {
        name: experts / name if experts is not None else expert.init_from for name, expert in config.experts.items()
    }
    types = {name: KINDS[expert.kind].peft_type for name, expert in config.experts.items()}
    return {name: read_header(folder, types[name]) for name, folder in folders.items() if folder is not None}


def import_adapter(bank: ExpertBank, name: str, header: ExpertHeader, init: str) -> None:
    bank.import_expert(name, read_tensors(header), header.config, kind=kind_of(header.config))


def import_to_train(bank: ExpertBank, name: str, header: ExpertHeader, init: str) -> None:
    """From a checkpoint, in whose folder the start of an expert is the second half of the ranks."""
    held = STARTS[init].held
    bank.import_expert(name, read_tensors(header), header.config, kind=kind_of(header.config), held=held)


def build_mixture(
    config: RunConfig,
    backbone: AnyBackbone,
    adapters: Mapping[str, ExpertHeader],
    place: Callable[[ExpertBank, str, ExpertHeader, str], None] = import_adapter,
) -> MixtureModel:
    """The experts and the router of a config around a loaded base. Experts in `adapters` are put in by `place`, the
    others are fresh."""
    bank = ExpertBank.attach(
        backbone.model,
        config.model.targets,
        exclude=config.model.exclude,
        unused=backbone.unused_sites(),
        stream_of=backbone.stream_of,
        around=places_of_adapters(config, backbone.model),
        kinds={"sparse": patterns_of_sparse(config)},
    )
    place_experts(config, bank, backbone, adapters, place)
    router = build_router(config, bank, backbone.dims)
    if config.router.granularity != "sample":
        check_copies(config, bank)
        bank.add_token_routers(**token_routing(config), seed=config.seed)
    bank.context.root = config.router.root_gradient
    if not backbone.compares:
        return LanguageMixture(backbone, bank, router, **sample_routing(config, bank))
    check_for_clip(config)
    pairs = {"objective": config.losses.pairs, "negatives": config.losses.negatives}
    return ClipMixture(backbone, bank, router, **pairs, **sample_routing(config, bank))


def place_experts(
    config: RunConfig,
    bank: ExpertBank,
    backbone: AnyBackbone,
    adapters: Mapping[str, ExpertHeader],
    place: Callable[[ExpertBank, str, ExpertHeader, str], None],
) -> None:
    """Put a config's experts in a bank, with what they share, what of them trains, and the gates of their ranks."""
    starts = fresh_starts(config, bank, adapters)
    for name, expert in config.experts.items():
        if name in adapters:
            check_adapter(adapters[name], backbone, config.model)
            header, line = bank.fit(adapters[name])
            place(bank, name, header, expert.init)
            note(f"expert {name}: {line}" if line else "")
        else:
            bank.add(name, kind=expert.kind, targets=expert.targets, starts=starts, **made_of(expert))
    ties = {
        n: Ties(share_a=e.share_a, share_b=e.share_b, layers=tuple(e.tie_layers)) for n, e in config.experts.items()
    }
    bank.tie(ties, given=adapters if place in (import_adapter, import_to_train) else ())
    bank.train({name: () if expert.frozen else tuple(expert.factors) for name, expert in config.experts.items()})
    for name, expert in config.experts.items():
        if expert.rank_gates != "none" or expert.dropout:
            rank, by = bank.experts[name].settings["rank"], expert.rank_gates
            keep = (expert.active_ranks or max(rank // 8, 1)) if by == "token" else 1
            num_tasks = len(config.data.tasks) if by == "task" else 0
            gates = RankGates(kind=by, keep=keep, num_tasks=num_tasks, dropout=expert.dropout)
            bank.gate_ranks(name, gates, config.seed)


def fresh_starts(config: RunConfig, bank: ExpertBank, adapters: Collection[str]) -> Starts:
    fresh = {name: expert for name, expert in config.experts.items() if name not in adapters}
    outside = {
        name: outside_of(expert.init_statistics, expert.init_own_statistics, bank)
        for name, expert in fresh.items()
        if expert.init_statistics
    }
    inits = {name: expert.init for name, expert in fresh.items()}
    return Starts(inits, {name: expert.rank or RANK for name, expert in fresh.items()}, config.seed, outside)


def sample_routing(config: RunConfig, bank: ExpertBank) -> dict[str, Any]:
    router, added_up = config.router, select(config.router.added_up, bank.sites, "router.added_up")
    same = ["kind", "null_expert", "temperature", "granularity", "noise", "noise_scale", "straight_through", "score"]
    same += ["unknown_task", "top_k", "top_p", "threshold", "normalize", "renormalize", "pool", "bias_rate"]
    return {name: getattr(router, name) for name in same} | {
        "weights": [router.weights.get(name, 0.0) for name in config.choices] if router.weights else None,
        "added_up": [site in added_up for site in bank.sites],
        "gates": [expert.gate for expert in config.experts.values()],
        "banks": bank_numbers(config.banks),
    }


def token_routing(config: RunConfig) -> dict[str, Any]:
    router = config.router
    return {
        "choices": config.choices,
        "thresholds": int(router.learned_threshold),
        "share": router.share,
        "arrow": router.score == ARROW,
        "attention": router.hidden if router.score == ATTENTION else 0,
        "banks": bank_numbers(config.banks),
        "num_tasks": len(config.data.tasks) if router.per_task else 0,
        "biased": router.bias_rate is not None,
        "mixed": router.granularity == "both" and not config.banks,
        "noisy": router.learned_noise,
    }


def places_of_adapters(config: RunConfig, model: nn.Module) -> dict[str, tuple[str, str]]:
    """Module that adapters are around -> their kind and activation, in which all there must be alike."""
    modules = {n: m for n, m in model.named_modules() if any(isinstance(part, nn.Linear) for part in m.modules()) and n}
    found, first = dict[str, tuple[str, str]](), dict[str, str]()
    for name, expert in config.experts.items():
        if expert.kind not in ADAPTERS:
            continue
        for path in select(expert.targets or [], modules, f"experts.{name}.targets"):
            own = expert.kind, expert.activation or ("softmax" if expert.kind == "prompt" else "gelu")
            if found.setdefault(path, own) != own:
                theirs = f"experts.{first[path]} is {' '.join(found[path])} at {path}"
                raise ValueError(
                    f"experts.{name}: is {' '.join(own)}, and {theirs}; one module has one kind of adapters"
                )
            first.setdefault(path, name)
    return found


def patterns_of_sparse(config: RunConfig) -> list[str]:
    """The expressions among model.targets of the layers that have sparse experts."""
    own = [expert.targets for expert in config.experts.values() if expert.kind == "sparse"]
    return [pattern for targets in own for pattern in ([ALL_LINEAR] if targets is None else targets)]


def made_of(expert: ExpertConfig) -> dict[str, Any]:
    usual = {"rank": RANK, "alpha": ALPHA, "use_rslora": False}
    return {key: usual[key] if (own := getattr(expert, key)) is None else own for key in KINDS[expert.kind].made_of}


def check_copies(config: RunConfig, bank: ExpertBank) -> None:
    """ValueError for an expert with the gate of a routed one, at a site where this one is not and no token gives it."""
    for name, expert in config.experts.items():
        other = expert.gate.removeprefix(WITH)
        if other == expert.gate or other not in config.choices:
            continue
        if lacking := [site for site in bank.experts[name].sites if site not in bank.experts[other].sites]:
            raise ValueError(f"experts.{name}.gate: {other} is not at {lacking[0]}, where a token would give it a gate")


def outside_of(others: Sequence[str], own: str | None, bank: ExpertBank) -> Callable[[str, Tensor], Tensor]:
    """(site, a random lora_A) -> one outside of what the experts in these folders read: `init: null_space`. At a site
    that none of them has, it is the random one. Raises ValueError for folders without statistics."""
    known = [site_moments(folder, bank) for folder in others]
    leading = site_moments(own, bank) if own is not None else {}

    def rows(site: str, start: Tensor) -> Tensor:
        found = [moments[site]() for moments in known if site in moments]
        if not any(moments.tokens for moments in found):
            return start
        mine = leading[site]() if site in leading else None
        try:
            return null_space_rows(start, found, round(NULL_SHARE * start.shape[1]), mine).to(start.dtype)
        except ValueError as error:
            raise ValueError(f"init=null_space: {error}") from None

    return rows


def site_moments(folder: str, bank: ExpertBank) -> dict[str, Callable[[], Moments]]:
    """Site, as the bank spells it -> what reads the moments beside an adapter."""
    read = read_statistics(folder, "python -m scripts.statistics run=RUN writes it, where it was trained")
    names = match_spelling(read_header(folder).ranks, bank.shapes)
    return {name: partial(read, site) for site, name in names.items()}


def build_base(config: RunConfig) -> MixtureModel:
    """The base of a config alone: no experts, no router, the answers that transformers would give."""
    backbone = open_base(config.model)
    idle = set(backbone.unused_sites())
    layers = backbone.model.named_modules()
    # a bank wants a site; one without experts is the layer that it wraps
    site = next(n for n, m in layers if isinstance(m, nn.Linear) and n not in idle)
    bank = ExpertBank.attach(backbone.model, [re.escape(site)], stream_of=backbone.stream_of)
    return (ClipMixture if backbone.compares else LanguageMixture)(backbone, bank, kind="fixed")


def open_base(model: ModelConfig) -> AnyBackbone:
    """The base of a config; ValueError where it is another one than the config wants."""
    found = check_base(model)
    backbone = open_backbone(model.name, DTYPES[model.dtype], model.quantization, model.image_processor)
    return replace(backbone, fingerprint=found)


def check_base(model: ModelConfig) -> str:
    """The fingerprint of a config's base; ValueError where the config wants another one."""
    found = base_fingerprint(model.name)
    if model.fingerprint not in (None, found) and not model.other_base:
        raise ValueError(
            f"model.name: {model.name} has the fingerprint {found}, and the run belongs to a base with "
            f"{model.fingerprint}: it was changed, or is another one; name the right base, or use this one "
            f"by {OTHER_BASE}"
        )
    return found


def check_adapter(header: ExpertHeader, backbone: AnyBackbone, model: ModelConfig) -> None:
    """ValueError for an adapter that was trained on another base, where it records which."""
    own, trained = backbone.fingerprint, header.base_fingerprint
    if own and trained not in (None, own) and not model.other_base:
        base = header.config.get("base_model_name_or_path")
        raise ValueError(
            f"{header.path}: was trained on the base {base} with the fingerprint {trained}, and {backbone.name} has "
            f"{own}; name the right base by model.name, or use this one by {OTHER_BASE}"
        )


def settled(config: RunConfig) -> RunConfig:
    """The config with what its base and adapters decide: the base's fingerprint, and rank, alpha and rsLoRA of
    imported experts. ValueError for a base or a setting that contradicts them."""
    adapters = open_adapters(config)
    experts = {name: settled_expert(name, expert, adapters.get(name)) for name, expert in config.experts.items()}
    model = replace(config.model, fingerprint=check_base(config.model))
    return replace(config, model=model, experts=experts)


def settled_expert(name: str, expert: ExpertConfig, header: ExpertHeader | None) -> ExpertConfig:
    if header is None:
        return replace(expert, **made_of(expert))
    own = header.config
    found = {"rank": own["r"], "alpha": float(own.get("lora_alpha", 8)), "use_rslora": bool(own.get("use_rslora"))}
    found = {key: found[key] for key in KINDS[expert.kind].made_of}
    for key, value in ((key, getattr(expert, key)) for key in found):
        if value not in (None, found[key]):
            raise ValueError(
                f"experts.{name}.{key}: {value}, and {header.path} has {found[key]}; the folder decides: leave it out"
            )
    return replace(expert, **found)


def intake_of(model: ModelConfig) -> Intake:
    """What data needs of a base; a CLIP is small, and loaded for it."""
    if class_of(model.name).compares:
        return open_base(model).intake
    return open_intake(model.name, model.image_processor)


def check_for_clip(config: RunConfig) -> None:
    """ValueError for settings without effect where there is no language model."""
    if config.model.train_projector:
        raise ValueError("model.train_projector: a CLIP has no projector")
    if config.router.granularity != "sample":
        raise ValueError("router.granularity: a CLIP is routed by sample; choices: sample")
    if config.prompt.border:
        raise ValueError("prompt.border: is for questions, and a CLIP gets none")
    if names := [name for name in (*OF_EXPERTS, "crosstalk", "crosstalk_end") if getattr(config.losses, name)]:
        raise ValueError(f"losses.{names[0]}: is of a language model's experts, and has no effect on a CLIP")
    if config.losses.reduction == "token":
        raise ValueError("losses.reduction=token: a CLIP answers with no tokens; choices: sample")


def read_clusters(file: str, evidence: Sequence[str]) -> Tensor:
    """The centres in a file of scripts.clusters; ValueError for one of other evidence."""
    try:
        with safe_open(file, framework="pt") as opened:
            seen, centres = (opened.metadata() or {}).get("evidence", ""), opened.get_tensor("centres")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"router.clusters: {file}: not readable as safetensors ({error})") from None
    if set(seen.split()) != set(evidence):
        raise ValueError(
            f"router.clusters: {file} has clusters of {seen or 'nothing'}, and router.evidence is {evidence}"
        )
    return centres


def only_adapters(folders: Mapping[str, str | Path]) -> list[Override]:
    """Overrides that make PEFT folders by name, such as one merged adapter, a config's only experts, all on alike."""
    experts = {name: {"init_from": str(folder)} for name, folder in folders.items()}
    alone: list[Override] = [("router", {"kind": "fixed"}), ("losses", {}), ("stages", {})]
    return [("data.expert", next(iter(experts))), *alone, ("experts", experts)]


def build_router(config: RunConfig, bank: ExpertBank, dims: dict[str, int]) -> nn.Module | None:
    """The module of the config's kind; None for a kind without one, and where tokens are routed."""
    router, row = config.router, config.router.row
    if row.router is None or router.granularity == "token":
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return row.router(
            experts=len(config.choices),
            sites=len(bank.sites),
            dims=dims,
            num_tasks=len(config.data.tasks),
            **{name: getattr(router, name) for name in row.module_options},
            **({"banks": config.banks} if config.banks else {}),
            **({} if router.clusters is None else {"centres": read_clusters(router.clusters, router.evidence)}),
        )
