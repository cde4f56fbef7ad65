"""From a config to a federation that is ready: model, clients by the partition, table of roles, run folder, resume."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data.digest import digest_sources
from data.mixture import Source, read_sample
from data.sample import Sample
from data.sources import make_collator, open_mixture, open_ocr, open_sources
from moa.build import build_model, settled
from moa.checkpoint import CONFIG, pointed, step_name
from moa.cli.settings import as_mapping, load, to_yaml
from moa.config import RunConfig, load_config
from moa.federated.aggregate import Server, check_roles
from moa.federated.assignment import tasks_of
from moa.federated.client import TERMS, routed, tensors_of, trainable
from moa.federated.config import ClientConfig, FederateConfig, make_roles, special
from moa.federated.groups import EVIDENCE, check_groups, mean_evidence, roles_of
from moa.federated.matrix import measure
from moa.federated.partition import OWN, Client, Tag, check_owners, make_clients, print_partition, tag_of
from moa.federated.pieces import Names, Piece, Role, pieces_of, print_roles
from moa.federated.privacy import secure_line, spent
from moa.federated.refusals import (
    check_carry,
    check_common,
    check_group_experts,
    check_products,
    check_ranks,
    check_senders,
    check_weights,
    common_factors,
    with_numbers,
    with_ratios,
)
from moa.federated.simulate import ITEMSIZE, Federation
from moa.federated.store import SERVER, SETTINGS, State, clean, load_arrivals, load_state
from moa.files.atomic import write_file
from moa.model import MixtureModel
from moa.parts import PARTS
from moa.training.batches import make_layout
from moa.training.distributed.strategy import place
from moa.training.report import Reporter
from moa.training.run_folder import WAY_OUT, begin, claim, same_data
from moa.training.setup import check_evaluation, filled
from moa.training.trackers import flatten, start_trackers


def open_federation(
    config: FederateConfig,
    accelerator: Any,
    *,
    resume: bool = False,
    overwrite: bool = False,
    clients: Sequence[Client] | None = None,
) -> Federation:
    """A federation at its start, or where it was killed (`resume`, and there is one).

    `clients` are those of other machines, which have the data; without them the data is dealt to clients here.
    ValueError for a folder that holds a run, another config or data, roles that do not fit the model, a client without
    data, and an expert without an owner. Nothing of an old run is removed until all is checked.
    """
    if clients is None and config.federated.partition.how == OWN:
        raise ValueError("federated.partition.how: own is of clients on machines of their own: docs/federated.md")
    if accelerator.num_processes > 1:
        raise ValueError(f"federate.py trains its clients in one process, got {accelerator.num_processes}")
    folder = Path(config.out)
    before = load(FederateConfig, folder / SETTINGS) if resume and (folder / SETTINGS).is_file() else None
    run = settled(config.run()) if before is None else filled(config.run(), load_config(folder / CONFIG))
    found = claim(run, resume=resume, overwrite=overwrite)
    if before is not None:
        same_settings(config, before, folder)
    elif found:
        raise ValueError(f"--resume: out={folder} holds a run of train.py; choose another out=")
    federation = make_federation(config, run, accelerator, clients)
    check_evaluation(run)
    federation.measure = measure
    check_plans(federation)
    federation.state = (load_state(folder) if before is not None else None) or federation.state
    data = digest_sources(federation.sources, run.data) if clients is None else {}
    if before is None:  # what a start left that was killed before its first round
        shutil.rmtree(folder / SERVER, ignore_errors=True)
    elif found is None:
        same_data(folder, data)
    begin(run, data, found, clear=overwrite and not resume)
    write_file(folder / SETTINGS, to_yaml(replace(config, root=config.root or str(Path.cwd()))))
    if run.logging.trackers:
        start_trackers(accelerator, run)
    federation.reporter.print("\n" + table_of_roles(federation))
    take_up(federation)
    return federation


def make_federation(
    config: FederateConfig, run: RunConfig, accelerator: Any, clients: Sequence[Client] | None = None
) -> Federation:
    """Model, data, clients and table of roles, at the start of a federation; nothing is written."""
    for name in config.federated.losses:
        if name not in TERMS:
            raise ValueError(f"federated.losses.{name}: no such term; choices: {', '.join(TERMS)}")
    torch.manual_seed(run.seed)
    model = build_model(run, to_train=True)
    place(accelerator, model)
    ocr = open_ocr(run.data)
    sources, recipe = open_mixture(run, ocr).sources if clients is None else {}, config.federated.partition
    grouped = routed_experts(model, run) if config.federated.groups.by else []
    tags, skipped = read_tags(sources, run.data.on_bad_sample)
    try:
        found = tags if clients is None else [row.tag for client in clients for row in client.train]
        all_here = recipe.how != OWN or clients is not None
        experts = owned_experts(model, run, found) if all_here and not grouped else []
        if clients is None:
            clients = make_clients(tags, recipe, run.seed, experts)
        else:
            check_owners(clients, recipe, experts)
    except ValueError as error:
        raise ValueError(f"federated.partition: {error}") from None
    roles, pieces = table_of(config, model, run)
    own = special(config.federated, [client.name for client in clients if not client.held_out])
    start = {key: tensor.cpu().clone() for key, tensor in tensors_of(model, run).items()}
    slot = slot_of(config, run, grouped, own, roles, pieces, start)
    federation = Federation(
        config=config, run=run, accelerator=accelerator, model=model, sources=sources, roles=roles,
        validation=open_sources(run.data.validation.values(), run.data, ocr), clients=clients, pieces=pieces,
        collator=make_collator(run, model.backbone.intake, pack_length=run.train.pack_length),
        layout=make_layout(run.train, 1), reporter=Reporter(run, accelerator), quiet=Reporter(run, accelerator),
        special=own, grouped=grouped, slot=slot, state=State(server=Server(round=1, tensors=start)),
    )  # fmt: skip
    federation.quiet.console.quiet = True
    if run.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    federation.reporter.print(print_partition(clients, len(tags) + skipped))
    return federation


def take_up(federation: Federation) -> None:
    """Read what has arrived in the round under way, and write what a kill kept from being written."""
    state, reporter = federation.state, federation.reporter
    if state.history:
        clean(federation.folder, state)
    federation.arrivals = load_arrivals(federation.folder, state.server.round)
    if state.rounds_done and pointed(federation.folder, "last") != step_name(state.step):
        federation.show(state.server.tensors)
        federation.write_checkpoint()
    if state.rounds_done or federation.arrivals:
        arrived = f", with {len(federation.arrivals)} updates of round {state.server.round}"
        reporter.print(f"\ncontinues after round {state.rounds_done}{arrived if federation.arrivals else ''}")


def check_plans(federation: Federation) -> None:
    """ValueError for what a client cannot do, before any of them trains."""
    senders: dict[str, dict[str, tuple[str, ...]]] = {role.name: {} for role in federation.roles}
    for client in federation.training:
        own = federation.special[client.name].experts
        for name in own or ():
            if name not in federation.model.bank.names:
                choices = ", ".join(federation.model.bank.names)
                raise ValueError(f"federated.clients.{client.name}.experts: no expert {name!r}; choices: {choices}")
        if own is not None and federation.run.router.granularity != "sample":
            raise ValueError(f"federated.clients.{client.name}.experts: needs router.granularity=sample")
        rounds = plans_of(federation, client)
        federation.config_of(client, rounds[0])
        try:
            for round_ in rounds:
                for role in federation.assignment(client, round_).sends:
                    senders[role.name][client.name] = tasks_of(federation.at(client, round_))
        except ValueError as error:
            raise ValueError(f"federated: {error}") from None
    settings = federation.config.federated
    for round_ in range(1, settings.rounds + 1 if settings.arrives or settings.leaves else 1):
        if not federation.drawn(round_):
            raise ValueError(f"federated.arrives: no client that is drawn in round {round_} has samples there")
    try:
        if settings.privacy.noise is not None:
            spent(settings.privacy.noise, settings.participation, settings.rounds, settings.privacy.delta)
        check_ranks(federation.special, federation.run.experts, federation.roles)
        check_senders(federation.roles, senders, federation.config.federated.drawn)
    except ValueError as error:
        raise ValueError(f"federated.{error}") from None


def plans_of(federation: Federation, client: Client) -> list[int]:
    """A round of each kind in which a client has samples: by stages, data sources, and factors that move."""
    config = federation.config
    settings, two = config.federated, config.federated.factors == "alternate"
    kinds = dict[tuple[bool, ...], int]()
    for n in range(settings.rounds, 0, -1):
        stages = (settings.has(name, n) for name in config.stages)
        here = (settings.present(name, n) for name in config.data.sources)
        kinds[*stages, *here, two and n % 2 == 1] = n
    return sorted(n for n in kinds.values() if federation.at(client, n).train)


def same_settings(config: FederateConfig, before: FederateConfig, folder: Path) -> None:
    """ValueError naming the settings of the federation in which a resumed one differs; train.py names the run's."""
    now, then = (flatten(as_mapping(c.federated), "federated.") for c in (config, before))
    if different := differences(now, then, ("federated.num_questions",)):
        raise ValueError(f"--resume: {folder / SETTINGS} differs: {different}. {WAY_OUT}")


def differences(now: Mapping[str, Any], then: Mapping[str, Any], free: Collection[str]) -> str:
    """The settings that are not the same, without those that are `free` or below one that is."""
    return "; ".join(
        f"{key} was {then.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != then.get(key) and not any(key == name or key.startswith(f"{name}.") for name in free)
    )


def read_tags(sources: Mapping[str, Source], on_bad_sample: str) -> tuple[list[Tag], int]:
    """What the partition reads of every sample, and how many bad ones were left out."""
    tags, skipped = list[Tag](), 0
    for name, source in sources.items():
        for index in range(len(source)):
            sample = read_sample(source, index, name)
            if isinstance(sample, Sample):
                tags.append(tag_of(sample, name, index))
            elif on_bad_sample == "error":
                raise ValueError(str(sample))
            else:
                skipped += 1
    return tags, skipped


def owned_experts(model: MixtureModel, config: RunConfig, tags: Sequence[Tag]) -> list[str]:
    """The routed experts that train: each needs a client with samples of it, where samples name their experts."""
    if config.data.expert is not None or not any(tag.expert for tag in tags):
        return []
    return routed_experts(model, config)


def routed_experts(model: MixtureModel, config: RunConfig) -> list[str]:
    """Those that train."""
    return [name for name in model.bank.names if name in routed(model) and not config.experts[name].frozen]


def slot_of(
    config: FederateConfig,
    run: RunConfig,
    grouped: Sequence[str],
    special: Mapping[str, ClientConfig],
    roles: Sequence[Role],
    pieces: Sequence[Piece],
    start: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The first group's expert at the start, of which `start` gets copies; ValueError for what groups cannot be."""
    if config.federated.groups.by is None:
        return {}
    try:
        check_group_experts(config.federated.groups, run, grouped, special)
        check_groups(grouped, roles, pieces)
    except ValueError as error:
        raise ValueError(f"federated.{error}") from None
    head = f"experts.{grouped[0]}."
    slot = {key: tensor for key, tensor in start.items() if key.startswith(head)}
    for name in grouped[1:]:
        start |= {key.replace(head, f"experts.{name}.", 1): tensor.clone() for key, tensor in slot.items()}
    return slot


def table_of(config: FederateConfig, model: MixtureModel, run: RunConfig) -> tuple[list[Role], list[Piece]]:
    """Roles and pieces; ValueError for elements in none or two, and for a rule that a role cannot have."""
    experts = [name for name in model.bank.names if not config.experts[name].frozen]
    roles = make_roles(config.federated.roles, experts)
    for role in roles:
        if role.elsewhere == "absent" and run.router.granularity != "sample":
            raise ValueError(f"federated.roles.{role.name}.elsewhere: absent needs router.granularity=sample")
    state = {key if key.startswith("router.") else f"router.{key}" for key in PARTS["router"].state(model)}
    if lost := sorted(state - tensors_of(model, run).keys()):
        raise ValueError(f"{lost[0]}: learns without a gradient, and a federation does not send it")
    names = Names(choices=tuple(config.choices), evidence=tuple(model.routing.evidence))
    try:
        shapes = trainable(model, run)
        pieces = pieces_of(shapes, roles, names)
        scalings = [site.scalings for site in model.bank.sites.values()]
        number = config.federated.partition.clients - config.federated.partition.held_out
        roles = with_numbers(with_ratios(roles, pieces, scalings), number)
        check_roles(roles, pieces)
        check_products(roles, pieces, run.experts)
        own = {name: [*model.bank.named_parameters(name)] for name in model.bank.names}
        check_carry(roles, pieces, run.experts, tensors_of(model, run).keys(), scalings)
        check_common(roles, pieces, shapes, common_factors(own))
        check_weights(roles, compares=model.backbone.compares)
    except ValueError as error:
        raise ValueError(f"federated.{error}") from None
    return roles, pieces


def table_of_roles(federation: Federation) -> str:
    """The table that is printed before the first round: what leaves a client, in bytes, and who sends it."""
    senders: dict[str, list[str]] = {role.name: [] for role in federation.roles}
    for client in federation.training:
        plans = [federation.assignment(client, round_).sends for round_ in plans_of(federation, client)]
        for name in {role.name for sends in plans for role in sends}:
            senders[name].append(client.name)
    everyone = len(federation.training)
    senders = {name: own if len(own) < everyone else [f"all {everyone}"] for name, own in senders.items()}
    for expert in federation.grouped:
        own = roles_of(expert, federation.roles, federation.pieces)
        senders |= dict.fromkeys(own, ["its group"])
    lines = print_roles(federation.pieces, federation.roles, ITEMSIZE, senders)
    if federation.config.federated.groups.by == "evidence":
        size = mean_evidence(federation.evidence_sums()).numel()
        lines += f"\n{EVIDENCE:<20} {size:>12,} {ITEMSIZE * size:>12,}  means of data, of a client in its first round"
    settings = federation.config.federated
    single = {"screen": settings.screen, "groups": settings.groups.by, "privacy.clip": settings.privacy.clip}
    others = [f"{key} reads single updates" for key, value in single.items() if value is not None]
    lines += f"\n{secure_line(federation.roles, others)}"
    if settings.privacy.noise is not None:
        epsilon = spent(settings.privacy.noise, settings.participation, settings.rounds, settings.privacy.delta)
        lines += f"\nprivacy of a client after {settings.rounds} rounds: epsilon {epsilon:.2f}"
        lines += f" at delta {settings.privacy.delta:g}"
    return lines
