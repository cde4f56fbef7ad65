"""A federation against plain training, and its aggregation against reading the same files alone.

    python -m bench.federated [rounds=2] [turns=3] [clients=50] [experts=5] [rank=8] [layers=32]

The demo's ten clients train `rounds` rounds, with all that the server writes, beside plain training of as many steps on
the same data: `round_over_plain` is the ratio of their seconds, the median over `turns`. Then updates of `clients`
clients with experts as large as those of a 7B LLaVA (7 sites in each of 32 layers) are aggregated as they are stored,
in a process of its own, beside a sum over every number of the same files. All clients have the same values in one file,
so that nothing waits for the disk. The peak is the whole process's. Writes results/bench_federated.json.
"""

import os
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bench.settings import ROOT, in_own_process, machine, process_kib, run_bench, write_results
from moa.cli.ranges import Count, Size

if TYPE_CHECKING:
    from torch import Tensor

    from moa.federated.aggregate import Server
    from moa.federated.pieces import Piece, Role
    from moa.federated.simulate import Federation

DEMO = ROOT / "configs/federated/demo.yaml"


@dataclass(frozen=True, kw_only=True)
class Settings:
    rounds: Count = 2  # of the demo
    turns: Count = 3  # of federation and plain training
    clients: Size = 50  # whose updates are aggregated
    experts: Size = 5
    rank: Size = 8
    layers: Size = 32  # of a 7B LLaVA


def open_demo(folder: Path, rounds: int) -> "Federation":
    """The demo without what is measured and not trained: validation, and the table at the end."""
    from moa.cli.settings import load
    from moa.federated.config import FederateConfig
    from moa.federated.start import open_federation
    from moa.training.setup import make_accelerator

    config = load(FederateConfig, [DEMO], [("federated.rounds", rounds), ("out", str(folder / "run"))])
    config = replace(config, data=replace(config.data, validation={}))
    federation = open_federation(config, make_accelerator(config), overwrite=True)
    federation.reporter.console.quiet = True
    return federation


def train_plainly(federation: "Federation") -> None:
    """As many steps of each stage as all clients do in all rounds, of the whole data."""
    from moa.federated.partition import Client
    from moa.training.step import train_step

    rows = tuple(row for client in federation.training for row in client.train)
    times = federation.config.federated.rounds * federation.config.federated.drawn
    stages = {name: replace(s, steps=times * s.steps) for name, s in federation.run.stages.items()}
    run = federation.make_run(Client(name="all", train=rows), replace(federation.run, stages=stages), 1)
    while not run.done:
        trainer = run.begin_stage(None)
        for micro_batches in run.steps():
            train_step(trainer, micro_batches, run.stage_step)
            run.end_stage()
        trainer.close()


def round_over_plain(rounds: int, turns: int) -> float:
    """The median ratio of seconds, after a turn that warms up."""
    from bench.bench_model import clock
    from moa.federated.simulate import federate

    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(turns + 1):
            federation = open_demo(Path(folder), rounds)
            began = clock("cpu")
            federate(federation)
            between = clock("cpu")
            train_plainly(federation)
            ratios.append((between - began) / (clock("cpu") - between))
            print(f"{federation.step} steps of clients over as many of plain training: {ratios[-1]:.3f}", flush=True)
    return median(ratios[1:])


def factors(settings: Settings) -> "dict[str, Tensor]":
    """The values of all experts, by PART.KEY."""
    import torch

    from bench.merges import LAYER

    torch.manual_seed(0)
    shapes = dict[str, tuple[int, int]]()
    for expert in range(settings.experts):
        for layer, (site, (rows, columns)) in product(range(settings.layers), enumerate(LAYER)):
            key = f"experts.expert{expert}.layers.{layer}.{site}.lora"
            shapes |= {f"{key}_A.weight": (settings.rank, columns), f"{key}_B.weight": (rows, settings.rank)}
    return {key: torch.randn(shape) for key, shape in shapes.items()}


def make_server(settings: Settings) -> "tuple[Server, list[Role], list[Piece]]":
    """A server in its first round, with a role for each expert."""
    from moa.federated.aggregate import Server
    from moa.federated.pieces import Names, Role, pieces_of

    tensors, names = factors(settings), [f"expert{number}" for number in range(settings.experts)]
    roles = [Role(name=name, match=[f"experts:{name}"]) for name in names]
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return Server(round=1, tensors=tensors), roles, pieces_of(shapes, roles, Names())


def store_updates(run: Path, settings: Settings) -> None:
    """Those of all clients, with the same values in one file that each has under its own name."""
    from moa.federated.aggregate import Update
    from moa.federated.store import VALUES, Arrival, incoming, save_arrival

    server, roles, _ = make_server(settings)
    base, counts = server.base(), {role.name: {"samples_of_role": 1} for role in roles}
    first = incoming(run, 1) / "client-0" / VALUES
    for client in (f"client-{number}" for number in range(settings.clients)):
        values = {} if first.is_file() else server.tensors
        update = Update(client=client, round=1, base=base, values=values, counts=counts)
        save_arrival(run, 1, Arrival(client=client, steps=1, update=update))
        if not values:
            (incoming(run, 1) / client / VALUES).unlink()
            os.link(first, incoming(run, 1) / client / VALUES)


def aggregate_files(run: Path, settings: Settings) -> dict[str, float]:
    from moa.federated.aggregate import aggregate
    from moa.federated.store import StoredUpdates

    clients = [f"client-{number}" for number in range(settings.clients)]
    server, roles, pieces = make_server(settings)
    began = time.perf_counter()
    _, report = aggregate(server, StoredUpdates(run=run, round=1, clients=clients), roles, pieces)
    seconds, peak = time.perf_counter() - began, process_kib("VmHWM")
    assert not report.refused and len(report.roles) == settings.experts
    began = time.perf_counter()
    for update in StoredUpdates(run=run, round=1, clients=clients):
        for value in update.values.values():
            value.sum()
    reading = time.perf_counter() - began
    gb = 4e-9 * settings.clients * sum(piece.numel for piece in pieces)
    found = {"aggregate_s": seconds, "aggregate_vs_reading": seconds / reading, "aggregate_peak_gb": peak * 1024e-9}
    return {"updates_gb": gb, **found}


def run(settings: Settings, console: Console) -> None:
    found: dict[str, Any] = {"round_over_plain": round_over_plain(settings.rounds, settings.turns)}
    with tempfile.TemporaryDirectory() as folder:
        in_own_process(store_updates, Path(folder), settings)
        found |= in_own_process(aggregate_files, Path(folder), settings)
    sizes = {key: getattr(settings, key) for key in ("clients", "experts", "rank", "layers")}
    write_results("federated", {"where": {**machine(), **sizes}, **found})


if __name__ == "__main__":
    run_bench(Settings, run, __doc__)
