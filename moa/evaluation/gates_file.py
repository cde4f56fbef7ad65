"""The gates that eval.py measured, read for those who use them: only with the weights they belong to.

<run>/eval/routing.json            of a full evaluation: every trained task, every sample
<run>/eval/partial/routing.json    of any other
"""

import json
import math
from pathlib import Path
from typing import Any

from moa.checkpoint import verify, weights_fingerprint

ROUTING, PARTIAL = "routing.json", "partial"
KEYS = ("experts", "sites", "mean_over", "per_task", "samples_per_task", "missing_tasks", "weights")


def run_of(step: Path) -> Path:
    """The run of a step folder; of a step folder outside of a run, the folder itself."""
    return step.parent.parent if step.parent.name == "checkpoints" else step


def routing_file(step: Path) -> Path:
    return run_of(step) / "eval" / ROUTING


def read_routing(file: Path, step: Path | None = None) -> dict[str, Any]:
    """A report of eval.py, measured on the weights of `step` if one is given; ValueError, with the way out, else."""
    again = f"run `python eval.py run={run_of(step) if step else 'RUN'}` again"
    if not file.is_file():
        raise ValueError(f"{file}: missing, so there are no gates; {again}")
    try:
        report = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse)
    except ValueError as error:
        raise ValueError(f"{file}: not readable as JSON ({error}); {again}") from None
    missing = [key for key in KEYS if not isinstance(report, dict) or key not in report]
    if missing:
        raise ValueError(f"{file}: has no {missing[0]!r}, which eval.py writes; {again}")
    if step is not None:
        verify(step)  # its manifest is what the fingerprint is made of
    if step is not None and report["weights"] != weights_fingerprint(step):
        measured = report.get("checkpoint", "other weights")
        raise ValueError(f"{file}: was measured on {measured}, whose weights were not those of {step}; {again}")
    _check_gates(report, f"{file}: ", again)
    return report


def _check_gates(report: dict[str, Any], where: str, again: str) -> None:
    """Every row of gates has a finite number for each expert, and `per_site` a row for each site."""
    num_experts, num_sites = len(report["experts"]), len(report["sites"])

    def is_row(row: Any) -> bool:
        numbers = isinstance(row, list) and all(isinstance(v, int | float) for v in row)
        return numbers and len(row) == num_experts and all(map(math.isfinite, row))

    tables = [report["per_task"], *report.get("per_site", {}).values()]
    for table in tables:
        rows = table.values() if isinstance(table, dict) else table
        fits = isinstance(table, dict) or len(rows) == num_sites
        if not fits or not all(map(is_row, rows)):
            raise ValueError(f"{where}its gates are not {num_experts} numbers a row; {again}")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")
