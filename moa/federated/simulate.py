"""A federation in one process: the clients of a round train one after the other, then the server aggregates.

A run is a function of its config. What a client trains is drawn from (seed, round, client), so a federation that was
killed between any two updates goes on to the same values.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.checks import BadSampleError
from data.collate import Collator
from data.mixture import Source
from moa.analysis.plots import read_log
from moa.checkpoint import TrainState, prune, save_checkpoint
from moa.config import RunConfig
from moa.federated.aggregate import CLIENT, RoundReport, Update, aggregate, deliver
from moa.federated.assignment import Assignment, assign, modalities_of, tasks_of
from moa.federated.client import (
    OWN_VARIATE,
    SERVER_VARIATE,
    client_mixture,
    client_update,
    learning,
    receive,
    routed,
    trainable,
    with_variates,
)
from moa.federated.config import ClientConfig, FederateConfig, FederatedConfig, stages_of
from moa.federated.groups import EVIDENCE, Groups, Member, alone, mean_evidence, regroup, roles_of
from moa.federated.partition import Client
from moa.federated.pieces import Piece, Role, join
from moa.federated.privacy import Privacy, spent
from moa.federated.store import Arrival, State, StoredUpdates, save_arrival, save_state, secret_seed
from moa.model import MixtureModel
from moa.routing.router import AnchorRouter
from moa.sections import StageConfig
from moa.training.batches import Layout, TrainingError
from moa.training.report import LOG, Reporter
from moa.training.run import COUNTERS, Run
from moa.training.signals import StopRequest
from moa.training.validation import validation_losses

ITEMSIZE = 4  # bytes of a number that is sent: float32


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """What a client receives to train a round."""

    client: str
    place: int  # among the clients that train
    round: int
    base: str  # of the server's state
    tensors: Mapping[str, torch.Tensor]
    member: Member = Member()


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
    grouped: Sequence[str] = ()  # experts of groups that are computed; a client without a group trains the first
    slot: Mapping[str, torch.Tensor] = field(default_factory=dict)  # that one's values at the start
    measure: Callable[["Federation"], dict[str, Any]] | None = None  # scores when data sources come or go
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
        settings = self.config.federated
        drawn = draw_clients(settings, self.run.seed if settings.privacy.clip is None else self.secret, round_)
        here = ((self.at(self.training[place], round_), sends) for place, sends in drawn)
        return [(client, sends) for client, sends in here if client.train]

    def at(self, client: Client, round_: int) -> Client:
        """The client with the samples that it has in a round."""
        settings = self.config.federated
        if not (settings.arrives or settings.leaves):
            return client
        return replace(client, train=tuple(row for row in client.train if settings.present(row.tag.source, round_)))

    def seen(self, round_: int) -> list[Client]:
        """The clients that train, with the samples that they have had up to a round."""
        first = self.config.federated.arrives
        return [
            replace(c, train=tuple(row for row in c.train if first.get(row.tag.source, 1) <= round_))
            for c in self.training
        ]

    @property
    def phase_ends(self) -> bool:
        """Whether clients have other data sources in the round that comes, and it is not the first."""
        settings, now = self.config.federated, self.state.server.round
        if not 1 < now <= settings.rounds:
            return False
        return any(settings.present(name, now) != settings.present(name, now - 1) for name in self.run.data.sources)

    def waiting(self) -> Iterator[Client]:
        """The clients of this round that have not been heard of, until a signal comes."""
        for client, sends in self.drawn(self.state.server.round):
            if self.stop.is_set():
                return
            if sends and client.name not in self.arrivals:
                yield client

    def train_here(self, clients: Iterable[Client]) -> Iterator[Arrival]:
        """Let the clients train in this process, one after the other."""
        for client in clients:
            delivery = self.delivery(client)
            yield self.train(client, delivery, partial(self._log_step, delivery, self.step))

    def store(self, arrival: Arrival) -> None:
        """Store what a client has sent, or that it failed."""
        arrival = save_arrival(self.folder, self.state.server.round, arrival)
        self.arrivals[arrival.client] = arrival
        self._print_arrival(arrival)

    def finish_round(self) -> None:
        """Aggregate what has arrived, store the state, and write the global model as a checkpoint."""
        if self.stop.is_set():
            return
        arrivals = [self.arrivals[name] for name in sorted(self.arrivals)]  # however they came
        sent = [arrival.client for arrival in arrivals if arrival.update is not None]
        updates = StoredUpdates(run=self.folder, round=self.state.server.round, clients=sent)
        grouped, groups, lost = self.regrouped(updates)
        how: dict[str, Any] = {"screen": self.config.federated.screen, "private": self.private(updates.round)}
        server, report = aggregate(self.state.server, grouped, self.roles, self.pieces, **how)
        report = replace(report, refused=(*lost, *report.refused))
        accepted = {*sent} - {name for name, _ in report.refused}
        kept = dict(self.state.kept)
        kept |= {a.client: {**kept.get(a.client, {}), **a.kept} for a in arrivals if a.kept and a.client in accepted}
        record = self.record(report, accepted)
        if groups.of != self.state.groups.of:
            record["groups"] = {name: sorted(c for c, own in groups.of.items() if own == name) for name in self.grouped}
        self.show(server.tensors)
        record |= self.validate()
        history = (*self.state.history, record | {"step": self.step})
        self.state = State(server=server, kept=kept, groups=groups, step=self.step, history=history)
        if self.measure is not None and self.phase_ends:
            history = (*history[:-1], history[-1] | {"phase": self.measure(self)})
            self.state = replace(self.state, history=history)
        self.arrivals = {}
        save_state(self.folder, self.state)
        self.reporter.record(self.state.history[-1])
        self.write_checkpoint()
        for line in lines_of(record, report):
            self.reporter.print(line)

    @cached_property
    def secret(self) -> int:
        """Of a private federation, the seed of its draws of clients and of its noise, which only the server has."""
        return secret_seed(self.folder)

    def private(self, round_: int) -> Privacy | None:
        """Clipping and noise of a round; a constant for each piece, however many clients have sent it."""
        settings = self.config.federated
        if settings.privacy.clip is None or settings.privacy.noise is None:
            return None
        expected: Counter[str] = Counter()
        for client in self.training:
            own = self.assignment(client, round_)
            sent = {role.name for role in own.sends}
            expected.update(p.name for p in self.pieces if p.role in sent and bool(p.of(own.free).any()))
        sums = {p.name for p in self.pieces for role in self.roles if role.name == p.role and role.rule == "sum"}
        share = {name: 1.0 if name in sums else settings.participation * n for name, n in expected.items()}
        rng = np.random.default_rng([self.secret, round_, 1])
        return Privacy(clip=settings.privacy.clip, noise=settings.privacy.noise, expected=share, rng=rng)

    def record(self, report: RoundReport, accepted: Collection[str]) -> dict[str, Any]:
        """What is stored of a round, as JSON."""
        failed = {a.client: a.failed for a in self.arrivals.values() if a.failed}
        silent = [client.name for client, sends in self.drawn(report.round) if not sends]
        updates = [arrival.update for arrival in self.arrivals.values() if arrival.update is not None]
        sent = sum(value.numel() for update in updates for value in update.values.values())
        kept = {role.name for role in self.roles if role.keep}
        received = sum(piece.numel for piece in self.pieces if piece.role not in kept)
        received += sum(variate.numel() for variate in self.variates().values())
        settings = self.config.federated
        noise, delta = settings.privacy.noise, settings.privacy.delta
        privacy = {} if noise is None else {"epsilon": spent(noise, settings.participation, report.round, delta)}
        return {
            **privacy,
            "stage": "server",
            "round": report.round,
            "rounds": settings.rounds,
            "clients": sorted(accepted),
            "dropouts": silent,
            "failed": failed,
            "refused": [list(row) for row in report.refused],
            "unmoved": [*report.unmoved],
            "bytes_up": ITEMSIZE * sent,
            "bytes_down": ITEMSIZE * received * len(self.drawn(report.round)),
            **({"transfers": report.transfers} if report.transfers else {}),
            **{
                fact: {
                    " ".join(filter(None, key)): value
                    for key, row in report.roles.items()
                    if (value := getattr(row, fact)) is not None
                }
                for fact in ("moved", "covariance", "lost")
            },
        }

    # What a client has ---------------------------------------------------------------------------------

    def member(self, client: Client, *, trains: bool = False) -> Member:
        """The client's group; where it has none yet and `trains`, it has the slot of all experts of groups."""
        if not self.grouped:
            return Member(group=self.special.get(client.name, ClientConfig()).group or "")
        group = self.state.groups.of.get(client.name, "")
        if trains and (not group or self.has_news(client)):
            return Member(first=True, lacks=frozenset(self.grouped[1:]))
        return Member(group=group, lacks=self.idle)

    def has_news(self, client: Client) -> bool:
        """Whether a client has other data sources than when it got its group."""
        rounds = self.state.groups.since[client.name], self.state.server.round
        own = next(c for c in self.training if c.name == client.name)
        before, now = ({row.tag.source for row in self.at(own, round_).train} for round_ in rounds)
        return before != now

    @property
    def idle(self) -> frozenset[str]:
        """Experts of groups that no group has, once there are groups."""
        centres = self.state.groups.centres if self.grouped else {}
        return frozenset(self.grouped).difference(centres) if centres else frozenset()  # minus dict keys is a set

    def evidence_sums(self) -> AnchorRouter:
        """Sums of the evidence of a client's samples, none so far."""
        kinds, dims = self.model.routing.evidence, self.model.backbone.dims
        return AnchorRouter(experts=1, evidence=kinds, dims=dims, num_tasks=len(self.run.data.tasks))

    def regrouped(self, updates: Iterable[Update]) -> tuple[Iterable[Update], Groups, list[tuple[str, str]]]:
        """The updates with those of clients without a group as their groups', the groups, and who was refused."""
        settings, groups = self.config.federated.groups, self.state.groups
        if settings.by is None:
            return updates, groups, []
        updates = list(updates)
        new = [client.name for client in self.training if self.member(client, trains=True).first]
        options: dict[str, Any] = {"by": settings.by, "how": settings.how, "experts": self.grouped}
        options["likeness"] = -1 if settings.likeness is None else settings.likeness
        return regroup(self.state.server, updates, new, groups, self.roles, self.pieces, **options)

    def config_of(self, client: Client, round_: int, *, first: bool = False) -> RunConfig:
        """The settings of a client's own run in a round, `first` without a group: its data, and its plan."""
        data = self.run.data
        own = {row.tag.source for row in self.at(client, round_).train}
        sources = {name: source for name, source in data.sources.items() if name in own}
        stages = stages_of(self.config, round_, self.special[client.name], first=first)
        return replace(self.run, data=replace(data, sources=sources), stages=stages)

    def earlier(self, client: Client, round_: int) -> list[StageConfig]:
        """The stages of a client before a round, if it was drawn in all of them."""
        own = self.special[client.name]
        return [s for number in range(1, round_) for s in stages_of(self.config, number, own).values()]

    def make_run(self, client: Client, config: RunConfig, round_: int) -> Run:
        mixture = client_mixture(client, self.sources, config.data.sources, config.seed)
        mixture.start = config.train.batch_size * sum(stage.steps for stage in self.earlier(client, round_))
        return Run(
            config=config, accelerator=self.accelerator, model=self.model, mixture=mixture, validation={},
            collator=self.collator, reporter=self.quiet, layout=self.layout,
        )  # fmt: skip

    def train(self, client: Client, delivery: Delivery, log: Callable[[dict[str, Any], int], None]) -> Arrival:
        """Train what a client receives, and return what it sends, or why it failed; `log` gets each step's line."""
        round_, steps = delivery.round, 0
        client = self.at(client, round_)

        def counted(line: dict[str, Any]) -> None:
            nonlocal steps
            steps += 1
            log(line, steps)

        member, sums = delivery.member, None
        own = self.config_of(client, round_, first=member.first)
        if member.first and self.config.federated.groups.by == "evidence":
            sums = self.evidence_sums().to(self.accelerator.device)
        try:
            work = client_update(
                self.make_run(member.rows_of(client, self.grouped), own, round_),
                self.assignment(client, round_, member),
                delivery.tensors,
                self.pieces,
                self.roles,
                losses=self.config.federated.losses,
                place=(len(self.earlier(client, round_)), delivery.place),
                log=counted,
                evidence=sums,
            )
        except (TrainingError, BadSampleError) as error:
            return Arrival(client=client.name, steps=steps, failed=str(error))
        if sums is not None:
            work.values[EVIDENCE] = mean_evidence(sums)
        who: dict[str, Any] = {"tasks": tasks_of(client), "modalities": modalities_of(client), "group": member.group}
        who |= {"client": client.name, "round": round_, "base": delivery.base}
        update = Update(values=work.values, counts=work.counts, **who)
        ends = work.losses[0], work.losses[-1]
        return Arrival(client=client.name, steps=steps, update=update, kept=work.kept, losses=ends)

    def assignment(self, client: Client, round_: int, member: Member | None = None) -> Assignment:
        own = self.special.get(client.name, ClientConfig())  # none of one that never trains
        member = member or self.member(client)
        found = assign(
            member.rows_of(self.at(client, round_), self.grouped),
            self.roles,
            self.pieces,
            trainable(self.model, self.run),
            routed=routed(self.model),
            factors=self.config.federated.factors,
            round_=round_,
            rank=own.rank,
            learning=learning(self.model, self.config_of(client, round_)) if client.name in self.special else None,
            lacks=member.lacks if own.experts is None else [n for n in self.model.bank.names if n not in own.experts],
        )
        return alone(found, self.pieces, roles_of(self.grouped[0], self.roles, self.pieces)) if member.first else found

    def delivery(self, client: Client) -> Delivery:
        """What the server sends to a client in the round under way."""
        server, place = self.state.server, [own.name for own in self.training].index(client.name)
        base, tensors, member = server.base(), self.delivered(client), self.member(client, trains=True)
        tensors |= self.slot if member.first else {}
        own = self.state.kept.get(client.name, {})
        tensors |= self.variates() | {name: value for name, value in own.items() if name.startswith(OWN_VARIATE)}
        return Delivery(client=client.name, place=place, round=server.round, base=base, tensors=tensors, member=member)

    def variates(self) -> dict[str, torch.Tensor]:
        """The server's control variates, which every client receives; none before a round."""
        state = self.state.server.state
        names = [piece.name for piece in with_variates(self.roles, self.pieces) if f"/{piece.name}" in state]
        return {f"{SERVER_VARIATE}{name}": state[f"/{name}"]["c"] for name in names}

    def delivered(self, client: Client) -> dict[str, torch.Tensor]:
        """What a client begins with: the server's values for it, and those that never left it."""
        tasks, group = tasks_of(client), self.member(client).group
        scopes = [f"{CLIENT}{client.name}", *([f"task:{tasks[0]}"] if len(tasks) == 1 else [])]
        scopes += [f"group:{group}"] if group else []
        tensors = deliver(self.state.server, self.roles, self.pieces, scopes)
        return join(self.pieces, self.state.kept.get(client.name, {}), tensors)

    # The run folder ------------------------------------------------------------------------------------

    def show(self, tensors: Mapping[str, torch.Tensor], above: Sequence[Piece] = ()) -> None:
        """Let the model have these values, without the ranks `above` those of a client."""
        receive(self.model, self.run, tensors, above)

    def validate(self) -> dict[str, float]:
        """The losses of the model as it is on the validation sources, if there are any."""
        if not self.validation:
            return {}
        place = self.model, self.validation, self.collator, self.accelerator, self.run
        losses = validation_losses(*place, gates=lambda batch: None)
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
            now = round_ == self.state.server.round
            drawn = [client for client, sends in self.drawn(round_) if sends]
            own = [self.config_of(c, round_, first=now and self.member(c, trains=True).first) for c in drawn]
            total += sum(stage.steps for config in own for stage in config.stages.values())
        self.reporter.start(self.step, total)
        try:
            last = self.state.history[-1:]
            if last and last[0] not in read_log(self.folder / LOG):
                self.reporter.record(last[0])
            yield
        finally:
            self.reporter.close()

    def _log_step(self, delivery: Delivery, before: int, line: dict[str, Any], steps: int) -> None:
        step, who = before + steps, {"round": delivery.round, "client": delivery.client}
        self.reporter.record(line | {"step": step} | who)
        if self.reporter.bar is not None:
            text = f"round {delivery.round} {delivery.client} {line['stage']}"
            loss = f"loss {line['loss']:.3f}" if "loss" in line else ""
            self.reporter.bar.update(self.reporter.task, completed=step, description=text, loss=loss)

    def _print_arrival(self, arrival: Arrival) -> None:
        round_, rounds = self.state.server.round, self.config.federated.rounds
        what = f"dropped out: {arrival.failed}"
        if arrival.update is not None:
            sent = ITEMSIZE * sum(value.numel() for value in arrival.update.values.values())
            first, last = arrival.losses
            what = f"loss {first:.3f} -> {last:.3f} in {arrival.steps} steps, sends {sent:,} bytes"
        self.reporter.print(f"round {round_}/{rounds}  {arrival.client}  {what}")


# Sends to the clients of a round what they train, and returns what arrives, in any order.
Ask = Callable[[Iterable[Client]], Iterator[Arrival]]


def federate(federation: Federation, ask: Ask | None = None) -> None:
    """All rounds, or what is left of them, until they are done or a signal comes; without `ask` clients train here."""
    with federation.reporting():
        while not federation.done and not federation.stop.is_set():
            # deliver -> the client's stages by train_step -> its update, stored
            for arrival in (ask or federation.train_here)(federation.waiting()):
                federation.store(arrival)
            # aggregate -> validate -> state and checkpoint, stored
            federation.finish_round()


def draw_clients(settings: FederatedConfig, seed: int, round_: int) -> list[tuple[int, bool]]:
    """A round's clients by (seed, round), False where one sends nothing; with privacy each by a draw of its own."""
    rng = np.random.default_rng([seed, round_])
    number = settings.partition.clients - settings.partition.held_out
    if settings.privacy.clip is None:
        places = sorted(rng.choice(number, size=settings.drawn, replace=False).tolist())
    else:
        places = np.flatnonzero(rng.random(number) < settings.participation).tolist()
    lost = rng.random(len(places)) < settings.dropout
    return [(place, not away) for place, away in zip(places, lost.tolist(), strict=True)]


def lines_of(record: Mapping[str, Any], report: RoundReport) -> Iterator[str]:
    head = f"round {record['round']}/{record['rounds']}"
    lost = len(record["dropouts"]) + len(record["failed"])
    dropped = f", {lost} dropped out" if lost else ""
    loss = f", validation {record['validation']:.4f}" if "validation" in record else ""
    up, down = record["bytes_up"], record["bytes_down"]
    epsilon = f", epsilon {record['epsilon']:.2f} so far" if "epsilon" in record else ""
    yield f"{head}  {len(record['clients'])} updates{dropped}, {up:,} bytes up, {down:,} down{loss}{epsilon}"
    for client, reason in report.refused:
        yield f"{head}  refused: {client}: {reason}"
    for group, clients in record.get("groups", {}).items():
        yield f"{head}  group of the expert {group}: {', '.join(clients) or 'nobody; the clients lack this expert'}"
    if report.unmoved:
        yield f"{head}  unchanged, because nobody trained it, or fewer than its rule needs: {', '.join(report.unmoved)}"
