"""Charts of what the benchmarks measured, in the house style: series are named once for all panels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moa.analysis.plots import INK, color, page

Panel = tuple[str, str, Mapping[str, Mapping[int, float]]]  # x axis, title, series -> x -> y


def line_panels(path: str | Path, rows: Sequence[Sequence[Panel]], *, title: str, subtitle: str) -> None:
    """A grid of panels to one PNG; x is counted in doublings, a series looks the same in all panels.

    The first series lies on top, in smaller marks, so that an equal one shows around it.
    """
    names = list(dict.fromkeys(name for row in rows for _, _, series in row for name in series))
    columns = max(map(len, rows))
    with page(path, 2.9 * columns, 2.3 * len(rows) + 0.9, title, subtitle) as figure:
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for axes_row, row in zip(grid, rows, strict=True):
            for axes, (x, y, series) in zip(axes_row, row, strict=True):
                for name, points in series.items():
                    place = names.index(name)
                    look: dict[str, Any] = {"color": color(place), "marker": "osD^v"[place % 5]}
                    look |= {"markersize": 4 + 1.5 * min(place, 1), "zorder": 10 - place}
                    axes.plot(list(points), list(points.values()), label=name, **look)
                ticks = sorted({at for points in series.values() for at in points})
                axes.set_xscale("log", base=2)
                axes.set_xticks(ticks, [str(tick) for tick in ticks])
                axes.minorticks_off()
                axes.set_ylim(0, 1.08 * max(max(points.values()) for points in series.values()))
                axes.set_xlabel(x)
                axes.set_title(y)
                axes.grid(axis="y")
        handles, labels = grid[0][0].get_legend_handles_labels()
        where: dict[str, Any] = {"loc": "outside lower left", "ncols": len(names)}
        figure.legend(handles, labels, labelcolor=INK, frameon=False, **where)
