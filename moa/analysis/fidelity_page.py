"""One self-contained HTML page about a merge: which experts fight, where, and what was lost.

Drawn from the record of `moa.merging.fidelity.measure`, with or without a merge in it.
"""

import base64
import html
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from moa.analysis.plots import FAINT, INK, MUTED, color, page

Record = Mapping[str, Any]
STYLE = f"""
body {{ font: 15px/1.5 system-ui, sans-serif; color: {INK}; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .25rem .75rem; border-bottom: 1px solid {FAINT}; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }} img {{ max-width: 100%; }} p {{ color: {MUTED}; }}
"""
# A newcomer's reading of each picture.
NOTES = {
    "pairs": "Cosine: 1 where two experts want the same change, -1 where they undo each other, 0 where they do not "
    "meet. Overlap: the share of directions that both use, whatever they do there.",
    "layers": "Retention: 1 where the merged update still does all that the expert did along its own direction, "
    "below 0 where it does the opposite.",
    "conflict": "Mass that cancels because experts disagree in sign, entry by entry: 0 none, 1 all.",
    "spectra": "Singular values of the site where the updates are largest: each expert's, those of the plain weighted "
    "sum, and the result's; below, the result's over the sum's at each index.",
    "values": "Values of all experts' A, B and full updates at that site, in standard deviations: factors are often "
    "heavy-tailed where their product is more so, which is what pruning by magnitude relies on.",
}


def write_page(path: str | Path, record: Record, about: Mapping[str, Any]) -> None:
    """Write the page of a fidelity record; `about` is what the merge was, by name, for its head."""
    site = max(record["sites"], key=lambda name: sum(n * n for n in record["sites"][name]["norms"]))
    with_merge = "merged" in record["total"]
    pictures: dict[str, Callable[[Path], None]] = {"pairs": lambda file: draw_pairs(file, record)}
    pictures["layers"] = lambda file: draw_layers(file, record)
    pictures["conflict"] = lambda file: draw_conflict(file, record)
    pictures["spectra"] = lambda file: draw_spectra(
        file, site, record["sites"][site], record["experts"]
    )
    pictures["values"] = lambda file: draw_values(file, site, record["sites"][site])
    parts = [
        f"<h1>{'Merge' if with_merge else 'Experts'}: {html.escape(', '.join(record['experts']))}</h1>"
    ]
    parts += [
        "".join(f"<p>{html.escape(line)}</p>" for line in findings(record)),
        _about_table(about),
    ]
    if with_merge:
        parts.append(_outcome_table(record))
    with tempfile.TemporaryDirectory() as folder:
        for name, draw in pictures.items():
            file = Path(folder) / f"{name}.png"
            draw(file)
            data = base64.b64encode(file.read_bytes()).decode()
            parts.append(f'<img alt="{name}" src="data:image/png;base64,{data}">')
            parts.append(f"<p>{html.escape(NOTES[name])}</p>")
    head = f'<!doctype html><meta charset="utf-8"><title>merge report</title><style>{STYLE}</style>'
    Path(path).write_text(head + "\n".join(parts), encoding="utf-8")


def findings(record: Record) -> list[str]:
    """What a reader should know first, in sentences."""
    names, total = record["experts"], record["total"]
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]
    lines = []
    if pairs:
        i, j = min(pairs, key=lambda p: total["cosine"][p[0]][p[1]])
        layer = min(record["layers"], key=lambda name: record["layers"][name]["cosine"][i][j])
        there = record["layers"][layer]["cosine"][i][j]
        lines.append(
            f"{names[i]} and {names[j]} agree least: cosine {total['cosine'][i][j]:.2f} over all sites, "
            f"{there:.2f} in {layer}."
        )
        worst = max(record["layers"], key=lambda name: record["layers"][name]["sign_conflict"])
        lines.append(
            f"Signs cancel {total['sign_conflict']:.0%} of the experts' mass; most in {worst}: "
            f"{record['layers'][worst]['sign_conflict']:.0%}."
        )
    if "merged" in total:
        kept = total["merged"]["retention"]
        low = int(np.argmin(kept))
        lines.append(
            f"Of {names[low]} the merge keeps least: {kept[low]:.0%} along its own direction."
        )
        lines.append(
            f"The rank cut off {total['merged']['cut_by_rank']:.1%} of the result's energy; "
            f"{total['merged']['outside_span']:.1%} of it lies outside of what the experts span."
        )
    zero = sum(sum(row["zero_rows"]) for row in record["sites"].values())
    if zero:
        lines.append(f"{zero} rows of A are zero: ranks that do nothing.")
    return lines


def _about_table(about: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>"
        for key, value in about.items()
    )
    return f"<table>{rows}</table>"


def _outcome_table(record: Record) -> str:
    total, merged = record["total"], record["total"]["merged"]
    head = "<tr><th>expert</th><th>norm</th><th>retention</th><th>energy in the result's span</th></tr>"
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{norm:.3g}</td><td>{kept:.3f}</td><td>{span:.3f}</td></tr>"
        for name, norm, kept, span in zip(
            record["experts"],
            total["norms"],
            merged["retention"],
            merged["energy_in_span"],
            strict=True,
        )
    )
    return f"<h2>What became of each expert</h2><table>{head}{rows}</table>"


def draw_pairs(path: Path, record: Record) -> None:
    """Cosine and overlap of every pair, over all sites."""
    size = 2.2 + 0.55 * len(record["experts"])
    with page(path, 2 * size, size + 0.6, "Which experts meet") as figure:
        for axes, name in zip(figure.subplots(1, 2), ("cosine", "overlap"), strict=True):
            low = -1.0 if name == "cosine" else 0.0
            _table(axes, np.array(record["total"][name]), record["experts"], record["experts"], low)
            axes.set_title(name)


def draw_layers(path: Path, record: Record) -> None:
    """Each expert's retention by layer, or, without a merge, the norm of its update."""
    names, layers = record["experts"], record["layers"]
    merged = "merged" in record["total"]
    rows = [row["merged"]["retention"] if merged else row["norms"] for row in layers.values()]
    title = "Retention by layer" if merged else "Norm of the updates by layer"
    with page(path, 4 + 0.7 * len(names), 1.4 + 0.3 * len(layers), title) as figure:
        low = -1.0 if merged else 0.0
        labels = [_short(layer) for layer in layers]
        _table(figure.subplots(), np.array(rows, dtype=float), labels, names, low)


def draw_conflict(path: Path, record: Record) -> None:
    layers = {_short(name): row["sign_conflict"] for name, row in record["layers"].items()}
    with page(path, 7.0, 1.2 + 0.25 * len(layers), "Mass that cancels, by layer") as figure:
        axes = figure.subplots()
        axes.barh(list(layers), list(layers.values()), color=color(1), height=0.7)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)


def draw_spectra(path: Path, site: str, row: Record, names: Sequence[str]) -> None:
    """Singular values of one site: each expert's, and before and after the method."""
    merged = row.get("merged")
    with page(path, 8.0, 5.2 if merged else 3.2, "Singular values", site) as figure:
        grid = figure.subplots(2 if merged else 1, 1, squeeze=False, sharex=True)[:, 0]
        for index, (name, values) in enumerate(zip(names, row["singular_values"], strict=True)):
            grid[0].plot(range(1, len(values) + 1), values, color=color(index), label=name, lw=1)
        if merged:
            before, after = merged["singular_values_of_sum"], merged["singular_values"]
            places = range(1, len(before) + 1)
            grid[0].plot(places, before, color=MUTED, ls=":", label="weighted sum")
            grid[0].plot(range(1, len(after) + 1), after, color=INK, lw=2, label="result")
            count = min(len(before), len(after))
            ratio = np.array(after[:count]) / np.maximum(np.array(before[:count]), 1e-300)
            grid[1].plot(range(1, count + 1), ratio, color=INK, marker=".")
            grid[1].set_ylabel("result / sum")
            grid[1].set_ylim(0, min(max(2.0, 1.1 * float(np.median(ratio))), 10.0))
        grid[0].legend(frameon=False)
        grid[-1].set_xlabel("index")


def draw_values(path: Path, site: str, row: Record) -> None:
    """Distribution of the values of A, B and the update at one site."""
    with page(path, 9.0, 3.0, "Values", site) as figure:
        for axes, (name, histogram) in zip(
            figure.subplots(1, 3, sharey=True), row["histograms"].items(), strict=True
        ):
            places = np.linspace(-4, 4, len(histogram["share"]))
            axes.bar(places, histogram["share"], width=8 / len(places), color=color(0))
            axes.set_yscale("log")
            axes.set_title(f"{name}: one deviation is {histogram['limit'] / 4:.2g}")


def _table(
    axes: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], low: float
) -> None:
    """Numbers in coloured cells; a diverging scale where they may be negative."""
    top = max(1.0, float(np.abs(values).max())) if low == 0 else 1.0
    axes.imshow(
        values, cmap="RdBu" if low < 0 else "Blues", vmin=low * top, vmax=top, aspect="auto"
    )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    for (i, j), value in np.ndenumerate(values):
        strong = abs(value) > 0.6 * top
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if strong else INK)


def _short(layer: str) -> str:
    return layer.removeprefix("model.")
