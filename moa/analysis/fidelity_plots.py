"""The images of a fidelity report, each from the record of `moa.merging.report.fidelity.measure` to one PNG.

Red is a conflict and blue an agreement in every coloured table; every cell also has its number.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from moa.analysis.plots import INK, MUTED, color, page

Record = Mapping[str, Any]
MANY_PAIRS = 8  # more do not fit on a laptop's screen
WIDTH = 9.6  # inches; the page shows 150 dots per inch at up to 960 pixels


def largest_site(record: Record) -> str:
    return max(record["sites"], key=lambda name: sum(n * n for n in record["sites"][name]["norms"]))


def pairs_of(record: Record) -> list[tuple[int, int]]:
    """Every pair of experts, the lowest cosine first."""
    count, cosine = len(record["experts"]), record["total"]["cosine"]
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    return sorted(pairs, key=lambda pair: cosine[pair[0]][pair[1]])


def pairwise(row: Mapping[str, Any], key: str) -> np.ndarray:
    """What a record has of every pair; NaN, which stays blank, of two that change no site in common."""
    values = np.array(row[key], dtype=float)
    values[np.isnan(np.array(row["sign_disagreement"], dtype=float))] = np.nan
    return values


def short(name: str) -> str:
    return name.removeprefix("model.").removeprefix("language_model.")


def number(value: float) -> str:
    """Two digits, and no minus before a zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def draw_pairs(path: Path, record: Record) -> None:
    names, total = record["experts"], record["total"]
    with page(path, WIDTH, 1.8 + 0.42 * len(names), "Which experts fight", "all sites") as figure:
        panels = figure.subplots(1, 3, sharey=True)
        for axes, key in zip(panels, ("cosine", "sign_disagreement", "overlap"), strict=True):
            values = pairwise(total, key)[1:, :-1]
            values[np.triu_indices(len(values), 1)] = np.nan
            axes.set_title(key.replace("_", " "))
            _table(axes, values, names[1:], names[:-1], key)


def draw_where(path: Path, record: Record) -> None:
    """Cosine in each layer of the pairs that meet most, and the share of mass that cancels there."""
    names, layers, cosine = record["experts"], record["layers"], record["total"]["cosine"]
    most = sorted(pairs_of(record), key=lambda p: -abs(cosine[p[0]][p[1]]))[:MANY_PAIRS]
    pairs = [pair for pair in pairs_of(record) if pair in most]
    heads = [f"{names[i]}\n{names[j]}" for i, j in pairs]
    values = [[pairwise(row, "cosine")[pair] for pair in pairs] for row in layers.values()]
    with page(path, WIDTH, 1.9 + 0.27 * len(layers), "Where they fight", "by layer") as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
        left.set_title("cosine of a pair" + ", those that meet most" * (len(pairs) == MANY_PAIRS))
        _table(left, np.array(values), [short(name) for name in layers], heads, "cosine")
        right.set_title("mass that cancels")
        right.barh(range(len(layers)), [row["sign_conflict"] for row in layers.values()], color=MUTED, height=0.6)
        right.set(xlim=(0, 1), xlabel="share, in a plain sum of all")


def draw_layers(path: Path, record: Record) -> None:
    """The norm of each expert's update by layer, and its retention where there is a merge."""
    names, layers = record["experts"], record["layers"]
    merged = "merged" in record["total"]
    rows = [short(name) for name in layers]
    title = "What was kept of each expert" if merged else "How large each expert's update is"
    width = WIDTH if merged else WIDTH * 0.6
    with page(path, width, 1.8 + 0.27 * len(layers), title, "by layer") as figure:
        panels = figure.subplots(1, 2 if merged else 1, sharey=True, squeeze=False)[0]
        panels[0].set_title("norm of the update")
        _table(panels[0], np.array([row["norms"] for row in layers.values()]), rows, names, "norms")
        if merged:
            kept = [row["merged"]["retention"] for row in layers.values()]
            panels[1].set_title("retention")
            _table(panels[1], np.array(kept, dtype=float), rows, names, "retention")


def draw_spectra(path: Path, record: Record) -> None:
    """Singular values of each expert, and before and after the method, with the ratio at each index."""
    site = largest_site(record)
    row, merged = record["sites"][site], record["sites"][site].get("merged")
    with page(path, WIDTH, 3.6, "Singular values", site) as figure:
        panels = figure.subplots(1, 2 if merged else 1, squeeze=False)[0]
        for index, values in enumerate(row["singular_values"]):
            if not values:  # the expert lacks this site
                continue
            _line(panels[0], values, color=color(index), label=record["experts"][index], lw=1.2)
        if merged:
            before, after = merged["singular_values_of_sum"], merged["singular_values"]
            _line(panels[0], before, color=MUTED, ls=":", label="weighted sum, before the method")
            _line(panels[0], after, color=INK, lw=2, label="result")
            count = min(len(before), len(after))
            ratio = np.array(after[:count]) / np.maximum(np.array(before[:count]), 1e-300)
            _line(panels[1], ratio, color=INK, marker=".")
            panels[1].axhline(1, color=MUTED, ls=":", lw=1)
            panels[1].set_title("scaling: result / weighted sum")
            panels[1].set(xlabel="index", ylim=(0, min(max(1.2, 1.2 * ratio.max(initial=0)), 10)))
        panels[0].set_title("before and after the method" if merged else "each expert")
        panels[0].set(yscale="log", xlabel="index", ylabel="singular value")
        panels[0].legend(frameon=False, fontsize=8)


def draw_pruning(path: Path, record: Record) -> None:
    """The strongest expert's singular values after pruning and scaling, and every expert's scales."""
    site = largest_site(record)
    row, view = record["sites"][site], record["views"][site]
    names, strongest = record["experts"], int(np.argmax(row["norms"]))
    kept = view["pruned"][strongest]
    with page(path, WIDTH, 3.6, "What pruning by magnitude does to an expert", site) as figure:
        left, right = figure.subplots(1, 2)
        _line(left, row["singular_values"][strongest], color=INK, label="before")
        _line(left, kept["singular_values"], color=color(0), ls="--",
              label=f"largest {view['density']:.0%} of A and of B kept")  # fmt: skip
        _line(left, kept["scaled"], color=color(5), ls=":", lw=2, label="and scaled")
        left.set_title(f"singular values of {names[strongest]}")
        left.set(yscale="log", xlabel="index", ylabel="singular value")
        left.legend(frameon=False, fontsize=8)
        for index, pruned in enumerate(view["pruned"]):
            if pruned is not None:
                _line(right, pruned["scales"], color=color(index), marker=".", label=names[index])
        right.set_title("scaling coefficient of each rank")
        right.set(xlabel="row of A", ylabel="sum of |A| before / after")
        right.legend(frameon=False, fontsize=8)


def draw_values(path: Path, record: Record) -> None:
    """Distribution of the values of A, B and the update at one site, in standard deviations."""
    site = largest_site(record)
    styles = {"A": (color(0), "--"), "B": (color(1), "-."), "update": (color(5), "-")}
    with page(path, WIDTH * 0.7, 3.6, "Values of A, B and the full update", site) as figure:
        axes = figure.subplots()
        for name, histogram in record["views"][site]["histograms"].items():
            share = np.array(histogram["share"])
            places = np.linspace(-4, 4, len(share) + 1)
            middle = (places[1:] + places[:-1]) / 2
            beyond = share[np.abs(middle) > 3].sum()
            ink, line = styles[name]
            drawn = np.where(share > 0, share, np.nan)[1:-1]  # the outer bins hold all beyond
            axes.plot(middle[1:-1], drawn, color=ink, ls=line, lw=1.6,
                      label=f"{name}: {beyond:.1%} beyond 3, one is {histogram['limit'] / 4:.2g}")  # fmt: skip
        bell = np.exp(-(middle**2) / 2)
        axes.plot(middle, bell / bell.sum(), color=MUTED, lw=1, ls=":", label="normal: 0.3% beyond 3")
        axes.set(yscale="log", xlabel="value in standard deviations")
        axes.set_ylabel("share of values")
        axes.legend(frameon=False, fontsize=8)


def _line(axes: Axes, values: Sequence[float] | np.ndarray, **style: Any) -> None:
    axes.plot(range(1, len(values) + 1), values, **style)


# key -> (colour map, lowest, highest, how a value is written), from the largest magnitude
_SCALES: dict[str, Callable[[float], tuple[str, float, float, Callable[[float], str]]]] = {
    "cosine": lambda v: ("RdBu", -max(0.3, v), max(0.3, v), number),
    "sign_disagreement": lambda v: ("RdBu_r", 0.2, 0.8, "{:.0%}".format),
    "overlap": lambda v: ("Blues", 0.0, 1.0, number),
    "norms": lambda v: ("Greys", 0.0, 1.6 * v, "{:.3g}".format),
    "retention": lambda v: ("RdBu", -1.0, 1.0, number),
}


def _table(axes: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], key: str) -> None:
    cmap, low, high, text = _SCALES[key](np.nan_to_num(np.abs(values)).max())
    image = axes.imshow(values, cmap=cmap, vmin=low, vmax=high, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.spines[:].set_visible(False)
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            bright = float(np.dot(image.to_rgba(value)[:3], (0.2126, 0.7152, 0.0722)))  # luma, ITU-R BT.709
            ink = INK if bright > 0.5 else "white"
            axes.text(j, i, text(float(value)), ha="center", va="center", fontsize=8, color=ink)
