"""What the results folder holds already: rows whose runs are gone, or were on another machine, are not made again."""

import json
from dataclasses import asdict, dataclass, field
from functools import cache, reduce
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from moa.backbones.fingerprint import base_fingerprint
from moa.cli.settings import laid_over
from moa.cli.strict_yaml import read_yaml
from moa.evaluation.fingerprints import digest
from moa.files.atomic import write_json
from scripts.demo.board.plan import Cell, Plan, load_run, needed, read_board, results_file
from scripts.demo.board.scale import given
from scripts.demo.board.scoring import read_scores
from scripts.demo.board.training import NOT_TRAINED_BY, is_tuned, tune_file, tuning_runs

ANSWERS = ("of", "at", "gates", "withhold_task", "command", "settings", "tune_as")  # of a row, beside its files


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A board's results by row and seed: what was asked of each, the scores of every question, and the rates found."""

    asked: dict[tuple[str, int], str] = field(default_factory=dict)
    scores: dict[tuple[str, int], dict[str, np.ndarray]] = field(default_factory=dict)  # by column
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)  # the records

    def has(self, plan: Plan, cell: Cell) -> bool:
        """Whether the row was scored with these settings on these questions."""
        return self.asked.get((cell.row, cell.seed)) == asked(plan, cell)


def read_kept(results: Path, name: str) -> Kept:
    """Of results/board_NAME.json and .npz; empty where they are not there, or not of one writing."""
    record, arrays = read_scores(results_file(results, name, "json")), results_file(results, name, "npz")
    if record is None or not arrays.is_file():
        return Kept()
    kept = Kept(rows=record["rows"])
    try:
        opened = np.load(arrays, allow_pickle=False)
    except (BadZipFile, ValueError, EOFError) as error:
        raise ValueError(f"{arrays}: not readable ({error}); restore it, or delete it with board_{name}.json") from None
    with opened as file:
        for row, own in record["rows"].items():
            seeds = [int(seed) for seed in file[f"{row}|seeds"]] if f"{row}|seeds" in file else []
            if seeds != own["seeds"]:
                return Kept()
            for place, seed in enumerate(seeds):
                kept.asked[row, seed] = own.get("asked", {}).get(str(seed), "")
                kept.scores[row, seed] = {c: file[f"{row}|{c}"][place] for c in own["columns"]}
    return kept


@cache
def asked(plan: Plan, cell: Cell) -> str:
    """Of all that a row's scores depend on, whatever machine computes them: its settings, those of the rows that it
    comes from, the base, and the questions."""
    board, row = read_board(cell.board), read_board(cell.board).rows[cell.row]
    files: dict[str, Any] = reduce(laid_over, map(read_yaml, [*board.config, *row.config]))
    trained = {key: value for key, value in files.items() if key not in NOT_TRAINED_BY}
    own = {key: getattr(row, key) for key in ANSWERS}
    own |= {"unknown_task": row.unknown_task} if row.unknown_task else {}
    tuning = asdict(board.tune) if board.tune else None
    columns = {name: given(column) for name, column in plan.columns(cell.board).items()}
    base = base_fingerprint(load_run(board).model.name)
    before = [asked(plan, other) for other in needed(cell)]
    about = [trained, own, tuning, columns, board.withhold_task, base, before, cell.seed, plan.steps, plan.overrides]
    about += [row.pooled, board.partitions[cell.row.partition("@")[2]]] if board.partitions else []
    return digest(json.dumps(about, default=repr))


def restore_rate(plan: Plan, cell: Cell, kept: Kept) -> bool:
    """Whether the rate that the results have was found with these settings; it is written to where runs look for it."""
    found = (kept.rows.get(cell.row) or {}).get("tuned")
    if found is None:
        return False
    if found["wanted"] == [run.wanted for run in tuning_runs(plan, cell).values()]:
        tune_file(plan, cell).parent.mkdir(parents=True, exist_ok=True)
        write_json(tune_file(plan, cell), found)
    return is_tuned(plan, cell)
