"""Mean and standard error over the seeds, as a record and as a table."""

import json
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from scripts.demo.board.plan import ROWS, Plan

SPEEDS = ("adapter_parameters", "tokens_per_second")  # beside the scores


def collect(plans: Sequence[Plan]) -> dict[str, Any]:
    """Mean and standard error over the seeds, by row and column; the commits are those that scored."""
    found = {row: [json.loads((p.folder / "scores" / f"{row}.json").read_text()) for p in plans] for row in ROWS}
    rows = {}
    for row, records in found.items():
        columns = {name: [r["columns"][name] for r in records] for name in records[0]["columns"]}
        columns |= {name: [r[name] for r in records] for name in SPEEDS}
        rows[row] = {name: over_seeds(values) for name, values in columns.items()}
    commits = {str(r["commit"]) for records in found.values() for r in records}
    diagnostics = {
        row: [{k: r[k] for k in ("routing", "lost_without") if k in r} for r in records]
        for row, records in found.items()
        if "routing" in records[0]
    }
    return {
        "rows": rows,
        "seeds": [plan.seed for plan in plans],
        "commit": " ".join(sorted(commits)),
        "samples_per_column": found[ROWS[0]][0]["num_samples"],
        "steps": plans[0].steps(),
        "routing": diagnostics,
    }


def over_seeds(values: Sequence[float]) -> dict[str, float | None]:
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": mean(values), "se": error}


def markdown(board: dict[str, Any], columns: Sequence[str]) -> str:
    """The columns of every row as a Markdown table, in per cent with standard errors."""
    lines = ["| row | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row, cells in board["rows"].items():
        shown = [
            f"{100 * cells[c]['mean']:.1f}" + ("" if cells[c]["se"] is None else f" ± {100 * cells[c]['se']:.1f}")
            for c in columns
        ]
        lines.append(f"| `{row}` | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"
