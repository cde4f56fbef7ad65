"""What a card says was measured: scores with intervals, gates by task."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from moa.card import CARD, REPORT_FILE, with_scores
from moa.checkpoint import weights_fingerprint
from moa.evaluation.gates_file import read_routing, routing_file, run_of
from moa.evaluation.result import interval
from moa.evaluation.runs import read_results
from moa.files.atomic import write_file

OWN = "Of this export, by eval.py with the prompt of the run."


def measured_of(step: Path) -> dict[str, Any]:
    """Fields of a card of what is made of a run: its scores and gates, where eval.py measured them on these weights."""
    weights, gates = weights_fingerprint(step), list[list[str]]()
    scored = read_results(run_of(step) / "eval", weights, [])
    with suppress(ValueError):  # there are none, or the file is damaged
        routing = read_routing(routing_file(step))
        rows = [[task, *(f"{gate:.2f}" for gate in row)] for task, row in routing["per_task"].items()]
        gates = [["task", *routing["experts"]], *rows] if routing["weights"] == weights else []
    return {"scores": score_rows(record for record, _ in scored.values()), "gates": gates}


def score_rows(records: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            r["name"],
            "+".join({t["primary"]: None for t in r["tasks"].values()}),
            interval(r["score"]),
            str(r.get("n", "-")),
        ]
        for r in records
    ]


def put_scores(export: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Put what was measured of an export into its card, in place of the scores of the run that it comes from."""
    file = export / CARD
    if (export / REPORT_FILE).is_file() and file.is_file():
        write_file(file, with_scores(file.read_text(encoding="utf-8"), OWN, score_rows(records)))
