"""Clients and tasks: the global model, and the model of each client as it has it, on every data set of `eval`.

personal    mean over training clients, each by its own model on data sets like its own, weighted by its samples
global      mean over data sets of the global model
worst       the client with the lowest such score
forgotten   where data sources come and go: the best score that a row has had when they did, less that at the end, the
            mean over the data sets that it was for then (Chaudhry et al. 2018, arXiv 1801.10112, equation 3)
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from torch import Tensor

from data.mixture import Source
from data.sample import Sample
from moa.analysis.plots import client_heat_map
from moa.config import RunConfig
from moa.evaluation.result import Result, plain_table
from moa.evaluation.settings import chosen_sources, with_eval
from moa.evaluation.sources import score_sources
from moa.federated.aggregate import digest_of
from moa.federated.assignment import modalities_of
from moa.federated.client import hide, without
from moa.federated.partition import Client
from moa.federated.pieces import Piece
from moa.federated.simulate import Federation
from moa.files.atomic import write_json
from moa.training.trackers import send_images

GLOBAL, FILE = "global", "federated.json"
MODALITIES = ("image", "ocr")
MARKED = 0.1  # share of a client's samples


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A data set as a client sees it that lacks a modality."""

    dataset: Source
    hidden: frozenset[str]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return hide(self.dataset[index], self.hidden)


def score_clients(federation: Federation) -> dict[str, Any] | None:
    """Scores by client and data set, written to the run folder; None where no data set is there, or asked for."""
    rows = score_rows(federation, federation.config.federated.rounds)
    if not rows:
        return None
    totals = summary(rows)
    record: dict[str, Any] = {"data_sets": [*rows[GLOBAL]["scores"]], "rows": rows, "summary": totals}
    phases = [line["phase"] for line in federation.state.history if line.get("phase")]
    if phases:
        lost = forgotten(phases, rows)
        own = [row for name, row in lost.items() if name != GLOBAL]
        record["forgotten"] = lost
        means = [value for row in own if (value := mean_of(row)) is not None]
        totals |= {"forgotten": mean_of(lost.get(GLOBAL, {})), "forgotten_personal": mean_of(means)}
    write_json(federation.folder / FILE, record)
    client_heat_map(federation.folder / "pictures" / "clients.png", record)
    return record


def measure(federation: Federation) -> dict[str, Any]:
    """The scores after the round that is done, of each row on the data sets that it has been for so far."""
    rows = score_rows(federation, federation.state.rounds_done)
    own = {name: row["own"] for name, row in rows.items() if name != GLOBAL and not row["held_out"]}
    own |= {GLOBAL: sorted({n for names in own.values() for n in names})} if rows else {}
    return {name: {n: rows[name]["scores"][n] for n in names} for name, names in own.items()}


def forgotten(phases: Sequence[Mapping[str, Mapping[str, float]]], rows: Mapping[str, Any]) -> dict[str, Any]:
    """Of each row and data set; see the head of this module."""
    lost: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        found = [phase[name] for phase in phases if name in phase]
        own = sorted({data_set for scores in found for data_set in scores})
        best = {n: max(scores[n] for scores in found if n in scores) for n in own}
        if own:
            lost[name] = {n: best[n] - row["scores"][n] for n in own}
    return lost


def mean_of(values: Mapping[str, float] | Iterable[float]) -> float | None:
    found = [*(values.values() if isinstance(values, Mapping) else values)]
    return sum(found) / len(found) if found else None


def value_of(result: Result) -> float:
    return result.score["value"] or 0.0


def score_rows(federation: Federation, round_: int, read: Callable[[Result], Any] = value_of) -> dict[str, Any]:
    """The scores of the global model and of each client's, and shares of the data sets like what it had up to a round.

    What several clients have alike is scored once. The model then has the global values again. Clients on machines of
    their own keep values of roles with `keep` there, and have no row. Empty where no data set is there, or asked for.
    """
    run, number = federation.run, federation.config.federated.num_questions
    if not number or not (run.eval.sources or run.data.validation):
        return {}
    config = with_eval(run, num_samples=number, num_images=0, gates="router", compare=[])
    server = federation.state.server.tensors
    nothing, idle = frozenset[str](), federation.idle
    seen = {client.name: client for client in federation.seen(round_)}
    rows: dict[str, Any] = {GLOBAL: {"scores": score(federation, config, server, nothing, idle, read=read), "own": {}}}
    found = {(digest_of(server), nothing, idle, tuple[Piece, ...]()): rows[GLOBAL]["scores"]}
    elsewhere = any(role.keep for role in federation.roles) and not federation.state.kept
    for client in federation.clients if not elsewhere else ():
        tensors, hidden = federation.delivered(client), frozenset(MODALITIES) - {*modalities_of(client)}
        last = max((n for n in range(1, round_ + 1) if federation.at(client, n).train), default=0)
        own = None if client.held_out or not last else federation.assignment(client, last)
        absent, above = (idle, ()) if own is None else (own.absent, own.above)
        key = digest_of(tensors), hidden, absent, above
        if key not in found:
            found[key] = score(federation, config, tensors, hidden, absent, above, read=read)
        shares = own_of(seen.get(client.name, client), config)
        rows[client.name] = {"scores": found[key], "own": shares, "held_out": client.held_out}
    federation.show(server)
    return rows


def score(
    federation: Federation,
    config: RunConfig,
    tensors: Mapping[str, Tensor],
    hidden: frozenset[str],
    absent: frozenset[str],
    above: Sequence[Piece] = (),
    *,
    read: Callable[[Result], Any],
) -> dict[str, Any]:
    """What `read` takes of each data set's result, without the modalities, experts and ranks that a client lacks."""
    federation.show(tensors, above)
    federation.model.eval()
    with without(federation.model, absent):
        results = score_sources(federation.model, config, view=lambda dataset: Seen(dataset=dataset, hidden=hidden))
    return {result.name: read(result) for result in results}


def own_of(client: Client, config: RunConfig) -> dict[str, float]:
    """The data sets like what a client trains on, by the name of a source or else by task: shares of its samples."""
    chosen = chosen_sources(config)
    sources, tasks = (Counter(getattr(row.tag, kind) for row in client.train) for kind in ("source", "task"))
    found = {source.name: sources[source.name] for source in chosen}
    if not any(found.values()):
        found = {source.name: tasks[source.task or source.name] for source in chosen}
    total = sum(found.values())
    return {name: number / total for name, number in found.items() if number}


def own_score(row: Mapping[str, Any]) -> float | None:
    """Of a client on data sets like its own; None for one that has none, and for the global model."""
    return sum(share * row["scores"][name] for name, share in row["own"].items()) if row["own"] else None


def summary(rows: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers at the head of this module, and the mean of clients that never trained."""
    own = {name: value for name, row in rows.items() if (value := own_score(row)) is not None}
    training = {name: value for name, value in own.items() if not rows[name]["held_out"]}
    unseen = [value for name, value in own.items() if rows[name]["held_out"]]
    worst = min(training, key=lambda name: training[name]) if training else None
    return {
        "personal": mean_of(training),
        "global": mean_of(rows[GLOBAL]["scores"]),
        "worst": None if worst is None else {"client": worst, "value": training[worst]},
        "unseen_client": mean_of(unseen),
    }


def table(record: Mapping[str, Any]) -> Table:
    """A row for the global model and for each client, and what the global one has forgotten."""
    grid = plain_table()
    grid.title = "scores in per cent; * a tenth or more of what the client trains on; own: the mean of that, by samples"
    grid.add_column("", no_wrap=True)
    for name in (*record["data_sets"], "own"):
        grid.add_column(name, justify="right", no_wrap=True)
    for name, row in record["rows"].items():
        cells = [
            f"{100 * row['scores'][n]:.0f}{'*' if row['own'].get(n, 0) >= MARKED else ' '}" for n in record["data_sets"]
        ]
        own = own_score(row)
        cells.append("" if own is None else f"{100 * own:.0f}")
        grid.add_row(name + (" held out" if row.get("held_out") else ""), *cells)
    if lost := record.get("forgotten", {}).get(GLOBAL):
        grid.add_row("forgotten", *(f"{100 * lost[n]:.0f} " if n in lost else "" for n in record["data_sets"]))
    return grid


def line_of(record: Mapping[str, Any]) -> str:
    found = record["summary"]
    parts = [f"global {100 * found['global']:.1f}"]
    if found["personal"] is not None:
        worst = found["worst"]
        parts.append(f"personal {100 * found['personal']:.1f}")
        parts.append(f"worst client {worst['client']} {100 * worst['value']:.1f}")
    if found["unseen_client"] is not None:
        parts.append(f"unseen client {100 * found['unseen_client']:.1f}")
    if found.get("forgotten") is not None:
        own = found["forgotten_personal"]
        parts.append(f"forgotten {100 * found['forgotten']:.1f}, of personal {100 * own:.1f}")
    return ", ".join(parts)


def report(federation: Federation) -> None:
    """What is printed after the last round."""
    show = federation.reporter.print
    if record := score_clients(federation):
        show(table(record))
        show(line_of(record))
        image = {"clients": federation.folder / "pictures" / "clients.png"}
        send_images(federation.accelerator, federation.run, image, federation.step)
    rounds = federation.config.federated.rounds
    show(f"\ndone: {rounds} rounds, {federation.step} steps of clients, in {federation.folder}")
