"""What a stage trains, which gates it uses, and where its weights start.

experts   all experts at once, each on its own samples, or one on all: gates are one-hot, and those of shared experts
router    experts frozen, gates by the router
joint     both

A stage's `gates` change these gates at random, see moa/routing/schedule.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from data.batch import Batch
from moa.build import check_adapter
from moa.checkpoint import CONFIG, load_strictly, load_tensors, step_folder, verify
from moa.config import RunConfig, load_config
from moa.experts.kinds import KINDS
from moa.files.peft import read_header, read_tensors
from moa.files.peft_config import site_scaling
from moa.files.targets import select
from moa.model import LanguageMixture, MixtureModel
from moa.parts import PARTS, Parameters, trained_parts
from moa.routing.router import axes_of
from moa.routing.schedule import GateDraws
from moa.sections import LossConfig, StageConfig

TRAINED = {"experts": ("experts", "projector"), "router": ("router",), "joint": ("experts", "router", "projector")}


def parameter_groups(model: MixtureModel, config: RunConfig) -> dict[str, Parameters]:
    """Group -> name -> parameter, for everything that any stage may train: nothing frozen, and not the base."""
    frozen = {id(parameter) for parameter in model.bank.frozen_parameters()}
    parts = trained_parts(config)
    return {
        name: {key: p for key, p in part.parameters(model).items() if id(p) not in frozen}
        for name, part in parts.items()
    }


def set_trainable(model: MixtureModel, groups: Mapping[str, Parameters], stage: StageConfig) -> dict[str, Parameters]:
    """Let exactly the stage's groups require gradients, and return them; ValueError where nothing is to be trained."""
    model.requires_grad_(False)
    chosen = stage_groups(model, groups, stage)
    for parameters in chosen.values():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
    if not chosen and model.routing.kind.learns != "means":
        raise ValueError(f"stages.{stage.name}: nothing to train: no expert, router or projector learns")
    return chosen


def stage_groups(model: MixtureModel, groups: Mapping[str, Parameters], stage: StageConfig) -> dict[str, Parameters]:
    chosen = {name: groups[name] for name in TRAINED[stage.kind] if groups.get(name)}
    if stage.only is not None and "experts" in chosen:
        learn = {id(parameter) for name in stage.only for _, parameter in model.bank.named_parameters(name)}
        chosen["experts"] = {key: p for key, p in chosen["experts"].items() if id(p) in learn}
    return chosen


def stage_gates(
    model: MixtureModel, batch: Batch, stage: StageConfig, draws: GateDraws | None = None
) -> Float[Tensor, "batch 1 expert"] | None:
    """The stage's override of the gates; None where the model's own router decides."""
    if stage.kind != "experts":
        return None
    ids = batch.expert_ids
    if stage.expert is not None:
        ids = torch.full_like(ids, model.bank.names.index(stage.expert))
    return model.routing.oracle(ids, draws)


def copy_expert(model: MixtureModel, stage: StageConfig) -> list[str]:
    """Make every other routed expert that learns a copy of `copy_of`; a line on it."""
    bank, name = model.bank, stage.copy_of
    if name is None:
        return []
    routed = model.routing.roles.named("routed")
    copies = [other for other in routed if other != name and not bank.experts[other].frozen]
    if not copies:
        raise ValueError(f"stages.{stage.name}.copy_of: there is no other routed expert to become a copy of {name}")
    bank.load_states({other: bank.state(name) for other in copies})
    gates = bank.rank_gates()
    with torch.no_grad():
        for key, learned in gates.items():
            kind, expert, site = key.split(".", 2)
            if expert in copies:
                learned.copy_(gates[f"{kind}.{name}.{site}"])
    less = ", less the null expert's share of the gates" if model.routing.null_expert else ""
    return [f"experts {', '.join(copies)} as copies of {name}{less}"]


def keep_largest(model: MixtureModel, stage: StageConfig) -> list[str]:
    """Before the first step of a stage and where it is resumed: what of lora_B its experts learn, see `kept_b`; a line
    for one that nothing trained before."""
    lines = []
    for name, spec in model.bank.experts.items():
        learns = not spec.frozen and name in (stage.only or model.bank.names)
        if not model.bank.keep_largest(name, stage.kept_b if learns else None):
            lines.append(f"expert {name} as nothing: its lora_B is zero, of which kept_b keeps nothing that learns")
    return lines


def crosstalk_sites(model: MixtureModel, losses: LossConfig) -> frozenset[str]:
    """The sites where crosstalk is measured: none for a CLIP or a lone expert, and not the projector's.

    A projector reads image tokens, which are the same for all experts: there crosstalk cannot fall without loss.
    Raises ValueError for an exclusion that matches nothing.
    """
    excluded = select(losses.crosstalk_exclude, model.bank.sites, "losses.crosstalk_exclude")
    linear = not model.bank.rank_gates() and all(site.kind == "lora" for site in model.bank.sites.values())
    able = isinstance(model, LanguageMixture) and int(model.counted.sum()) > 1 and linear
    projectors = tuple(f"{path}." for path in model.backbone.family.projectors) if able else ()
    kept = [site for site in model.bank.sites if able and site not in excluded and not site.startswith(projectors)]
    if losses.crosstalk and not kept:
        what = "a language model's sites beside the projector's, and two experts that are routed"
        raise ValueError(f"losses.crosstalk: has no effect, it needs {what}")
    return frozenset(kept)


def first_position(config: RunConfig, number: int, batch_size: int) -> int:
    """Where stage `number` begins in its mixture: earlier stages of the same sources go before it."""
    *earlier, stage = [*config.stages.values()][: number + 1]
    before = [s for s in earlier if set(s.sources or ()) == set(stage.sources or ())]
    return batch_size * sum(s.steps for s in before)


def start_weights(model: MixtureModel, config: RunConfig, stage: StageConfig) -> list[str]:
    """Load what the stage starts from; returns one line for each part, to be shown."""
    return [*loaded_weights(model, config, stage), *copy_expert(model, stage)]


def loaded_weights(model: MixtureModel, config: RunConfig, stage: StageConfig) -> list[str]:
    source = stage.init_from
    if source is None:
        return []
    if isinstance(source, dict):
        return load_experts(model, config, {name: Path(folder) for name, folder in source.items()})
    folder = step_folder(source)
    verify(folder)
    names = sorted(path.name for path in (folder / "experts").iterdir())
    if not set(names) <= set(model.bank.names):
        raise ValueError(
            f"stages.{stage.name}.init_from: {folder} has the experts {names}, this run has "
            f"{sorted(model.bank.names)}; name all of them in experts (with frozen: true, or without)"
        )
    lines = load_experts(model, config, {name: folder / "experts" / name for name in names})
    return [*lines, load_rest(model, config, folder)]


def check_starts(model: MixtureModel, config: RunConfig, begun: int) -> None:
    """ValueError, naming the stage, where a later one could not load what it starts from; weights are put back."""
    stages = [*config.stages.values()][begun:]
    if all(stage.init_from is None and stage.copy_of is None for stage in stages):
        return
    first = stages[0]
    if first.copy_of is not None and not (begun or first.init_from or config.experts[first.copy_of].init_from):
        rule = f"{first.copy_of} is fresh in the first stage: give it init_from, or train it in a stage before"
        raise ValueError(f"stages.{first.name}.copy_of: {rule}")
    own = [part.state(model) for part in trained_parts(config).values()]
    kept = [{key: tensor.clone() for key, tensor in state.items()} for state in own]
    for stage in stages:
        key = f"stages.{stage.name}.init_from: "
        try:
            start_weights(model, config, stage)
        except (ValueError, OSError) as error:
            named = str(error).startswith(f"stages.{stage.name}.")
            raise ValueError(str(error) if named else f"{key}{error}") from None
        finally:
            for state, before in zip(own, kept, strict=True):
                load_strictly(state, before, Path(key))


def load_experts(model: MixtureModel, config: RunConfig, folders: Mapping[str, Path]) -> list[str]:
    """Overwrite experts by PEFT folders of the same sites, ranks and scaling; a line for each."""
    read = {name: read_expert(model, config, name, folder) for name, folder in folders.items()}
    model.bank.load_states({name: tensors for name, (tensors, _) in read.items()})
    return [line for _, line in read.values()]


def read_expert(model: MixtureModel, config: RunConfig, name: str, folder: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a PEFT folder that can take an expert's place, and a line on them."""
    header = read_header(folder, KINDS[config.experts[name].kind].peft_type)
    check_adapter(header, model.backbone, config.model)
    header, line = model.bank.fit(header)
    tensors, found = read_tensors(header), header.config
    if set(header.ranks) != set(model.bank.experts[name].sites):
        theirs, ours = len(header.ranks), len(model.bank.experts[name].sites)
        raise ValueError(
            f"{folder}: has {theirs} sites, and experts.{name} has {ours}, not the same ones; a stage's init_from "
            f"replaces an expert of the same sites, and experts.{name}.init_from takes one with its own"
        )
    for site_name in model.bank.experts[name].sites:
        own = model.bank.sites[site_name].scalings[name]
        if abs(site_scaling(found, site_name) - own) > 1e-9 * own:
            raise ValueError(
                f"{folder}: scaling (alpha / rank) is {site_scaling(found, site_name)} at "
                f"{site_name}, and {own} by experts.{name}; give both the same alpha and rank"
            )
    return tensors, f"expert {name} from {folder}" + (f" ({line})" if line else "")


def load_rest(model: MixtureModel, config: RunConfig, folder: Path) -> str:
    """Projector and router of a checkpoint; a line for a router of other settings, which stays fresh like new rows."""
    router, projector = PARTS["router"], PARTS["projector"]
    file = folder / projector.file
    if projector.is_trained(config) and file.is_file():
        load_strictly(projector.state(model), load_tensors(file), file)
    other = load_config(folder / CONFIG)
    ours, theirs = (dataclasses.asdict(c.router) for c in (config, other))
    more = ours["task_prior"] and not theirs["task_prior"]  # whose start, zeros, changes no gate
    theirs |= {"task_prior": True} if more else {}
    different = [f"router.{key}" for key in ours if ours[key] != theirs[key]]
    different += ["data.tasks"] if set(other.data.tasks) - set(config.data.tasks) else []
    both = [name for name in config.experts if name in other.experts]
    for key in ("gate", "bank", "rank_gates", "active_ranks"):
        pairs = ((name, getattr(config.experts[name], key), getattr(other.experts[name], key)) for name in both)
        different += [f"experts.{name}.{key}" for name, ours, theirs in pairs if ours != theirs]
    if different:
        return f"router starts fresh: {folder} has another {', '.join(different)}"
    now, then = ({"expert": c.choices, "task": c.data.tasks} for c in (config, other))
    file, own = folder / router.file, router.state(model)
    found = dict[str, Tensor]()
    of_ranks = {key: key.split(".")[2] for key in own if key.startswith("rank_gates.")}
    for key, tensor in load_tensors(file).items():
        if key.startswith("rank_gates.") and key.split(".")[2] not in config.experts:
            continue
        rows, old = (at_site(model, key, names) for names in (now, then))
        places = {k: [rows[k].index(n) if n in rows[k] else None for n in names] for k, names in old.items()}
        found[key] = in_places(own.get(key, tensor), tensor, axes_of(key.removeprefix("router.")), places)
    fresh_keys = [key for key, name in of_ranks.items() if name not in other.experts]
    found |= {key: own[key].clone() for key in [*fresh_keys, *(["router.prior"] if more else [])]}
    load_strictly(own, found, file)
    fresh = [f"{kind} {name}" for kind in now for name in now[kind] if name not in then[kind]]
    return f"router from {folder}" + (f", fresh for {', '.join(fresh)}" if fresh else "")


def at_site(model: MixtureModel, key: str, names: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The names of a router's rows: a token router, its noise and bias have those of their site's experts alone."""
    kind, _, site = key.partition(".")
    if kind not in ("token_router", "task_router", "token_noise", "token_bias"):
        return dict(names)
    own = model.bank.experts
    return {**names, "expert": [name for name in names["expert"] if site in own[name].sites]}


def in_places(own: Tensor, found: Tensor, axes: Sequence[str], places: Mapping[str, Sequence[int | None]]) -> Tensor:
    """`own` with `found` in the rows of the experts and tasks that the checkpoint has; None: a row that is left out."""
    names = [*axes, *[""] * (found.dim() - len(axes))]
    sizes = zip(names, own.shape, found.shape, strict=False)
    if any(ours != theirs for name, ours, theirs in sizes if name not in places):
        return found  # of other sites or widths: load_strictly names it
    ours, theirs = list[Tensor](), list[Tensor]()
    for name, size, own_size in zip(names, found.shape, own.shape, strict=True):
        placed = list[int | None](places.get(name, range(size)))
        # and last what belongs to no expert, such as a threshold
        placed += range(own_size - size + len(placed), own_size)
        rows = [(place, row) for row, place in enumerate(placed) if place is not None]
        ours.append(torch.tensor([place for place, _ in rows]))
        theirs.append(torch.tensor([row for _, row in rows]))
    whole = own.clone()
    whole[torch.meshgrid(*ours, indexing="ij")] = found[torch.meshgrid(*theirs, indexing="ij")].to(whole)
    return whole
