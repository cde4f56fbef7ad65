"""Images of a run: gates by task and layer, losses, the scoreboard, and the style of every page.

Each function takes records (as the JSON files hold them) and a path, and writes one PNG. Colours are
Okabe and Ito's, which stay apart for colour-blind readers; series carry their names beside them.
"""

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from moa.config import NONE
from moa.files.atomic import atomic_file

matplotlib.use("Agg")

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D31", "#5A5A5A")
INK, MUTED, FAINT = "#1C2430", "#667080", "#E3E7EC"
STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "figure.facecolor": "white",
    "axes.edgecolor": FAINT, "axes.labelcolor": MUTED, "axes.titlecolor": INK, "axes.titlesize": 10,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.major.size": 0, "ytick.major.size": 0, "grid.color": FAINT, "savefig.dpi": 150,
}  # fmt: skip


@contextmanager
def page(path: str | Path, width: float, height: float, title: str, subtitle: str = ""):
    """A figure of `width` x `height` inches in the house style, written to `path` at the end."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # OCR may read a script the font lacks
        head = 0.72 if subtitle else 0.45  # inches kept free for the heading
        layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - head / height), wspace=0.03)
        figure = Figure(figsize=(width, height), layout=layout)
        left, first, second = 0.1 / width, 1 - 0.1 / height, 1 - 0.39 / height
        figure.text(left, first, title, fontsize=13, fontweight="bold", va="top")
        figure.text(left, second, subtitle, fontsize=9, color=MUTED, va="top")
        yield figure
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format=Path(path).suffix[1:])


def color(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


# -- Gates ----------------------------------------------------------------------------------------


def gate_heat_map(path: str | Path, routing: Mapping[str, Any], null_expert: bool = False) -> None:
    """Task, split where it has several experts, x expert; with a null expert the last column is its weight."""
    experts, per_task = routing["experts"], routing["per_kind"]
    values = np.array(list(per_task.values()))
    if null_expert:
        experts = [*experts, NONE]
        values = np.column_stack([values, (1 - values.sum(1)).clip(min=0)])
    size = 2.6 + 0.85 * len(experts), 1.75 + 0.48 * len(per_task)
    parts = [f"I(task; expert) = {routing['mutual_information']:.2f} bits"]
    if routing.get("routing_accuracy") is not None:
        parts.append(f"own expert first: {routing['routing_accuracy']:.0%}")
    with page(path, max(size[0], 5.6), size[1], "Mean gate by task", "   ·   ".join(parts)) as fig:
        axes = fig.add_subplot()
        _heat(axes, values)
        axes.set_xticks(range(len(experts)), experts)
        names = [f"{t} (held out)" if t in routing["held_out"] else t for t in per_task]
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(labelcolor=INK)
        for (row, column), value in np.ndenumerate(values):
            ink = "white" if value > 0.55 * max(values.max(), 1) else INK
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink)


def _heat(axes: Axes, values: np.ndarray) -> Any:
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=max(1.0, values.max()), aspect="auto")
    axes.xaxis.tick_top()
    axes.spines[:].set_visible(False)
    rows, columns = values.shape
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    return image


def layer_heat_map(path: str | Path, routing: Mapping[str, Any], sites: Sequence[str]) -> None:
    """Task x expert x layer: one panel a task; the sites of one layer are averaged."""
    if "per_site" not in routing:
        raise ValueError("layer_heat_map: these gates are shared over sites (router.per_site=false)")
    layers = layer_groups(sites)
    experts, per_site = routing["experts"], routing["per_site"]
    width = 1.4 + len(per_site) * (0.7 + 0.42 * len(experts))
    height = 1.9 + 0.26 * len(layers)
    with page(path, max(width, 5.6), height, "Mean gate by task and layer") as figure:
        panels = figure.subplots(1, len(per_site), sharey=True, squeeze=False)[0]
        for axes, (task, values) in zip(panels, per_site.items(), strict=True):
            array = np.array(values)
            image = _heat(axes, np.stack([array[rows].mean(0) for rows in layers.values()]))
            axes.set_title(task, pad=8)
            axes.set_xticks(range(len(experts)), experts, rotation=45, ha="left", fontsize=8)
            axes.set_yticks(range(len(layers)), list(layers), fontsize=8)
        figure.colorbar(image, ax=list(panels), label="gate", shrink=0.7, aspect=30)


def layer_groups(sites: Sequence[str]) -> dict[str, list[int]]:
    """`language 3` -> the positions of its sites; a site outside any layer is a group of its own."""
    groups: dict[str, list[int]] = {}
    for position, site in enumerate(sites):
        found = re.search(r"(vision|language)?[^.]*\.(?:[\w]+\.)*?layers\.(\d+)\.", site)
        part = "vision" if "vision" in site else "language"
        name = f"{part} {found.group(2)}" if found else site.rsplit(".", 2)[-2]
        groups.setdefault(name, []).append(position)
    return groups


# -- Losses ---------------------------------------------------------------------------------------


def loss_curves(path: str | Path, rows: Iterable[Mapping[str, Any]], experts: Sequence[str] = ()) -> None:
    """Loss per task over steps, pale, their running mean strong; a task called as an expert has its colour."""
    rows = [row for row in rows if any(key.startswith("loss/") for key in row)]
    if not rows:
        raise ValueError("loss_curves: the log holds no row with a loss per task (loss/<task>)")
    found = {key for row in rows for key in row if key.startswith("loss/")}
    tasks = [key for name in experts if (key := f"loss/{name}") in found]
    tasks += sorted(found.difference(tasks))
    numbers = {f"loss/{name}": number for number, name in enumerate(experts)}
    numbers = {task: numbers.get(task, len(experts) + i) for i, task in enumerate(tasks)}
    steps = np.arange(len(rows))  # stages count their own steps: rows are in order of time
    with page(path, 8.6, 4.4, "Training loss by task") as figure:
        axes = figure.add_subplot()
        ends = []
        for task, number in numbers.items():
            values = np.array([float(row.get(task, np.nan)) for row in rows])
            known = np.isfinite(values)
            smooth = running_mean(values[known], max(len(rows) // 30, 1))
            axes.plot(steps[known], values[known], color=color(number), alpha=0.18, linewidth=0.8)
            axes.plot(steps[known], smooth, color=color(number), linewidth=2)
            ends.append((smooth[-1], task.removeprefix("loss/"), color(number)))
        highest = np.nanquantile([float(row[t]) for row in rows for t in tasks if t in row], 0.995)
        axes.set(xlim=(0, len(rows) - 1 or 1), ylim=(0, highest * 1.08), xlabel="optimiser steps")
        axes.set_ylabel("loss per answer token (nats)")
        axes.grid(axis="y")
        label_ends(axes, ends)
        mark_stages(axes, [str(row.get("stage", "")) for row in rows])


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of up to `window` values before and at each place."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names beside the ends of the lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    least, place = (high - low) * 0.055, -np.inf
    for value, name, ink in sorted(ends):
        place = max(value, place + least)
        axes.annotate(f"{name} {value:.2f}", (1.01, place), xycoords=("axes fraction", "data"),
                      color=ink, va="center", weight="bold", annotation_clip=False)  # fmt: skip


def mark_stages(axes: Axes, stages: Sequence[str]) -> None:
    starts = [i for i in range(len(stages)) if i == 0 or stages[i] != stages[i - 1]]
    for start in starts:
        if start:
            axes.axvline(start, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.annotate(f" {stages[start]}", (start, 1.01), xycoords=("data", "axes fraction"),
                      color=MUTED, va="bottom")  # fmt: skip


# -- Scoreboard -----------------------------------------------------------------------------------

FAMILIES = {"base": "#5A5A5A", "lora": "#8C96A3", "oracle": "#009E73", "router": "#0072B2",
            "merged": "#CC79A7"}  # fmt: skip


def scoreboard_chart(path: str | Path, board: Mapping[str, Any]) -> None:
    """Every score column of results/scoreboard.json as bars with one standard error."""
    rows = board["rows"]
    columns = list(dict.fromkeys(c for row in rows.values() for c in row if is_score(rows, c)))
    columns.sort(key=lambda column: column != "trained_mean")
    across = min(5, len(columns))
    down = -(-len(columns) // across)
    seeds = len(board.get("seeds", ()))
    note = f"mean over {seeds} seeds, bars of one standard error" if seeds else ""
    height = down * (0.55 + 0.21 * len(rows)) + 0.8
    with page(path, 2.1 + 2.15 * across, height, "Scoreboard", note) as figure:
        panels = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
        for axes, column in zip(panels, columns, strict=False):
            draw_column(axes, column, rows)
        for axes in panels[len(columns) :]:
            axes.axis("off")


def is_score(rows: Mapping[str, Any], column: str) -> bool:
    """Scores are in [0, 1]; parameters and speeds need another axis."""
    means = [row[column]["mean"] for row in rows.values() if column in row]
    return all(mean is not None and 0 <= mean <= 1 for mean in means)


def draw_column(axes: Axes, column: str, rows: Mapping[str, Any]) -> None:
    names = list(rows)
    means = [rows[name].get(column, {}).get("mean", np.nan) for name in names]
    errors = [rows[name].get(column, {}).get("se") or 0.0 for name in names]
    places = range(len(names))
    inks = [next((c for f, c in FAMILIES.items() if n.startswith(f)), INK) for n in names]
    axes.barh(places, means, color=inks, height=0.7)
    axes.errorbar(means, places, xerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=1.5)
    axes.set(xlim=(0, 1.2), ylim=(len(names) - 0.4, -0.6), xticks=[0, 0.5, 1])
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_title(column.replace("_", " "))
    axes.grid(axis="x")
    best = np.nanmax(means)
    for place, mean, error in zip(places, means, errors, strict=True):
        if np.isfinite(mean):
            weight = "bold" if mean == best else "normal"
            axes.text(mean + error + 0.02, place, f"{mean:.2f}", va="center", fontsize=7.5,
                      color=INK, weight=weight)  # fmt: skip


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's log.jsonl, if there is one; a last line cut short by a kill is left out."""
    rows = []
    lines = Path(path).read_text().splitlines() if Path(path).is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not JSON ({error})") from None
    return rows
