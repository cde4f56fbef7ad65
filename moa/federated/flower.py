"""The federation of federate.py over Flower: each client is a SuperNode, the server is a ServerApp.

    server                                          node, which is one client
    query: its settings                        ->   model and data are opened
    the partition, by counts                   <-   samples by source, task, expert and modalities
    train: round, base, tensors                ->   Federation.train, as in one process
    stored, then aggregated                    <-   values of the roles that it sends, counts, or why it failed

Flower carries messages; rounds, rules, refusals and the state are those of simulate.py.
A node runs every message in a process of its own, so what lasts is on its disk: roles that it keeps, and its log.
"""

import json
import shlex
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from moa.build import settled
from moa.checkpoint import load_tensors, save_tensors
from moa.cli.settings import as_mapping, load
from moa.config import RunConfig
from moa.federated.aggregate import Update, digest_of
from moa.federated.client import OWN_VARIATE, with_variates
from moa.federated.config import FederateConfig
from moa.federated.groups import Member
from moa.federated.matrix import report
from moa.federated.partition import Client, Row, Tag, client_name
from moa.federated.pieces import join
from moa.federated.simulate import Delivery, Federation, federate
from moa.federated.start import differences, make_federation, open_federation
from moa.federated.store import KEPT, Arrival, apart, joined, round_name
from moa.files.atomic import atomic_folder, remove_folder, write_file
from moa.training.report import LOG
from moa.training.setup import make_accelerator
from moa.training.trackers import flatten

POLL = 1.0  # seconds between two looks for answers
ORDER, TENSORS, COUNTS, PARTITION = "order", "tensors", "counts", "partition"  # records of a message
# Settings that a node has of its own.
FREE = ("out", "root", "logging", "eval", "data.sources", "data.validation", "data.ocr_cache", "data.ocr_engine",
        "data.num_workers", "model.name", "train.gradient_checkpointing", "federated.num_questions")  # fmt: skip

DELIVERY = ("client", "place", "round", "base")  # fields of a `Delivery` as they are
SENT = ("round", "base", "group")  # those of an `Update`

client_app, server_app = ClientApp(), ServerApp()


# Records ----------------------------------------------------------------------------------------------


def pack(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as Flower carries them, by NAME|TYPE: numpy has no bfloat16, whose bits go as int16."""
    values = {f"{name}|{tensor.dtype}": tensor.detach().cpu() for name, tensor in tensors.items()}
    bits = {k: value.view(torch.int16) if value.dtype == torch.bfloat16 else value for k, value in values.items()}
    return ArrayRecord({key: Array(value.contiguous().numpy()) for key, value in bits.items()})


def unpack(record: ArrayRecord) -> dict[str, Tensor]:
    found = {}
    for key, array in record.items():
        name, _, kind = key.rpartition("|")
        value = torch.from_numpy(array.numpy().copy())
        found[name] = value.view(torch.bfloat16) if kind == str(torch.bfloat16) else value
    return found


def partition_of(client: Client) -> list[list[Any]]:
    """What a server learns of a client's samples before the first round: their number of each kind."""
    found: Counter[tuple[Any, ...]] = Counter()
    for side, rows in (("train", client.train), ("test", client.test)):
        for row in rows:
            tag, has = row.tag, (tuple(sorted(row.tag.modalities)), tuple(sorted(row.hidden)))
            found[side, tag.source, tag.task, tag.expert or "", *has] += 1
    return [[*kind, number] for kind, number in sorted(found.items())]


def client_of(name: str, kinds: Iterable[Iterable[Any]]) -> Client:
    """A client of as many samples of each kind; the samples themselves are at its node."""
    sides: dict[str, list[Row]] = {"train": [], "test": []}
    for side, source, task, expert, modalities, hidden, number in kinds:
        tag = Tag(source=source, index=0, image="", task=task, expert=expert or None, modalities=frozenset(modalities))
        sides[side] += [Row(tag=tag, hidden=frozenset(hidden))] * number
    return Client(name=name, train=tuple(sides["train"]), test=tuple(sides["test"]))


def load_settings(given: Mapping[str, Any]) -> FederateConfig:
    """The files of `config` and the key=value of `settings`, as after federate.py --config."""
    files, overrides = (shlex.split(str(given.get(key, ""))) for key in ("config", "settings"))
    return load(FederateConfig, files, overrides)


def settings_of(config: FederateConfig, run: RunConfig) -> dict[str, Any]:
    """All settings, flat; `run` has the fingerprint of the base."""
    return flatten(as_mapping(run)) | flatten(as_mapping(config.federated), "federated.")


# A node -----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Node:
    federation: Federation
    client: Client

    @property
    def folder(self) -> Path:
        return Path(self.federation.config.out) / "nodes" / self.client.name

    def check_settings(self, order: Mapping[str, Any]) -> None:
        """ValueError naming the settings in which the server's differ."""
        own = settings_of(self.federation.config, self.federation.run)
        if different := differences(json.loads(order["settings"]), own, FREE):
            raise ValueError(f"{self.client.name}: the server has other settings: {different}")

    def train(self, order: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Arrival:
        """Train as asked; what is kept, and the log, are written to the folder of the round."""
        last, round_ = order["kept"], order["round"]
        kept = load_tensors(self.folder / round_name(last) / KEPT) if last else {}
        received = join(self.federation.pieces, kept, tensors)
        received |= {name: value for name, value in kept.items() if name.startswith(OWN_VARIATE)}
        member = Member(group=order["group"], first=order["first"], lacks=frozenset(order["lacks"]))
        delivery = Delivery(tensors=received, member=member, **{key: order[key] for key in DELIVERY})
        lines: list[str] = []
        arrival = self.federation.train(
            self.client, delivery, lambda line, steps: lines.append(json.dumps(line | {"round": round_}) + "\n")
        )
        with atomic_folder(self.folder / round_name(round_)) as folder:
            save_tensors(folder / KEPT, kept | dict(arrival.kept))
            write_file(folder / LOG, "".join(lines))
        for old in self.folder.glob("round-*"):  # the server may ask again after a kill, from `last`
            if old.name not in (round_name(last), round_name(round_)):
                remove_folder(old)
        return arrival


def open_node(context: Context) -> Node:
    """The client that a SuperNode is, by its --node-config."""
    given = context.node_config
    if missing := [key for key in ("client", "config") if key not in given]:
        raise ValueError(f"--node-config: {', '.join(missing)} is missing: docs/federated.md")
    config = load_settings(given)
    config = replace(config, data=replace(config.data, validation={}))
    federation = make_federation(config, settled(config.run()), make_accelerator(config))
    clients = {client.name: client for client in federation.training}
    if given["client"] not in clients:
        raise ValueError(f"--node-config client={given['client']}: no such client; choices: {', '.join(clients)}")
    return Node(federation=federation, client=clients[str(given["client"])])


def order_of(message: Message) -> dict[str, Any]:
    return dict(message.content.config_records[ORDER])


@client_app.query()
def answer_query(message: Message, context: Context) -> Message:
    node = open_node(context)
    node.check_settings(order_of(message))
    record = {"client": node.client.name, "kinds": json.dumps(partition_of(node.client))}
    return Message(RecordDict({PARTITION: ConfigRecord(record)}), reply_to=message)


@client_app.train()
def answer_train(message: Message, context: Context) -> Message:
    node, order = open_node(context), order_of(message)
    node.check_settings(order)
    if order["client"] != node.client.name:
        raise ValueError(f"asked for {order['client']}, and this node is {node.client.name}")
    arrival = node.train(order, unpack(message.content.array_records[TENSORS]))
    return Message(content_of(arrival), reply_to=message)


def content_of(arrival: Arrival) -> RecordDict:
    """What a node sends: nothing else leaves it."""
    record: dict[str, Any] = {"client": arrival.client, "steps": arrival.steps, "failed": arrival.failed}
    update = arrival.update
    if update is None:
        return RecordDict({ORDER: ConfigRecord(record)})
    record |= {"losses": [*arrival.losses]} | {key: getattr(update, key) for key in SENT}
    record |= {"tasks": [*update.tasks], "modalities": [*update.modalities], "digest": digest_of(update.values)}
    counts: Any = joined(update.counts)  # type: ignore[arg-type]
    return RecordDict({ORDER: ConfigRecord(record), TENSORS: pack(update.values), COUNTS: MetricRecord(counts)})


# The server -------------------------------------------------------------------------------------------


def arrival_of(content: RecordDict, client: str) -> Arrival:
    """What a node has sent; `aggregate` looks at whether it is what was asked for."""
    try:
        record: Any = content.config_records[ORDER]
        if record["client"] != client:
            return Arrival(client=client, steps=0, failed=f"{record['client']} answered in its place")
        if record["failed"]:
            return Arrival(client=client, steps=record["steps"], failed=record["failed"])
        lists: dict[str, Any] = {key: tuple(record[key]) for key in ("tasks", "modalities")}
        counts: Any = apart(content.metric_records[COUNTS])  # type: ignore[arg-type]
        own = {key: record[key] for key in (*SENT, "digest")}
        update = Update(client=client, values=unpack(content.array_records[TENSORS]), counts=counts, **own, **lists)
        return Arrival(client=client, steps=record["steps"], update=update, losses=tuple(record["losses"]))
    except (KeyError, ValueError, TypeError) as error:
        return Arrival(client=client, steps=0, failed=f"torn: {error!r}")


@dataclass(kw_only=True)
class Fleet:
    grid: Grid
    settings: str
    deadline: float  # seconds until a client that was asked is a dropout
    clients: dict[str, Client] = field(default_factory=dict)
    nodes: dict[str, int] = field(default_factory=dict)  # by client
    asked: set[int] = field(default_factory=set)  # nodes

    def exchange(self, messages: Mapping[str, Message], seconds: float) -> Iterator[tuple[str, Message | None]]:
        """Send each, and return the answers as they come; None where none came in time."""
        ids = self.grid.push_messages([*messages.values()])
        waiting = {key: name for key, name in zip(ids, messages, strict=False) if key}
        lost, until = [name for name in messages if name not in waiting.values()], time.monotonic() + seconds
        while waiting and time.monotonic() < until:
            for reply in self.grid.pull_messages([*waiting]):
                yield waiting.pop(reply.metadata.reply_to_message_id), reply
            time.sleep(POLL if waiting else 0)
        yield from ((name, None) for name in (*lost, *waiting.values()))

    def meet(self, seconds: float) -> list[str]:
        """Ask every node that was not asked yet which client it is; return why nodes cannot take part."""
        alive, problems = {*self.grid.get_node_ids()}, []
        content = RecordDict({ORDER: ConfigRecord({"settings": self.settings})})
        messages = {str(node): Message(content, node, "query") for node in sorted(alive - self.asked)}
        for node, reply in self.exchange(messages, seconds):
            if reply is None:
                continue
            self.asked.add(int(node))
            if reply.has_error():
                problems.append(f"node {node}: {reply.error.reason}")
                continue
            record: Any = reply.content.config_records[PARTITION]
            name = record["client"]
            if self.nodes.get(name) in alive:
                problems.append(f"{name}: two nodes are this client, {self.nodes[name]} and {node}")
                continue
            self.nodes[name] = int(node)
            self.clients[name] = client_of(name, json.loads(record["kinds"]))
        return problems

    def gather(self, names: Collection[str], seconds: float) -> list[Client]:
        """The clients, once all are here; ValueError where they are not in time, or cannot take part."""
        until = time.monotonic() + seconds
        while missing := sorted({*names} - self.nodes.keys()):
            if time.monotonic() > until:
                silent = len({*self.grid.get_node_ids()} - self.asked)
                rest = f"; {silent} are connected and have not answered" if silent else ""
                raise ValueError(f"{', '.join(missing)}: no node is this client after {seconds:g} s{rest}")
            if problems := self.meet(until - time.monotonic()):
                raise ValueError("; ".join(problems))
            time.sleep(POLL)
        return [self.clients[name] for name in sorted(names)]

    def ask(self, federation: Federation, clients: Iterable[Client]) -> Iterator[Arrival]:
        """Let the nodes train the round, all at once; a client that fails or is late is a dropout."""
        if not {*self.nodes.values()} <= {*self.grid.get_node_ids()}:  # a node that was started again has another id
            for problem in self.meet(self.deadline):
                federation.reporter.print(problem)
        messages = {client.name: self.order(federation, client) for client in clients}
        for name, reply in self.exchange(messages, self.deadline):
            if reply is None:
                yield Arrival(client=name, steps=0, failed=f"no answer in {self.deadline:g} s")
            elif reply.has_error():
                yield Arrival(client=name, steps=0, failed=reply.error.reason)
            else:
                yield arrival_of(reply.content, name)

    def order(self, federation: Federation, client: Client) -> Message:
        """What a client receives, without what its node has from the last round that was accepted."""
        delivery, kept = federation.delivery(client), {role.name for role in federation.roles if role.keep}
        rounds = [line["round"] for line in federation.state.history if client.name in line["clients"]]
        last = max(rounds, default=0) if kept or with_variates(federation.roles, federation.pieces) else 0
        own = {piece.key for piece in federation.pieces if last and piece.role in kept and piece.axis is None}
        record = {key: getattr(delivery, key) for key in DELIVERY} | {"kept": last, "settings": self.settings}
        member = delivery.member
        record |= {"group": member.group, "first": member.first, "lacks": sorted(member.lacks)}
        tensors = pack({key: tensor for key, tensor in delivery.tensors.items() if key not in own})
        content = RecordDict({ORDER: ConfigRecord(record), TENSORS: tensors})
        return Message(content, self.nodes[client.name], "train", ttl=self.deadline, group_id=str(delivery.round))


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """All of federate.py, with the clients at their nodes."""
    given: Any = context.run_config
    config = load_settings(given)
    settings = json.dumps(settings_of(config, settled(config.run())))
    fleet = Fleet(grid=grid, settings=settings, deadline=given["deadline"])
    recipe = config.federated.partition
    names = [client_name(place, recipe) for place in range(recipe.clients - recipe.held_out)]
    clients = fleet.gather(names, given["wait"])
    options = {"resume": given["resume"], "overwrite": given["overwrite"]}
    federation = open_federation(config, make_accelerator(config), clients=clients, **options)
    federate(federation, partial(fleet.ask, federation))
    report(federation)
