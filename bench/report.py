"""Tables and charts of what the benchmarks left in results/bench_*.json.

    python -m bench.report

Writes results/benchmarks.md, results/bench_mixture.png and results/bench_generation.png. `make bench` runs it last.
What was not measured is left out, and named as such.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.settings import ROOT
from moa.files.atomic import write_file

RESULTS = ROOT / "results"
Table = Mapping[str, Mapping[str, float]]  # row -> column -> number
SIZES = {"small": "4 layers of width 512", "slice7b": "a layer of LLaVA-7B"}
Panel = tuple[str, str, Mapping[str, Mapping[int, float]]]  # x axis, title, series -> x -> y


def line_panels(path: str | Path, rows: Sequence[Sequence[Panel]], *, title: str, subtitle: str) -> None:
    """Panels to one PNG; x in doublings, a series alike in all panels, the first on top in smaller marks."""
    from moa.analysis.plots import INK, color, page

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


def read(name: str) -> dict[str, Any] | None:
    file = RESULTS / f"bench_{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def transposed(table: Table) -> dict[str, dict[str, float]]:
    columns = dict.fromkeys(column for cells in table.values() for column in cells)
    return {c: {row: cells[c] for row, cells in table.items() if c in cells} for c in columns}


def mixture(found: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    steps = {f"step, over {name}": c for name, c in transposed(found["step_ours_over"]).items()}
    yield "Our time over theirs, by experts:", steps | {"layer, over lora": found["layer_ours_over_lora"]}
    kept = {
        count: {f"step, {n}": r["MiB"] for n, r in step.items() if n != "frozen" and "MiB" in r}
        for count, step in found["step"].items()
    }
    yield "MiB kept for the backward pass:", transposed(kept)


def mechanisms(found: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    for count, table in found["over_lora"].items():
        yield f"{count} experts, a step over one LoRA by PEFT of their total rank:", table


def generation(found: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    for count, batches in found["tokens_over_merged"].items():
        yield f"{count} experts, tokens/s over those of the merged model, by batch:", transposed(batches)


def every_number(found: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    def flat(part: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
        for key, value in part.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{prefix}{key}, ")
            elif isinstance(value, int | float):
                yield prefix + key, value

    rest = {key: value for key, value in found.items() if key != "where"}
    yield "", {name: {"": value} for name, value in flat(rest)}


# File -> title and tables
SECTIONS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Iterator[tuple[str, Table]]]]] = {
    **{f"mixture_{size}": (f"Training: {title}", mixture) for size, title in SIZES.items()},
    "mechanisms_small": ("What each mechanism costs", mechanisms),
    "generation": ("Generation", generation),
    "precision_small": ("bf16, recomputation, kept factors", every_number),
    "data": ("Reading data", every_number),
    "merging": ("Merging", every_number),
    "federated": ("Federation", every_number),
    "planning": ("The planner against the allocator", every_number),
}


def markdown(table: Table) -> Iterator[str]:
    """A table of numbers; a dash where there is none."""
    columns = list(dict.fromkeys(column for cells in table.values() for column in cells))
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, cells in table.items():
        shown = [f"{cells[column]:.4g}" if column in cells else "-" for column in columns]
        yield f"| {name} | {' | '.join(shown)} |"


def section(name: str) -> Iterator[str]:
    title, tables = SECTIONS[name]
    found = read(name)
    yield f"\n## {title}\n"
    if found is None:
        yield f"Not run: `python -m bench.{name.partition('_')[0]}`."
        return
    where = found["where"]
    rest = ", ".join(f"{key} {value}" for key, value in where.items() if key != "device")
    yield f"{where['device']}, {rest}."
    for caption, table in tables(found):
        yield from ("", *([caption, ""] if caption else []), *markdown(table))


def draw_charts() -> None:
    def panel(x: str, title: str, table: Table) -> tuple[str, str, dict[str, dict[int, float]]]:
        series = transposed(table).items()
        return x, title, {name: {int(x): y for x, y in found.items()} for name, found in series}

    measured = {title: read(f"mixture_{size}") for size, title in SIZES.items()}
    steps = [panel("experts", t, found["step_ours_over"]) for t, found in measured.items() if found]
    decoding = (read("generation") or {"tokens_over_merged": {}})["tokens_over_merged"].items()
    batches = [panel("batch", f"{count} experts", table) for count, table in decoding]
    for name, panels, title, subtitle in (
        ("mixture", steps, "Training step", "our time over theirs: below 1 is faster"),
        ("generation", batches, "Decoding", "tokens/s over the merged model's"),
    ):
        if panels:
            line_panels(RESULTS / f"bench_{name}.png", [panels], title=title, subtitle=subtitle)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    head = ["# Benchmarks", "", "`make bench` takes these numbers; docs/LOG.md explains them."]
    lines = [*head, *(line for name in SECTIONS for line in section(name))]
    write_file(RESULTS / "benchmarks.md", "\n".join(lines) + "\n")
    draw_charts()
    print(f"written: {RESULTS.name}/benchmarks.md and charts beside it")


if __name__ == "__main__":
    main()
