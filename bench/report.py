"""Tables and charts of the figures that the benchmarks left in results/bench_*.json.

    python -m bench.report

Writes results/benchmarks.md, results/bench_mixture.png and results/bench_generation.png. `make bench` runs it last.
What was not measured is left out, and said.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.charts import Panel, line_panels
from bench.record import ROOT
from moa.files.atomic import write_file

RESULTS = ROOT / "results"
SIZES = {"small": "4 layers of width 512", "slice7b": "a layer of LLaVA-7B"}
Figures = dict[str, Any]


def read(name: str) -> Figures | None:
    file = RESULTS / f"bench_{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def table(columns: Sequence[str], rows: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """A Markdown table of numbers; a dash where there is none."""
    yield "| | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, cells in rows.items():
        shown = [f"{cells[column]:.2f}" if column in cells else "-" for column in columns]
        yield f"| {name} | " + " | ".join(shown) + " |"


def made(figures: Figures) -> str:
    """Where, with what and when figures were taken."""
    where = figures["where"]
    rest = ", ".join(f"{key} {value}" for key, value in where.items() if key != "device")
    return f"{where['device']}, {rest}."


def by_contender(figures: Figures) -> dict[str, dict[str, float]]:
    """Contender -> experts -> our step over its step."""
    found: dict[str, dict[str, float]] = {}
    for count, ratios in figures["step_ours_over"].items():
        for name, value in ratios.items():
            found.setdefault(name, {})[count] = value
    return found


def mixture(name: str) -> Iterator[str]:
    figures = read(f"mixture_{name}")
    yield f"\n## Training: {SIZES[name]}\n"
    if figures is None:
        yield f"Not run: `python -m bench.mixture --size {name}`."
        return
    layer = figures["layer_ours_over_lora"]
    rows = {f"step, over {other}": cells for other, cells in by_contender(figures).items()}
    yield f"Our time over theirs, by experts. {made(figures)}\n"
    yield from table([*layer], {**rows, "layer, over lora": layer})
    kept = {
        f"step, {other}": {n: step[other]["MiB"] for n, step in figures["step"].items() if other in step}
        for other in ("ours", "lora", "loop", "xlora", "per-sample")
    }  # fmt: skip
    yield "\nMiB kept for the backward pass:\n"
    yield from table([*layer], {name: cells for name, cells in kept.items() if cells})


def generation() -> Iterator[str]:
    figures = read("generation")
    yield "\n## Generation\n"
    if figures is None:
        yield "Not run: `python -m bench.generation`."
        return
    yield f"Tokens/s over those of the merged model, by batch. {made(figures)}"
    for count, batches in figures["tokens_over_merged"].items():
        names = list(next(iter(batches.values())))
        yield f"\n{count} experts:\n"
        yield from table(
            [*batches], {name: {b: found[name] for b, found in batches.items()} for name in names}
        )


def flat(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in figures.items():
        name = f"{prefix}, {key}" if prefix else key
        if isinstance(value, Mapping):
            yield from flat(value, name)
        elif isinstance(value, int | float):
            yield name, value


def listed(name: str, title: str) -> Iterator[str]:
    """Every number of a benchmark, by its name."""
    figures = read(name)
    yield f"\n## {title}\n"
    if figures is None:
        yield f"Not run: `python -m bench.{name.partition('_')[0]}`."
        return
    yield made(figures) + "\n\n| | |\n|---|---|"
    for key, value in flat({k: v for k, v in figures.items() if k != "where"}):
        yield f"| {key} | {value:.4g} |"


def draw_charts() -> None:
    found = {name: read(f"mixture_{name}") for name in SIZES}
    panels = [
        Panel(x="experts", y=SIZES[name], series=in_numbers(by_contender(figures)))
        for name, figures in found.items()
        if figures is not None
    ]
    if panels:
        line_panels(
            RESULTS / "bench_mixture.png", [panels], title="Training step",
            subtitle="our time over theirs: below 1 is faster",
        )  # fmt: skip
    if decoding := read("generation"):
        panels = [
            Panel(x="batch", y=f"{count} experts", series=in_numbers(transposed(batches)))
            for count, batches in decoding["tokens_over_merged"].items()
        ]
        line_panels(
            RESULTS / "bench_generation.png", [panels], title="Decoding",
            subtitle="tokens/s over the merged model's",
        )  # fmt: skip


def transposed(table: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    names = list(next(iter(table.values())))
    return {name: {key: row[name] for key, row in table.items()} for name in names}


def in_numbers(series: Mapping[str, Mapping[str, float]]) -> dict[str, dict[int, float]]:
    return {name: {int(x): y for x, y in points.items()} for name, points in series.items()}


def main() -> None:
    lines = [
        "# Benchmarks",
        "",
        "`make bench` takes these figures; docs/LOG.md says what they mean.",
    ]
    for name in SIZES:
        lines += mixture(name)
    lines += generation()
    lines += listed("precision_small", "bf16, recomputation, kept factors")
    lines += listed("data", "Reading data")
    lines += listed("merging", "Merging")
    lines += listed("planning", "The planner against the allocator")
    write_file(RESULTS / "benchmarks.md", "\n".join(lines) + "\n")
    draw_charts()
    print(f"written: {RESULTS.name}/benchmarks.md and charts beside it")


if __name__ == "__main__":
    main()
