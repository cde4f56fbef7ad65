"""A federation in one process: the clients of a round train one after the other, then the server aggregates.

A run is a function of its config. What a client trains is drawn from (seed, round, client), so a federation that was
killed between any two updates goes on to the same values.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from moa.federated.client import client_mixture, client_update, receive, trainable
from moa.federated.config import ClientConfig, FederateConfig, FederatedConfig, stages_of
from moa.federated.partition import Client
from moa.federated.pieces import Piece, Role, join
from moa.federated.store import (
    Arrival,
    State,
    save_arrival,
    save_state,
)
from moa.model import MixtureModel
from moa.training.batches import Layout, TrainingError
from moa.training.report import LOG, Reporter
from moa.training.run import COUNTERS, Run
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

    def show(self, tensors: Mapping[str, torch.Tensor], above: Sequence[Piece] = ()) -> None:
        """Let the model have these values, without the ranks `above` those of a client."""
        receive(self.model, self.run, tensors, above)

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
        yield f"{head}  unchanged, because nobody trained it, or fewer than its rule needs: {', '.join(report.unmoved)}"
