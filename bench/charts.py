"""Charts of the benchmarks' figures in the house style: one pair of axes a panel, series named once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moa.analysis.plots import INK, color, page

Series = Mapping[str, Mapping[int, float]]  # name -> x -> y


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Lines over one quantity, counted in doublings."""

    x: str
    y: str
    series: Series


def line_panels(
    path: str | Path, rows: Sequence[Sequence[Panel]], *, title: str, subtitle: str
) -> None:
    """A grid of panels to one PNG; a series has one colour and one marker in all of them.

    The first series lies on top, in smaller marks, so that an equal one shows around it.
    """
    names = list(dict.fromkeys(name for row in rows for panel in row for name in panel.series))
    columns = max(map(len, rows))
    with page(path, 2.9 * columns, 2.3 * len(rows) + 0.9, title, subtitle) as figure:
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for axes_row, row in zip(grid, rows, strict=True):
            for axes, panel in zip(axes_row, row, strict=True):
                for name, points in panel.series.items():
                    place = names.index(name)
                    axes.plot(
                        list(points),
                        list(points.values()),
                        color=color(place),
                        marker="osD^v"[place % 5],
                        markersize=4 + 1.5 * min(place, 1),
                        zorder=10 - place,
                        label=name,
                    )
                axes.set_xscale("log", base=2)
                ticks = sorted({x for points in panel.series.values() for x in points})
                axes.set_xticks(ticks, [str(tick) for tick in ticks])
                axes.minorticks_off()
                axes.set_ylim(0, 1.08 * max(max(ys.values()) for ys in panel.series.values()))
                axes.set_xlabel(panel.x)
                axes.set_title(panel.y)
                axes.grid(axis="y")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=len(names), frameon=False,
                      labelcolor=INK)  # fmt: skip
