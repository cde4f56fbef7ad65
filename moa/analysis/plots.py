"""Images of a run: gates by task and layer, losses, the boards, and the style of every page.

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
from matplotlib.patches import Rectangle

from moa.files.atomic import atomic_file
from moa.routing.roles import NONE

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


def gate_heat_map(path: str | Path, routing: Mapping[str, Any], null_expert: bool = False) -> None:
    """Task, split where it has several experts, x expert; with a null expert the last column is its weight."""
    experts, per_task = routing["experts"], routing["per_kind"]
    values = np.array(list(per_task.values()))
    if null_expert:
        routed = values[:, [experts.index(name) for name in routing["choices"]]]
        experts = [*experts, NONE]
        values = np.column_stack([values, (1 - routed.sum(1)).clip(min=0)])
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


def board_chart(path: str | Path, board: Mapping[str, Any]) -> None:
    """The means of a board's JSON: each row's dot with its interval, its seeds beside it; partition by partition."""
    reference, parts = board["reference"], dict[str, dict[str, Any]]()
    for name, row in board["rows"].items():
        if (part := name.partition("@")[2]) in (board.get("partitions") or [""]):  # not rows of arrivals
            parts.setdefault(part, {})[name] = row
    sizes, rows = [len(rows) for rows in parts.values()], [row for rows in parts.values() for row in rows.values()]
    means, seeds = [*rows[0]["means"]], max(len(row["seeds"]) for row in rows)
    note = f"per cent; 95 % intervals over questions and up to {seeds} seeds; small dots: seeds; dashed: {reference}"
    height = 0.9 + 0.6 * len(parts) + 0.27 * sum(sizes)
    with page(path, 2.6 + 2.6 * len(means), height, board["title"], note) as figure:
        panels = figure.subplots(len(parts), len(means), sharey="row", squeeze=False, height_ratios=sizes)
        for (part, rows_of), line in zip(parts.items(), panels, strict=True):
            for number, (axes, name) in enumerate(zip(line, means, strict=True)):
                draw_mean(axes, name, rows_of, f"{reference}@{part}" if part else reference, color(number))
                axes.set_title(f"{name} ({part})".replace("_", " ") if part else name.replace("_", " "))


def draw_mean(axes: Axes, name: str, rows: Mapping[str, Any], reference: str, ink: str) -> None:
    found = [row["means"][name] for row in rows.values()]
    places, ends = range(len(rows)), list[float]()
    for place, (interval, row) in enumerate(zip(found, rows.values(), strict=True)):
        sure = max(interval["low"], 0.0), min(interval["high"], 100.0)
        axes.plot(sure, [place, place], color=ink, linewidth=1.6, alpha=0.6)
        of_seeds = [100 * value for value in row["means_by_seed"][name]]
        axes.scatter(of_seeds, [place] * len(of_seeds), s=6, color=MUTED, alpha=0.6, linewidths=0)
        ends += [*sure, *of_seeds]
        axes.text(max(sure[1], *of_seeds), place, f"  {interval['difference']:.1f}", va="center", fontsize=7.5)
    axes.scatter([interval["difference"] for interval in found], places, s=26, color=ink, zorder=3)
    if reference in rows:
        axes.axvline(rows[reference]["means"][name]["difference"], color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
    low, high = min(ends), max(ends)
    axes.set(xlim=(low - 2, high + 0.22 * (high - low) + 4), ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(places, [row["about"] or key for key, row in rows.items()])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(axis="x")


def scale_chart(path: str | Path, record: Mapping[str, Any]) -> None:
    """Of each base, what rows keep of one LoRA on mixed data and of the routed mixture, by number of skills."""
    bases, measures = record["scale"], {"of_mixed": "one LoRA on mixed data", "of_routed": "the routed mixture"}
    note = "share of the score, per cent, by number of skills; 95 % intervals"
    with page(path, 1.2 + 4.2 * len(bases), 6.6, record["title"], note) as figure:
        panels = figure.subplots(2, len(bases), sharex=True, sharey="row", squeeze=False)
        for (measure, about), line in zip(measures.items(), panels, strict=True):
            for (size, rows), axes in zip(bases.items(), line, strict=True):
                for number, (row, cells) in enumerate(rows.items()):
                    own = {int(count): cell[measure] for count, cell in cells.items() if measure in cell}
                    values = [interval["difference"] for interval in own.values()]
                    ends = [interval["high"] - interval["difference"] for interval in own.values()]
                    axes.errorbar([*own], values, ends, color=color(number), marker="o", markersize=3, label=row)
                counts = sorted({int(count) for cells in rows.values() for count in cells})
                axes.set_xscale("log", base=2)
                axes.set_xticks(counts, [str(count) for count in counts])
                axes.set_title(f"of {about} ({size} base)")
                axes.grid(axis="y")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False)


def client_heat_map(path: str | Path, record: Mapping[str, Any]) -> None:
    """Scores of the global model and of each client's on every data set; a client's own have a frame."""
    rows, columns = record["rows"], record["data_sets"]
    values = np.array([[100 * rows[row]["scores"][name] for name in columns] for row in rows])
    height = 1.4 + 0.26 * len(rows)
    about = "per cent of each data set; framed: a tenth or more of what the client trains on"
    with page(path, 2.2 + 0.8 * len(columns), height, "Clients and tasks", about) as figure:
        axes = figure.subplots()
        axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if value > 60 else INK)
            if rows[[*rows][row]]["own"].get(columns[column], 0) >= 0.1:
                frame: Any = {"fill": False, "edgecolor": PALETTE[1], "linewidth": 1.5}
                axes.add_patch(Rectangle((column - 0.47, row - 0.45), 0.94, 0.9, **frame))
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), [*rows])


def robustness_chart(path: str | Path, record: Mapping[str, Any]) -> None:
    """The mean of the data sets under each corruption by its strength, with 95 % intervals over questions."""
    found, clean = record["corruptions"], record["clean"]
    about = "mean of the data sets, per cent; 95 % intervals over questions; dotted: each data set"
    with page(path, max(2.4 * len(found) + 1.6, 6.0), 3.4, "Scores under corruption", about) as figure:
        panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for number, (axes, (name, own)) in enumerate(zip(panels, found.items(), strict=True)):
            rows = [clean, *own["strengths"].values()]
            strengths = [0.0, *map(float, own["strengths"])]
            for source in record["data_sets"]:
                values = [row["scores"][source] for row in rows]
                axes.plot(strengths, values, color=MUTED, linewidth=0.7, linestyle=(0, (1, 2)))
            low, value, high = ([row["mean"][key] for row in rows] for key in ("low", "value", "high"))
            axes.fill_between(strengths, low, high, color=color(number), alpha=0.18, linewidth=0)
            axes.plot(strengths, value, color=color(number), linewidth=1.6, marker="o", markersize=3.5)
            axes.set(title=name, xlabel=own["unit"], ylim=(0, 102), xlim=(0, strengths[-1] * 1.02))
            axes.grid(axis="y")
            if number == len(found) - 1:
                label_ends(axes, [(rows[-1]["scores"][source], source, MUTED) for source in record["data_sets"]])


def mixing_chart(path: str | Path, record: Mapping[str, Any]) -> None:
    """What each pair of experts loses at half the gate each, over the share of signs in which they disagree."""
    about = "points at half the gate each, over each alone on its own data; 95 % intervals over questions"
    with page(path, 6.4, 4.2, "Signs and mixing", about) as figure:
        axes = figure.subplots()
        for pair in record["pairs"]:
            x, fall = 100 * pair["sign_disagreement"], pair["fall"]
            axes.plot([x, x], [fall["low"], fall["high"]], color=PALETTE[0], linewidth=1.6, alpha=0.4)
            axes.scatter([x], [fall["value"]], color=PALETTE[0], s=26, zorder=3)
            axes.annotate(f" {', '.join(pair['experts'])}", (x, fall["value"]), fontsize=7.5, va="center")
        axes.set(xlabel="signs that disagree, per cent (50: by chance)", ylabel="change of the score")
        axes.axhline(0, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.margins(x=0.2)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's log.jsonl, if any, without a last line that a kill cut short; ValueError for others."""
    rows = []
    lines = Path(path).read_text().splitlines() if Path(path).is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not JSON ({error})") from None
            break
        if not isinstance(rows[-1], dict):
            raise ValueError(f"{path}:{number}: is no object")
    return rows
