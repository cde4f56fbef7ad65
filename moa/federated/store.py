"""What a federation has on the disk, so that it goes on after a kill at any moment.

<run>/federated.yaml                           all settings, with those of the run
<run>/server/secret                            of a private federation, the seed of its noise: not to be given away
<run>/server/last                              names the last whole round
<run>/server/round-000002/                     the state after round 2: written whole, or not at all
    tensors, scoped, state, kept .safetensors  server values, those of scopes, of its optimisers, of clients alone
    centres.safetensors                        of groups of clients
    state.json, manifest.json                  round, steps, and what was in each round
<run>/server/incoming/round-000003/client-4/   what has arrived in the round under way, also from one that failed
    record.json, values.safetensors, kept.safetensors
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from moa.checkpoint import MANIFEST, load_tensors, manifest_of, read_json, save_tensors, verify
from moa.federated.aggregate import Server, Update
from moa.federated.groups import Groups
from moa.files.atomic import atomic_folder, remove_folder, write_file, write_json

SETTINGS, SERVER, LAST, SECRET = "federated.yaml", "server", "last", "secret"
RECORD, VALUES, KEPT = "record.json", "values.safetensors", "kept.safetensors"
BETWEEN = "|"  # of names in a file's keys; no name has it
KEEP = 2  # rounds
Nested = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class State:
    """Between two rounds."""

    server: Server
    kept: Nested = field(default_factory=dict)  # client -> piece -> value of roles that never leave it
    groups: Groups = field(default_factory=Groups)
    step: int = 0  # of all clients together
    history: tuple[dict[str, Any], ...] = ()  # of the rounds, as JSON

    @property
    def rounds_done(self) -> int:
        return self.server.round - 1


def round_name(round_: int) -> str:
    return f"round-{round_:06d}"


def joined(nested: Nested) -> dict[str, Tensor]:
    return {f"{outer}{BETWEEN}{inner}": t for outer, values in nested.items() for inner, t in values.items()}


def apart(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        outer, _, inner = key.rpartition(BETWEEN)
        found.setdefault(outer, {})[inner] = tensor
    return found


# Rounds -----------------------------------------------------------------------------------------------


def save_state(run: Path, state: State) -> None:
    """Write the state after a round, and let `last` name it; older rounds and what came for them go."""
    name, server = round_name(state.rounds_done), state.server
    with atomic_folder(run / SERVER / name) as folder:
        files = {"tensors": server.tensors, "scoped": joined(server.scoped)}
        files |= {"state": joined(server.state), "kept": joined(state.kept), "centres": state.groups.centres}
        for file, tensors in files.items():
            save_tensors(folder / f"{file}.safetensors", tensors)
        facts = {"round": server.round, "step": state.step, "history": [*state.history]}
        facts |= {"groups": dict(state.groups.of), "since": dict(state.groups.since)}
        write_json(folder / "state.json", facts)
        write_json(folder / MANIFEST, manifest_of(folder))
    write_file(run / SERVER / LAST, name + "\n")
    clean(run, state)


def clean(run: Path, state: State) -> None:
    """Delete old rounds, and what has arrived for rounds that are done."""
    old = sorted((run / SERVER).glob("round-*"))[:-KEEP]
    now = round_name(state.server.round)
    for folder in [*old, *(p for p in (run / SERVER / "incoming").glob("round-*") if p.name != now)]:
        remove_folder(folder)


def load_state(run: Path) -> State | None:
    """The state after the last whole round, or None where there is none; ValueError for a changed file."""
    file = run / SERVER / LAST
    if not file.is_file():
        return None
    folder = run / SERVER / file.read_text().strip()
    verify(folder)
    found = read_json(folder / "state.json")
    tensors = {n: load_tensors(folder / f"{n}.safetensors") for n in ("tensors", "scoped", "state", "kept", "centres")}
    scoped, state, kept = (apart(tensors[name]) for name in ("scoped", "state", "kept"))
    server = Server(round=found["round"], tensors=tensors["tensors"], scoped=scoped, state=state)
    groups = Groups(of=found["groups"], centres=tensors["centres"], since=found["since"])
    return State(server=server, kept=kept, groups=groups, step=found["step"], history=tuple(found["history"]))


def secret_seed(run: Path) -> int:
    """A number that nobody can guess, drawn once for a run; who has it can take the noise out of a private model."""
    file = run / SERVER / SECRET
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, f"{secrets.randbits(128)}\n")
        file.chmod(0o600)
    return int(file.read_text())


# Updates ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """What has arrived of a client in a round: an update, or the reason why there is none."""

    client: str
    steps: int  # that it did
    update: Update | None = None
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    failed: str = ""
    losses: tuple[float, ...] = ()  # of the first and the last step


def incoming(run: Path, round_: int) -> Path:
    return run / SERVER / "incoming" / round_name(round_)


def save_arrival(run: Path, round_: int, arrival: Arrival) -> Arrival:
    """Write it whole, or not at all; the result is what is stored, whose tensors are maps of its files."""
    record: dict[str, Any] = {key: getattr(arrival, key) for key in ("client", "steps", "failed", "losses")}
    update = arrival.update
    with atomic_folder(incoming(run, round_) / arrival.client) as folder:
        if update is not None:
            own = ("round", "base", "counts", "tasks", "modalities", "group", "digest")
            record["update"] = {key: getattr(update, key) for key in own}
            save_tensors(folder / VALUES, update.values)
        save_tensors(folder / KEPT, arrival.kept)
        write_json(folder / RECORD, record)
    return _load_arrival(incoming(run, round_) / arrival.client)


def load_arrivals(run: Path, round_: int) -> dict[str, Arrival]:
    """By client, in the order of names; one whose files cannot be read has failed."""
    return {folder.name: _load_arrival(folder) for folder in sorted(incoming(run, round_).glob("[!.]*"))}


@dataclass(frozen=True, kw_only=True)
class StoredUpdates:
    """These clients' updates, each read at its turn: memory is that of one. OSError where one can be read no longer."""

    run: Path
    round: int
    clients: Sequence[str]

    def __iter__(self) -> Iterator[Update]:
        for client in self.clients:
            arrival = _load_arrival(incoming(self.run, self.round) / client)
            if arrival.update is None:
                raise OSError(f"{incoming(self.run, self.round) / client}: {arrival.failed}")
            yield arrival.update
            del arrival  # before the next is read


def _load_arrival(folder: Path) -> Arrival:
    try:
        record = read_json(folder / RECORD)
        found, update = record.pop("update", None), None
        record["losses"] = tuple(record["losses"])
        if found is not None:
            lists = {key: tuple(found[key]) for key in ("tasks", "modalities")}
            update = Update(client=record["client"], values=load_tensors(folder / VALUES), **{**found, **lists})
        return Arrival(update=update, kept=load_tensors(folder / KEPT), **record)
    except (ValueError, KeyError, TypeError) as error:
        return Arrival(client=folder.name, steps=0, failed=f"torn: {error}")
