"""What the scored rows of a board show: a record with intervals, a table, the picture's input, and the claims."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from moa.checkpoint import git_commit
from moa.files.atomic import atomic_file, write_file, write_json
from moa.metrics.intervals import Kind, paired_interval
from scripts.demo.board.kept import Kept, asked, read_kept
from scripts.demo.board.plan import (
    BASE,
    BY_ROUND,
    CENTRAL,
    MIXED,
    ROUTED,
    SENT,
    BoardConfig,
    Cell,
    ClaimConfig,
    Plan,
    arrived,
    board_names,
    merged,
    read_board,
    results_file,
)
from scripts.demo.board.scoring import is_scored, read_scores
from scripts.demo.board.training import tune_file

Scores = dict[str, np.ndarray]  # column -> [seed, question]
COSTS = ("step_s", "memory_gib")  # of rows that were trained since boards have them
ABOUT = ("experts", "router", "tokens_per_cpu_second", *COSTS, "commits")
SAME_SIZE = 0.03  # of the reference's parameters
ENOUGH = 0.95  # of the central mixture's score
# Of a board with `scale`: what a score is a share of, and whether both lose the base's score before.
SHARES = {"of_mixed": (MIXED, False), "of_routed": (ROUTED, False), "of_gain": (MIXED, True)}
MEASURES = {
    "of_mixed": "Share of the score of one LoRA on mixed data",
    "of_routed": "Share of the score of the routed mixture",
    "of_gain": "Share of what one LoRA on mixed data gains over the base",
    "score": "Score",
}
FEDERATED = (
    "personal: each client's own model on data sets like its own; worst_client: the lowest of these; unseen_task: on\n"
    "the data sets of others; unseen_client: the global model at clients of another deal; kept: clients' models on\n"
    "tasks that nobody trains; forgotten: what the base does better there. Rounds: until the global model has\n"
    f"{ENOUGH:.0%} of the central mixture's score.\n\n"
)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The scores of one row at the seeds that have all of them."""

    seeds: list[int]
    scores: Scores
    about: dict[str, Any]  # parameters, speed, commits

    def at(self, seeds: Sequence[int], column: str) -> np.ndarray:
        return self.scores[column][[self.seeds.index(seed) for seed in seeds]]


def write_board(plan: Plan, name: str, seeds: Sequence[int], results: Path) -> str:
    """Write JSON, per-question scores, table and picture of what is scored by now; the table."""
    from moa.analysis.plots import board_chart, scale_chart

    board, kept = read_board(name), read_kept(results, name)
    found = read_rows(plan, name, seeds, kept)
    if not found:
        return f"{name}: nothing is scored yet\n"
    record = record_of(plan, name, board, found, {row: own.get("tuned") for row, own in kept.rows.items()})
    arrays: dict[str, Any] = {
        f"{row}|{column}": s.astype(np.float32) for row, own in found.items() for column, s in own.scores.items()
    }
    arrays |= {f"{row}|seeds": np.array(own.seeds) for row, own in found.items()}
    with atomic_file(results_file(results, name, "npz")) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    table = markdown(board, record)
    write_json(results_file(results, name, "json"), record)
    write_file(results_file(results, name, "md"), table)
    (scale_chart if board.scale else board_chart)(results_file(results, name, "png"), record)
    write_claims(results)
    return table


def read_rows(plan: Plan, name: str, seeds: Sequence[int], kept: Kept) -> dict[str, Scored]:
    """The rows that are scored at one of the seeds or more, in the board's order: here, or in the results before, whose
    other seeds stay. Scores of other settings or questions than the row has now do not count."""
    found = {}
    for row in read_board(name).rows:
        parts, about = dict[int, Scores](), dict(kept.rows.get(row, {}))
        for seed in sorted({*seeds, *(seed for other, seed in kept.scores if other == row)}):
            cell = Cell(name, row, seed)
            record = read_scores(plan.record(cell)) if is_scored(plan, cell) else None
            columns = read_columns(plan, record["files"]) if record else None
            if record and columns:
                parts[seed] = {column: np.array(own["scores"]) for column, own in columns.items()}
                speed = [sum(own[key] for own in columns.values()) for key in ("num_tokens", "cpu_seconds")]
                about |= {key: record[key] for key in ("experts", "router", *COSTS) if key in record}
                about["tokens_per_cpu_second"] = speed[0] / speed[1]
                about["commits"] = sorted({*about.get("commits", ()), str(record["commit"])})
            elif kept.has(plan, cell):
                parts[seed] = kept.scores[row, seed]
        if parts:
            scores = {column: np.stack([own[column] for own in parts.values()]) for column in read_board(name).scored}
            about = {key: about[key] for key in ABOUT if key in about} | {
                "asked": {s: asked(plan, Cell(name, row, s)) for s in parts}
            }
            found[row] = Scored(seeds=[*parts], scores=scores, about=about)
    return found


def read_columns(plan: Plan, files: Mapping[str, str]) -> dict[str, Any] | None:
    """Of a file for each column, or of one for all."""
    found = {column: read_scores(plan.out / "scores" / file) for column, file in files.items()}
    parts = [own.get("columns", {column: own}) for column, own in found.items() if own is not None]
    return {column: own for part in parts for column, own in part.items()} if len(parts) == len(found) else None


def record_of(
    plan: Plan, name: str, board: BoardConfig, found: Mapping[str, Scored], before: Mapping[str, Any]
) -> dict[str, Any]:
    """`before` are the rates that earlier results have."""
    rows: dict[str, Any] = {}
    for row, own in found.items():
        columns = {column: over_seeds(scores.mean(1)) for column, scores in own.scores.items()}
        shown = {m: interval_of(found, [(row, None, c) for c in cs]) for m, cs in board.means.items()}
        reference = board.beside(row)
        against = {
            m: interval_of(found, [(row, reference, c) for c in cs])
            for m, cs in board.means.items()
            if reference in found and row != reference
        }
        by_seed = {
            m: [float(np.mean([own.scores[c][i].mean() for c in cs])) for i in range(len(own.seeds))]
            for m, cs in board.means.items()
        }
        file = tune_file(plan, Cell(name, row, 0))
        tuned = json.loads(file.read_text()) if board.rows[row].trains and file.is_file() else before.get(row)
        rows[row] = {"about": board.rows[row].about, "seeds": own.seeds, **own.about, "tuned": tuned}
        rows[row] |= {"columns": columns, "means": shown, "against_reference": against, "means_by_seed": by_seed}
        rows[row] |= facts_of(board, found, row) if board.partitions else {}
    claims, forgotten = {}, {}
    for row in found:
        if board.rows[row].arrivals and all(first in found for first, _, _ in board.forgetting(row)):
            forgotten[row] = interval_of(found, board.forgetting(row))
    for claim in board.claims.values():
        pairs = board.pairs(claim)
        if all(row in found for first, second, _ in pairs for row in (first, second)):
            kind: Kind = "ratio" if claim.kind == "ratio" else "difference"
            claims[claim.name] = interval_of(found, pairs, kind) | {"definition": definition(claim)}
    return {
        "title": board.title,
        "reference": board.reference,
        "questions": {column: next(iter(found.values())).scores[column].shape[1] for column in board.columns},
        "partitions": [*board.partitions],
        "rows": rows,
        "claims": claims,
        **({"scale": shares_of(board, found)} if board.scale else {}),
        "arrivals": board.arrivals,
        "forgotten": forgotten,
        "commit": git_commit(),
    }


def shares_of(board: BoardConfig, found: Mapping[str, Scored]) -> dict[str, Any]:
    """base -> row -> number of skills -> measure -> interval, in per cent, of what is there."""
    shares: dict[str, Any] = {}
    for name in (name for name in found if board.rows[name].each in ("base", "count")):
        row, *part, size = name.split("-")
        for count in part or map(str, board.scale.counts if board.scale else ()):
            columns, base = [*board.columns][: int(count)], f"{BASE}-{size}"
            own = {"score": interval_of(found, [(name, None, c) for c in columns])}
            for measure, (other, gain) in SHARES.items():
                pairs = [(name, f"{other}-{count}-{size}", c) for c in columns]
                if pairs[0][1] in found and (not gain or base in found):
                    own[measure] = interval_of(found, pairs, "ratio", less=base if gain else None)
            of_both = {key: value for key, value in own.items() if value["n_seeds"]}
            shares.setdefault(size, {}).setdefault(row, {})[count] = of_both
    return shares


def definition(claim: ClaimConfig) -> str:
    if claim.kind == "forgetting":
        return f"{claim.first}: after each arrival - at the end"
    sign, at = {"difference": "-", "ratio": "/"}[claim.kind], f", {claim.at}" if claim.at else ""
    pairs = [f"{first} {sign} {second}: {column}" for first, second, column in claim.pairs]
    return ", ".join(pairs) or f"{claim.first} {sign} {claim.second}: {claim.over}{at}"


def interval_of(
    found: Mapping[str, Scored],
    pairs: Sequence[tuple[str, str | None, str]],
    kind: Kind = "difference",
    less: str | None = None,
) -> dict[str, Any]:
    """In points or per cent, over the seeds that all rows have; without a second row the first one's own scores. Both
    `less` the scores of a third row."""
    rows = {row for first, second, _ in pairs for row in (first, second, less) if row is not None}
    seeds = sorted(set.intersection(*(set(found[row].seeds) for row in rows)))
    if not seeds:
        return {"difference": None, "low": None, "high": None, "n_seeds": 0, "n_questions": 0}
    ours = [found[first].at(seeds, column) for first, _, column in pairs]
    theirs = [np.zeros_like(own) if second is None else found[second].at(seeds, column)
              for own, (_, second, column) in zip(ours, pairs, strict=True)]  # fmt: skip
    if less is not None:
        ours, theirs = ([own - found[less].at(seeds, c) for own, (*_, c) in zip(side, pairs, strict=True)]
                        for side in (ours, theirs))  # fmt: skip
    interval = paired_interval(ours, theirs, kind=kind)
    low, high = 100 * interval.low, 100 * interval.high
    counts = {"n_seeds": len(seeds), "n_questions": sum(scores.shape[1] for scores in ours)}
    return {"difference": 100 * interval.value, "low": low, "high": high, **counts}


def over_seeds(values: Sequence[float]) -> dict[str, float | None]:
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": float(mean(values)), "se": error}


def markdown(board: BoardConfig, record: Mapping[str, Any]) -> str:
    """Means with intervals, then columns, in per cent; below it the claims and what the marks mean."""
    if board.scale:
        return f"# {board.title}\n\n{scale_tables(record, board.scale.counts)}"
    reference = record["reference"]
    tables = [f"## {partition}\n\n{row_table(board, record, partition)}\n" for partition in board.partitions]
    table = "".join(tables) + FEDERATED if tables else row_table(board, record, "")
    claims = "".join(f"- `{name}` ({c['definition']}): {shown(c)}\n" for name, c in record["claims"].items())
    notes = (
        f"Scores in per cent. Differences to `{reference}` in points with 95 % intervals, paired, over questions and "
        f"seeds together. `*`: experts more than {SAME_SIZE:.0%} larger or smaller than those of `{reference}`; "
        "a router's parameters stand behind `+`.\n"
    )
    if board.presets:
        notes += (
            f"`merged`: {next(iter(board.means))} of the mean of the row's experts as one LoRA, at one seed; `step`, "
            f"`memory`: seconds of a training step and the process's peak, over those of `{reference}`; `tokens/s`: "
            "one core.\n"
        )
    return f"# {board.title}\n\n{table}\n{notes}\n{claims}{arrival_tables(board, record)}"


def scale_tables(record: Mapping[str, Any], counts: Sequence[int]) -> str:
    """A table for each measure: bases and rows down, numbers of skills across."""
    parts = ["Per cent, with 95 % intervals over questions and seeds together, paired; means over the skills.\n"]
    for measure, about in MEASURES.items():
        lines = [["base", "row", *(f"{count} skills" for count in counts)], ["---"] * (2 + len(counts))]
        for size, rows in record["scale"].items():
            for row, cells in rows.items():
                own = [cells.get(str(count), {}).get(measure) for count in counts]
                filled = ["" if i is None else "**{difference:.1f}** [{low:.1f}, {high:.1f}]".format(**i) for i in own]
                said = next(r["about"] for name, r in record["rows"].items() if name.partition("-")[0] == row)
                lines.append([size, f"`{row}` {said}", *filled])
        parts.append(f"## {about}\n\n{grid(lines)}")
    return "\n".join(parts)


def grid(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def costs_of(name: str, rows: Mapping[str, Any], reference: str, mean: str) -> list[str]:
    """What is left of a row as one LoRA, and its costs over the reference's; blank where nothing was measured."""
    row, other = rows[name], rows.get(reference, {})
    plain = rows.get(merged(name))
    ratios = [f"{row[key] / other[key]:.2f}" if key in row and key in other else "" for key in COSTS]
    speed = f"{row['tokens_per_cpu_second']:.0f}" if row["tokens_per_cpu_second"] else ""
    return [f"{plain['means'][mean]['difference']:.1f}" if plain else "", *ratios, speed]


def row_table(board: BoardConfig, record: Mapping[str, Any], partition: str) -> str:
    """Of the rows of a partition, or of all that are no arrival; with a partition also what a federation costs."""
    rows, reference = record["rows"], record["reference"]
    means, columns = [*board.means], [*record["questions"]]
    costs = ["merged", "step", "memory", "tokens/s"] if board.presets else []
    head = ["row", "seeds", "parameters", *means, *(f"{m} - {reference}" for m in means), *costs, *columns]
    head += ["forgotten", "MB sent", "rounds"] if partition else []
    lines = [head, ["---"] * len(head)]
    for name, row in rows.items():
        own, _, part = name.partition("@")
        if part != partition:
            continue
        label = f"`{own}`" + (f" {row['about']}" if row["about"] else "")
        cells = [label, str(len(row["seeds"])), size_of(row, rows.get(board.beside(name)))]
        cells += [f"**{row['means'][m]['difference']:.1f}**" for m in means]
        cells += [shown(row["against_reference"].get(m)) for m in means]
        cells += costs_of(name, rows, reference, means[0]) if costs else []
        cells += [f"{100 * row['columns'][c]['mean']:.1f}" for c in columns]
        if partition:
            rounds = row["rounds_to_central"]
            cells += [shown(row["forgotten"]), f"{row['megabytes']:.1f}" if row["megabytes"] else ""]
            cells += ["" if not rounds else "never" if None in rounds else f"{mean(rounds):.1f}"]
        lines.append(cells)
    return grid(lines)


def facts_of(board: BoardConfig, found: Mapping[str, Scored], row: str) -> dict[str, Any]:
    """What a federation forgot of what the base could do, what it sent, and by seed the first round in which its global
    model had ENOUGH of what the central mixture has at the end (none: None)."""
    partition, own = row.partition("@")[2], found[row]
    base, central = f"{BASE}@{partition}", found.get(f"{CENTRAL}@{partition}")
    lost = interval_of(found, [(base, row, c) for c in board.views["kept"]]) if base in found else None
    rounds = list[int | None]()
    if central is not None and own.scores[BY_ROUND].shape[1] > 1:
        for seed in (seed for seed in own.seeds if seed in central.seeds):
            enough = own.at([seed], BY_ROUND)[0] >= ENOUGH * central.at([seed], BY_ROUND)[0, -1]
            rounds.append(int(enough.argmax()) + 1 if enough.any() else None)
    return {"forgotten": lost, "megabytes": float(own.scores[SENT].mean()), "rounds_to_central": rounds}


def arrival_tables(board: BoardConfig, record: Mapping[str, Any]) -> str:
    """For every row that learns skills in turn, the scores after each arrival; a skill's own arrival is bold."""
    parts = []
    for name, lost in record["forgotten"].items():
        lines = [["after", *record["questions"]], ["---"] * (1 + len(record["questions"]))]
        for skill in board.arrivals:
            row = record["rows"][name if skill == board.arrivals[-1] else arrived(name, skill)]
            cells = {c: f"{100 * row['columns'][c]['mean']:.1f}" for c in record["questions"]}
            cells[skill] = f"**{cells[skill]}**"
            lines.append([skill, *cells.values()])
        parts.append(f"\n`{name}` {board.rows[name].about}: forgotten {shown(lost)}\n\n{grid(lines)}")
    return "".join(parts)


def shown(interval: Mapping[str, Any] | None) -> str:
    if interval is None or interval["difference"] is None:
        return ""
    return "{difference:+.1f} [{low:+.1f}, {high:+.1f}]".format(**interval)


def size_of(row: Mapping[str, Any], reference: Mapping[str, Any] | None) -> str:
    """The experts' parameters, marked where they are not the reference's, and the router's."""
    wanted = row["experts"] if reference is None else reference["experts"]
    mark = "" if abs(row["experts"] - wanted) <= SAME_SIZE * wanted else " *"
    router = f" + {row['router']:,}" if row["router"] else ""
    return f"{row['experts']:,}{mark}{router}"


def write_claims(results: Path) -> None:
    """boards.json: the claims of every board that has results."""
    claims, rows, commits = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    for name in board_names():
        if (record := read_scores(results_file(results, name, "json"))) is not None:
            claims |= record["claims"]
            commits[name] = record["commit"]
            rows[name] = {
                row: {column: 100 * own["columns"][column]["mean"] for column in record["questions"]}
                for row, own in record["rows"].items()
            }
    write_json(results / "boards.json", {"claims": claims, "rows": rows, "commit": git_commit(), "commits": commits})
