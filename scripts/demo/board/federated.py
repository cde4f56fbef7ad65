"""Rows of a board with partitions: a federation's global model, and the model of each client as it has it.

Every row is scored on the same questions, with the same clients; those of pooled rows all have its one model.

    personal       mean over clients of their own models, on data sets like their own, weighted by their samples
    worst_client   the lowest of these
    unseen_task    mean over clients of their own models, on the data sets that others train on
    unseen_client  the global model at the clients of another deal, which lack what they lack
    kept           mean over clients of their own models, on the data sets that nobody trains on

A view is a column for each data set, whose mean over all columns is the view: share x score x number of data sets.
"""

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from typing import Any

import numpy as np

from moa.build import settled
from moa.checkpoint import git_commit, load_model, step_name
from moa.evaluation.result import Result
from moa.evaluation.settings import with_eval
from moa.evaluation.sources import score_sources
from moa.federated.client import without
from moa.federated.matrix import GLOBAL, MARKED, score_rows
from moa.federated.partition import make_clients
from moa.federated.simulate import Federation
from moa.federated.start import make_federation, read_tags
from moa.federated.store import load_state
from moa.files.atomic import write_json
from moa.training.setup import make_accelerator
from scripts.demo.board.plan import BY_ROUND, SENT, Cell, Plan, read_board
from scripts.demo.board.scoring import federation_of, is_scored, score_column, score_files, sizes

ANOTHER = 1000  # added to the seed that deals the unseen clients

Scores = Mapping[str, Sequence[float]]  # of each question, by data set
Part = tuple[Scores, Mapping[str, float]]  # and shares of the data sets


def score_federation(plan: Plan, cell: Cell) -> None:
    """Score a row that was not scored before."""
    if is_scored(plan, cell):
        return
    board, [file] = read_board(cell.board), score_files(plan, cell).values()
    with redirect_stdout(StringIO()):  # the table of the partition
        federation = open_row(plan, cell)
    rows = score_rows(federation, federation.config.federated.rounds, read=scores_of)
    server, trained = federation.state.server.tensors, next(iter(board.means.values()))
    federation.show(server)
    with without(federation.model, federation.idle):
        columns = {
            name: score_column(plan, federation.model, federation.run, column, "router", False)
            for name, column in plan.columns(cell.board).items()
        }
        by_round = [*scores_by_round(plan, cell, federation, trained)]
    facts: dict[str, Any] = {
        f"{v}/{n}": s for v, own in views_of(rows, board.columns, trained).items() for n, s in own.items()
    }
    row = board.rows[cell.row]
    sent = 0 if row.pooled else sum(line["bytes_up"] + line["bytes_down"] for line in federation.state.history)
    facts |= {
        SENT: [sent / 1e6],
        BY_ROUND: by_round or [np.mean([np.mean(rows[GLOBAL]["scores"][n]) for n in trained])],
    }
    nothing = {"num_tokens": 0, "cpu_seconds": 0.0}
    columns |= {name: nothing | {"scores": np.asarray(scores).round(6).tolist()} for name, scores in facts.items()}
    write_json(plan.out / "scores" / file, {"columns": columns})
    record = {"files": score_files(plan, cell), "commit": git_commit()}
    write_json(plan.record(cell), record | sizes(federation.model, "off" if row.gates == "off" else "router"))


def open_row(plan: Plan, cell: Cell) -> Federation:
    """The federation after its last round, or, with gates off, as it began: that is the base. With unseen clients."""
    config = federation_of(plan, cell)
    federation = make_federation(config, settled(config.run()), make_accelerator(config))
    if read_board(cell.board).rows[cell.row].gates != "off":
        state = load_state(plan.folder(cell))
        assert state is not None
        federation.state = state
    tags, _ = read_tags(federation.sources, config.data.on_bad_sample)
    others = make_clients(tags, config.federated.partition, config.seed + ANOTHER)
    unseen = [replace(client, name=f"unseen {client.name}", held_out=True) for client in others]
    federation.clients = [*federation.clients, *unseen]
    return federation


def scores_of(result: Result) -> list[float]:
    return [*result.sample_scores]


def scores_by_round(plan: Plan, cell: Cell, federation: Federation, trained: Sequence[str]) -> Any:
    """The mean over the data sets of the global model after each round."""
    run = with_eval(
        federation.run, only=[*trained], num_samples=federation.config.federated.num_questions, num_images=0
    )
    for line in federation.state.history:
        model, _, _ = load_model(plan.folder(cell) / "checkpoints" / step_name(line["step"]))
        with without(model, federation.idle):
            yield float(np.mean([np.mean(result.sample_scores) for result in score_sources(model, run)]))


def views_of(
    rows: Mapping[str, Any], names: Sequence[str] | Mapping[str, Any], trained: Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
    """Every view by data set, from the rows of `moa.federated.matrix.score_rows` with the scores of each question."""
    seen = [(row["scores"], row["own"]) for name, row in rows.items() if name != GLOBAL and not row["held_out"]]
    unseen = [(row["scores"], row["own"]) for name, row in rows.items() if name != GLOBAL and row["held_out"]]
    others = [(s, equal([n for n in trained if own.get(n, 0.0) < MARKED])) for s, own in seen]
    views = {
        "personal": seen,
        "worst_client": [min(seen, key=value_of)],
        "unseen_task": [part for part in others if part[1]],
        "unseen_client": unseen,
        "kept": [(scores, equal([n for n in names if n not in trained])) for scores, _ in seen],
    }
    return {view: spread_out(parts, [*names]) for view, parts in views.items()}


def equal(names: Sequence[str]) -> dict[str, float]:
    return dict.fromkeys(names, 1 / len(names)) if names else {}


def value_of(part: Part) -> float:
    scores, shares = part
    return sum(share * float(np.mean(scores[name])) for name, share in shares.items())


def spread_out(parts: Sequence[Part], names: Sequence[str]) -> dict[str, np.ndarray]:
    """A column for each data set; the mean of their means is the mean of `value_of` over the parts."""
    found = {}
    for name in names:
        weighted = [shares.get(name, 0.0) * np.asarray(scores[name]) for scores, shares in parts]
        found[name] = len(names) * np.mean(weighted, axis=0)
    return found
