"""A federation in one process: the clients of a round train one after the other, then the server aggregates.

    config -> model, clients by the partition, table of roles -> rounds -> a run folder as train.py leaves it

A run is a function of its config. What a client trains is drawn from (seed, round, client), so a federation that was
killed between any two updates goes on to the same values.
"""

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.checks import BadSampleError
from data.collate import Collator
from data.digest import digest_sources
from data.mixture import Source, read_sample
from data.sample import Sample
from data.sources import make_collator, open_mixture, open_ocr, open_sources
from moa.analysis.plots import read_log
from moa.build import build_model, settled
from moa.checkpoint import CONFIG, TrainState, pointed, prune, save_checkpoint, step_name
from moa.cli.settings import as_mapping, load, to_yaml
from moa.config import RunConfig, load_config
from moa.federated.aggregate import CLIENT, RoundReport, Server, Update, aggregate, check_roles, deliver
from moa.federated.client import (
    TERMS,
    Assignment,
    assign,
    client_mixture,
    client_update,
    modalities_of,
    receive,
    tasks_of,
    tensors_of,
    trainable,
)
from moa.federated.config import ClientConfig, FederateConfig, FederatedConfig, make_roles, special, stages_of
from moa.federated.partition import Client, Tag, make_clients, print_partition, tag_of
from moa.federated.pieces import Names, Piece, Role, join, pieces_of, print_roles
from moa.federated.store import (
    SERVER,
    SETTINGS,
    Arrival,
    State,
    clean,
    load_arrivals,
    load_state,
    save_arrival,
    save_state,
)
from moa.files.atomic import write_file
from moa.model import MixtureModel
from moa.parts import PARTS
from moa.training.batches import Layout, TrainingError, make_layout
from moa.training.distributed.strategy import place
from moa.training.report import LOG, Reporter, flatten
from moa.training.run import COUNTERS, Run
from moa.training.run_folder import WAY_OUT, begin, claim, same_data
from moa.training.setup import check_evaluation, filled
from moa.training.signals import StopRequest
from moa.training.validation import validation_losses

ITEMSIZE = 4  # bytes of a number that is sent: float32


@dataclass(kw_only=True)
class Federation:
    """Everything that lives as long as a federation; `state` is stored after each round."""

    config: FederateConfig
    run: RunConfig  # of the run that comes out
    accelerator: Any
    model: MixtureModel
    sources: Mapping[str, Source]
    validation: Mapping[str, Source]
    collator: Collator
    layout: Layout
    reporter: Reporter
    quiet: Reporter  # of the clients
    clients: Sequence[Client]
    roles: Sequence[Role]
    pieces: Sequence[Piece]
    special: Mapping[str, ClientConfig]
    state: State
    arrivals: dict[str, Arrival] = field(default_factory=dict)  # in the round under way
    stop: StopRequest = field(default_factory=StopRequest)

    @property
    def folder(self) -> Path:
        return Path(self.run.out)

    @property
    def training(self) -> list[Client]:
        return [client for client in self.clients if not client.held_out]

    @property
    def done(self) -> bool:
        return self.state.rounds_done == self.config.federated.rounds

    @property
    def step(self) -> int:
        """Of all clients together, so far."""
        return self.state.step + sum(arrival.steps for arrival in self.arrivals.values())

    # A round ------------------------------------------------------------------------------------------

    def drawn(self, round_: int) -> list[tuple[Client, bool]]:
        """The clients of a round in their order, and whether each sends something."""
        drawn = draw_clients(self.config.federated, self.run.seed, round_)
        return [(self.training[place], sends) for place, sends in drawn]

    def waiting(self) -> Iterator[Client]:
        """The clients of this round that have not been heard of, until a signal comes."""
        for client, sends in self.drawn(self.state.server.round):
            if self.stop.is_set():
                return
            if sends and client.name not in self.arrivals:
                yield client

    def collect(self, client: Client) -> None:
        """Let a client train what it receives; store what it sends, or that it failed."""
        round_, name = self.state.server.round, client.name
        before, losses, steps = self.step, list[float](), [0]

        def log(line: dict[str, Any]) -> None:
            steps[0] += 1
            step = before + steps[0]
            if "loss" in line:
                losses.append(line["loss"])
            self.reporter.record(line | {"step": step, "round": round_, "client": name})
            self._move_bar(step, f"round {round_} {name} {line['stage']}", losses)

        assignment, received = self.assignment(client, round_), self.delivered(client)
        own = self.config_of(client, round_)
        run = self.make_run(client, own, round_)
        stages = (round_ - 1) * len(own.stages)
        try:
            work = client_update(
                run,
                assignment,
                received,
                self.pieces,
                self.roles,
                losses=self.config.federated.losses,
                place=(stages, self.training.index(client)),
                log=log,
            )
        except (TrainingError, BadSampleError) as error:
            arrival = Arrival(client=name, steps=steps[0], failed=str(error))
        else:
            who: dict[str, Any] = {"tasks": tasks_of(client), "modalities": modalities_of(client)}
            update = Update(
                client=name, round=round_, base=self.state.server.base(), values=work.values, counts=work.counts, **who
            )
            arrival = Arrival(client=name, steps=steps[0], update=update, kept=work.kept, loss=work.losses[-1])
        save_arrival(self.folder, round_, arrival)
        self.arrivals[name] = arrival
        self._print_arrival(arrival, losses)

    def finish_round(self) -> None:
        """Aggregate what has arrived, store the state, and write the global model as a checkpoint."""
        if self.stop.is_set():
            return
        arrivals = self.arrivals.values()
        updates = [arrival.update for arrival in arrivals if arrival.update is not None]
        server, report = aggregate(self.state.server, updates, self.roles, self.pieces)
        accepted = {a.client for a in arrivals if a.update is not None} - {name for name, _ in report.refused}
        kept = dict(self.state.kept)
        kept |= {a.client: {**kept.get(a.client, {}), **a.kept} for a in arrivals if a.kept and a.client in accepted}
        record = self.record(report, accepted)
        self.show(server.tensors)
        record |= self.validate()
        self.state = State(
            server=server, kept=kept, step=self.step, history=(*self.state.history, record | {"step": self.step})
        )
        self.arrivals = {}
        save_state(self.folder, self.state)
        self.reporter.record(self.state.history[-1])
        self.write_checkpoint()
        for line in lines_of(record, report):
            self.reporter.print(line)

    def record(self, report: RoundReport, accepted: Collection[str]) -> dict[str, Any]:
        """What is stored of a round, as JSON."""
        failed = {a.client: a.failed for a in self.arrivals.values() if a.failed}
        silent = [client.name for client, sends in self.drawn(report.round) if not sends]
        numbers = {piece.name: piece.numel for piece in self.pieces}
        sent = sum(
            numbers[name]
            for a in self.arrivals.values()
            if a.update is not None
            for name in a.update.values
            if name in numbers
        )
        kept = {role.name for role in self.roles if role.keep}
        received = sum(piece.numel for piece in self.pieces if piece.role not in kept)
        return {
            "stage": "server",
            "round": report.round,
            "rounds": self.config.federated.rounds,
            "clients": sorted(accepted),
            "dropouts": silent,
            "failed": failed,
            "refused": [list(row) for row in report.refused],
            "unmoved": [*report.unmoved],
            "bytes_up": ITEMSIZE * sent,
            "bytes_down": ITEMSIZE * received * len(self.drawn(report.round)),
            "moved": {" ".join(filter(None, key)): row.moved for key, row in report.roles.items()},
            "covariance": {
                " ".join(filter(None, key)): row.covariance
                for key, row in report.roles.items()
                if row.covariance is not None
            },
        }

    # What a client has ---------------------------------------------------------------------------------

    def config_of(self, client: Client, round_: int) -> RunConfig:
        """The settings of a client's own run in a round: its data, and its plan."""
        data = self.run.data
        own = {row.tag.source for row in client.train}
        sources = {name: source for name, source in data.sources.items() if name in own}
        stages = stages_of(self.config, round_, self.special[client.name])
        return replace(self.run, data=replace(data, sources=sources), stages=stages)

    def make_run(self, client: Client, config: RunConfig, round_: int) -> Run:
        mixture = client_mixture(client, self.sources, config.data.sources, config.seed)
        mixture.start = (round_ - 1) * config.train.batch_size * sum(s.steps for s in config.stages.values())
        return Run(
            config=config, accelerator=self.accelerator, model=self.model, mixture=mixture, validation={},
            collator=self.collator, reporter=self.quiet, layout=self.layout,
        )  # fmt: skip

    def assignment(self, client: Client, round_: int) -> Assignment:
        own = self.special.get(client.name, ClientConfig())  # none of one that never trains
        return assign(
            client,
            self.roles,
            self.pieces,
            trainable(self.model, self.run),
            routed=routed(self.model),
            factors=self.config.federated.factors,
            round_=round_,
            rank=own.rank,
            lacks=[] if own.experts is None else [n for n in self.model.bank.names if n not in own.experts],
        )

    def delivered(self, client: Client) -> dict[str, torch.Tensor]:
        """What a client begins with: the server's values for it, and those that never left it."""
        tasks = tasks_of(client)
        scopes = [f"{CLIENT}{client.name}", *([f"task:{tasks[0]}"] if len(tasks) == 1 else [])]
        tensors = deliver(self.state.server, self.roles, self.pieces, scopes)
        return join(self.pieces, self.state.kept.get(client.name, {}), tensors)

    # The run folder ------------------------------------------------------------------------------------

    def show(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Let the model have these values."""
        receive(self.model, self.run, tensors)

    def validate(self) -> dict[str, float]:
        """The losses of the model as it is on the validation sources, if there are any."""
        if not self.validation:
            return {}
        losses = validation_losses(
            self.model, self.validation, self.collator, self.accelerator, self.run, gates=lambda batch: None
        )
        return {key: value for key, value in losses.items() if np.isfinite(value)}

    def write_checkpoint(self) -> None:
        """The global model, as train.py leaves a run that is done."""
        counters: dict[str, Any] = {name: 0 for name in COUNTERS} | {"best": [], "skipped": {}}
        counters |= {"step": self.state.step, "stage": len(self.run.stages)}
        progress = counters | {"num_processes": 1, "distributed": "no", "scaler": None}
        save_checkpoint(self.folder, self.state.step, self.model, self.run, TrainState(progress=progress))
        prune(self.folder, self.run.train.keep_last)

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """The log is open inside; a round that was stored and not logged is logged."""
        total = self.state.step
        for round_ in range(self.state.server.round, self.config.federated.rounds + 1):
            own = [self.config_of(client, round_) for client, sends in self.drawn(round_) if sends]
            total += sum(stage.steps for config in own for stage in config.stages.values())
        self.reporter.start(self.step, total)
        try:
            last = self.state.history[-1:]
            if last and last[0] not in read_log(self.folder / LOG):
                self.reporter.record(last[0])
            yield
        finally:
            self.reporter.close()

    def _move_bar(self, step: int, text: str, losses: Sequence[float]) -> None:
        if self.reporter.bar is not None:
            loss = f"loss {losses[-1]:.3f}" if losses else ""
            self.reporter.bar.update(self.reporter.task, completed=step, description=text, loss=loss)

    def _print_arrival(self, arrival: Arrival, losses: Sequence[float]) -> None:
        round_, rounds = self.state.server.round, self.config.federated.rounds
        what = f"dropped out: {arrival.failed}"
        if arrival.update is not None:
            sent = ITEMSIZE * sum(value.numel() for value in arrival.update.values.values())
            what = f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {arrival.steps} steps, sends {sent:,} bytes"
        self.reporter.print(f"round {round_}/{rounds}  {arrival.client}  {what}")


def draw_clients(settings: FederatedConfig, seed: int, round_: int) -> list[tuple[int, bool]]:
    """The places of a round's clients by (seed, round) alone, without replacement; False where one sends nothing."""
    rng = np.random.default_rng([seed, round_])
    number = settings.partition.clients - settings.partition.held_out
    places = sorted(rng.choice(number, size=settings.drawn, replace=False).tolist())
    lost = rng.random(len(places)) < settings.dropout
    return [(place, not away) for place, away in zip(places, lost.tolist(), strict=True)]


def routed(model: MixtureModel) -> set[str]:
    return {n for n, gate in zip(model.bank.names, model.routing.roles.gates, strict=True) if gate == "routed"}


def lines_of(record: Mapping[str, Any], report: RoundReport) -> Iterator[str]:
    """What is printed of a round."""
    head = f"round {record['round']}/{record['rounds']}"
    lost = len(record["dropouts"]) + len(record["failed"])
    dropped = f", {lost} dropped out" if lost else ""
    loss = f", validation {record['validation']:.4f}" if "validation" in record else ""
    up, down = record["bytes_up"], record["bytes_down"]
    yield f"{head}  {len(record['clients'])} updates{dropped}, {up:,} bytes up, {down:,} down{loss}"
    for client, reason in report.refused:
        yield f"{head}  refused: {client}: {reason}"
    if report.unmoved:
        yield f"{head}  unchanged, because nobody trained it: {', '.join(report.unmoved)}"


# Opening ----------------------------------------------------------------------------------------------


def open_federation(
    config: FederateConfig, accelerator: Any, *, resume: bool = False, overwrite: bool = False
) -> Federation:
    """A federation at its start, or where it was killed (`resume`, and there is one).

    ValueError for a folder that holds a run, another config or data, roles that do not fit the model, a client without
    data, and an expert without an owner. Nothing of an old run is removed until all is checked.
    """
    if accelerator.num_processes > 1:
        raise ValueError(f"federate.py trains its clients in one process, got {accelerator.num_processes}")
    for name in config.federated.losses:
        if name not in TERMS:
            raise ValueError(f"federated.losses.{name}: no such term; choices: {', '.join(TERMS)}")
    folder = Path(config.out)
    before = load(FederateConfig, folder / SETTINGS) if resume and (folder / SETTINGS).is_file() else None
    run = settled(config.run()) if before is None else filled(config.run(), load_config(folder / CONFIG))
    found = claim(run, resume=resume, overwrite=overwrite)
    if before is not None:
        same_settings(config, before, folder)
    elif found:
        raise ValueError(f"--resume: out={folder} holds a run of train.py; choose another out=")
    torch.manual_seed(run.seed)
    model = build_model(run, to_train=True)
    place(accelerator, model)
    ocr = open_ocr(run.data)
    mixture = open_mixture(run, ocr)
    tags, skipped = read_tags(mixture.sources, run.data.on_bad_sample)
    experts = owned_experts(model, run, tags)
    try:
        clients = make_clients(tags, config.federated.partition.recipe(), run.seed, experts)
    except ValueError as error:
        raise ValueError(f"federated.partition: {error}") from None
    roles, pieces = table_of(config, model, run)
    check_evaluation(run)
    state = load_state(folder) if before is not None else None
    start = {key: tensor.cpu().clone() for key, tensor in tensors_of(model, run).items()}
    federation = Federation(
        config=config, run=run, accelerator=accelerator, model=model, sources=mixture.sources, roles=roles,
        validation=open_sources(run.data.validation.values(), run.data, ocr), clients=clients, pieces=pieces,
        collator=make_collator(run, model.backbone.intake, pack_length=run.train.pack_length),
        layout=make_layout(run.train, 1), reporter=Reporter(run, accelerator), quiet=Reporter(run, accelerator),
        special=special(config.federated, [client.name for client in clients if not client.held_out]),
        state=state or State(server=Server(round=1, tensors=start)),
    )  # fmt: skip
    federation.quiet.console.quiet = True
    check_plans(federation)
    if run.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    data = digest_sources(mixture.sources, run.data)
    if before is None:  # what a start left that was killed before its first round
        shutil.rmtree(folder / SERVER, ignore_errors=True)
    elif found is None:
        same_data(folder, data)
    begin(run, data, found, clear=overwrite and not resume)
    write_file(folder / SETTINGS, to_yaml(replace(config, root=config.root or str(Path.cwd()))))
    federation.reporter.print(print_partition(clients, len(tags) + skipped))
    federation.reporter.print("\n" + table_of_roles(federation))
    take_up(federation)
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
    for client in federation.training:
        own = federation.special[client.name].experts
        for name in own or ():
            if name not in federation.model.bank.names:
                choices = ", ".join(federation.model.bank.names)
                raise ValueError(f"federated.clients.{client.name}.experts: no expert {name!r}; choices: {choices}")
        if own is not None and federation.run.router.granularity == "token":
            raise ValueError(f"federated.clients.{client.name}.experts: needs router.granularity=sample")
        federation.config_of(client, 1)
        try:
            federation.assignment(client, 1)
        except ValueError as error:
            raise ValueError(f"federated: {error}") from None


def same_settings(config: FederateConfig, before: FederateConfig, folder: Path) -> None:
    """ValueError naming the settings of the federation in which a resumed one differs; train.py names the run's."""
    now, then = (flatten(as_mapping(c.federated), "federated.") for c in (config, before))
    free = ("federated.num_questions",)
    different = [
        f"{key} was {then.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != then.get(key) and key not in free
    ]
    if different:
        raise ValueError(f"--resume: {folder / SETTINGS} differs: {'; '.join(different)}. {WAY_OUT}")


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
    return [name for name in model.bank.names if name in routed(model) and not config.experts[name].frozen]


def table_of(config: FederateConfig, model: MixtureModel, run: RunConfig) -> tuple[list[Role], list[Piece]]:
    """Roles and pieces; ValueError for elements in none or two, and for a rule that a role cannot have."""
    experts = [name for name in model.bank.names if not config.experts[name].frozen]
    roles = make_roles(config.federated.roles, experts)
    for role in roles:
        if role.scope == "per_group":
            raise ValueError(f"federated.roles.{role.name}.scope: per_group needs groups, which nothing here makes")
        if role.elsewhere == "absent" and run.router.granularity == "token":
            raise ValueError(f"federated.roles.{role.name}.elsewhere: absent needs router.granularity=sample")
    state = {key if key.startswith("router.") else f"router.{key}" for key in PARTS["router"].state(model)}
    if lost := sorted(state - tensors_of(model, run).keys()):
        raise ValueError(f"{lost[0]}: learns without a gradient, and a federation does not send it")
    names = Names(choices=tuple(config.choices), evidence=tuple(model.routing.evidence))
    try:
        pieces = pieces_of(trainable(model, run), roles, names)
        check_roles(roles, pieces)
    except ValueError as error:
        raise ValueError(f"federated.{error}") from None
    return roles, pieces


def table_of_roles(federation: Federation) -> str:
    """The table that is printed before the first round: what leaves a client, in bytes, and who sends it."""
    senders: dict[str, list[str]] = {role.name: [] for role in federation.roles}
    for client in federation.training:
        for role in federation.assignment(client, 1).sends:
            senders[role.name].append(client.name)
    everyone = len(federation.training)
    senders = {name: own if len(own) < everyone else [f"all {everyone}"] for name, own in senders.items()}
    return print_roles(federation.pieces, federation.roles, ITEMSIZE, senders)
