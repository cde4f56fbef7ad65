"""One self-contained HTML page about a merge: which experts fight, where, and what was lost.

Drawn from the record of `moa.merging.report.fidelity.measure`, with or without a merge in it.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from moa.analysis import fidelity_plots as plots
from moa.analysis import html
from moa.analysis.fidelity_plots import Record, number, pairs_of, short
from moa.files.atomic import write_file

MEETS = 0.05  # cosine of a pair that fights or agrees
# Each image with a newcomer's reading of it.
IMAGES: dict[str, tuple[Callable[[Path, Record], None], str]] = {
    "pairs": (
        plots.draw_pairs,
        "Cosine: 1 where two experts want the same change, -1 where they undo each other, 0 where they do not meet. "
        "Sign disagreement: of the entries that both change, weighed by how much, the share where they pull in "
        "opposite directions; 50% is chance. Overlap: the share of directions that both use, whatever they do there.",
    ),
    "where": (
        plots.draw_where,
        "Red layers are where a pair fights. Mass that cancels: 0 where all experts pull every entry the same way, 1 "
        "where a plain sum leaves nothing; N unrelated experts of one size lose about 1 - 1/sqrt(N).",
    ),
    "layers": (
        plots.draw_layers,
        "Retention: 1 where the merged update still does all that the expert did along its own direction, above 1 "
        "where others add to it, below 0 where it does the opposite.",
    ),
    "spectra": (
        plots.draw_spectra,
        "At the site of the largest updates. A result below the weighted sum at every index was shrunk; one that falls "
        "only at the end lost what is small, by pruning or by the rank.",
    ),
    "pruning": (
        plots.draw_pruning,
        "At the same site, of each expert by itself, whatever the method: the views of RobustMerge, which lifts each "
        "rank by what pruning took from its row of A. Where the pruned curve is flatter than the one before, pruning "
        "moved energy from the leading directions to new ones. A scale far above the others marks a row of many "
        "small values.",
    ),
    "values": (
        plots.draw_values,
        "At the same site, all experts. The heavier the tails beside the normal curve, the fewer entries carry the "
        "energy, and the less it costs to drop the small ones: compare the update with its factors.",
    ),
}


def write_page(path: str | Path, record: Record, about: Mapping[str, Any], agreement: str | None = None) -> None:
    """Write the page of a record; `about` names what the merge was, `agreement` is a line on its answers, the first."""
    merged, several = "merged" in record["total"], len(record["experts"]) > 1
    first = [*([agreement] if agreement else []), *summary(record, about)]
    parts = [html.element("p", line, "first") for line in first]
    parts += [html.element("p", line) for line in details(record)]
    parts.append(html.table([(key, shown(value)) for key, value in about.items() if shown(value)]))
    if merged:
        parts += [html.element("h2", "What became of each expert"), html.table(expert_rows(record))]
    with tempfile.TemporaryDirectory() as folder:
        for name, (draw, note) in IMAGES.items():
            if several or name not in ("pairs", "where"):
                file = Path(folder) / f"{name}.png"
                draw(file, record)
                parts += [html.image(file, name), html.element("p", note)]
    parts += [html.element("h2", "Layer by layer"), html.table(_layer_rows(record))]
    title = f"{'Merge' if merged else 'Experts'}: {', '.join(record['experts'])}"
    write_file(path, html.page(title, parts))


def shown(value: Any) -> str:
    """A setting as a reader writes it; empty for what is not set."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={shown(inner)}" for key, inner in value.items() if shown(inner))
    if isinstance(value, list | tuple):
        return ("; " if any(isinstance(v, Mapping) for v in value) else ", ").join(map(shown, value))
    return "" if value is None or value is False else str(value)


def summary(record: Record, about: Mapping[str, Any]) -> list[str]:
    """Two sentences for a newcomer: who fights whom and where, and what the merge lost."""
    lines = [_fight(record)] if len(record["experts"]) > 1 else []
    return [*lines, _loss(record, about)] if "merged" in record["total"] else lines


def _fight(record: Record) -> str:
    pairs, total = pairs_of(record), record["total"]
    (i, j), (k, m) = pairs[0], pairs[-1]
    low, high = total["cosine"][i][j], total["cosine"][k][m]
    names = record["experts"]
    if low < -MEETS:
        where = short(_strongest(record, i, j, -1))
        return (
            f"{names[i]} and {names[j]} fight most: {total['sign_disagreement'][i][j]:.0%} of what both change "
            f"pulls in opposite directions (50% is chance; cosine {number(low)}), mainly in {where}."
        )
    if high > MEETS:
        where = short(_strongest(record, k, m, 1))
        return (
            f"No two experts fight (the lowest cosine is {number(low)}, {names[i]} and {names[j]}); "
            f"{names[k]} and {names[m]} pull together most: cosine {number(high)}, mainly in {where}."
        )
    return (
        f"No two experts fight or help each other: every cosine lies between {number(low)} and {number(high)}, "
        "so their signs agree as often as chance has it."
    )


def _strongest(record: Record, i: int, j: int, sign: int) -> str:
    """The module with the largest inner product of two experts, of this sign."""

    def product(name: str) -> float:
        row = record["modules"][name]
        return float(sign * row["cosine"][i][j] * row["norms"][i] * row["norms"][j])

    return max(record["modules"], key=product)


def _loss(record: Record, about: Mapping[str, Any]) -> str:
    merged = record["total"]["merged"]
    kept = {n: v for n, v in zip(record["experts"], merged["retention"], strict=True) if v is not None}
    if not kept:
        return "Every expert is a zero update."
    least, most = min(kept, key=kept.__getitem__), max(kept, key=kept.__getitem__)
    rest = f" and {kept[most]:.0%} of {most}" if most != least else ""
    energy = "output energy on the experts' inputs" if about.get("metric") == "inputs" else "energy"
    return (
        f"{about.get('method', 'The merge')} at rank {about.get('rank', merged['rank'][1])} kept {kept[least]:.0%} of "
        f"{least}{rest}, each along its own direction; the rank cut off {merged['cut_by_rank']:.1%} of the result's "
        f"{energy}, and {merged['outside_span']:.1%} of what is left lies outside of what the experts span."
    )


def details(record: Record) -> list[str]:
    """Further sentences, where they apply."""
    total, layers, lines = record["total"], record["layers"], []
    if len(record["experts"]) > 1:
        worst = max(layers, key=lambda name: layers[name]["sign_conflict"])
        lines.append(
            f"In a plain sum {total['sign_conflict']:.0%} of the experts' mass would cancel, most in {short(worst)}: "
            f"{layers[worst]['sign_conflict']:.0%}."
        )
        if total["cross_terms"] is not None:
            lines.append(
                f"Summing A and B apart (space=factor) would add {total['cross_terms']:.1f} times the wanted update in "
                "products of one expert's B with another's A."
            )
        if any(value is not None for row in total.get("crosstalk", []) for value in row):
            lines.append(_crosstalk(record))
    residual = total.get("residual", [])
    if errors := {n: v for n, v in zip(record["experts"], residual, strict=bool(residual)) if v is not None}:
        worst = max(errors, key=errors.__getitem__)
        lines.append(
            f"On each expert's own inputs the result's outputs differ from its own by {fmean(errors.values()):.2f} of "
            f"their energy, most for {worst}: {errors[worst]:.2f}; 0 is a merge without loss."
        )
    for name, count in zip(record["experts"], total["zero_rows"], strict=True):
        if count:
            lines.append(f"{name} has {count} ranks that do nothing: their row of A or column of B is zero.")
    return lines


def _crosstalk(record: Record) -> str:
    """How strongly the experts answer to each other's inputs: it orders merges better than cosines do."""
    names, table = record["experts"], record["total"]["crosstalk"]
    found = {(k, j): v for k, row in enumerate(table) for j, v in enumerate(row) if v is not None}
    k, j = max(found, key=found.__getitem__)
    layers = {name: row["crosstalk"][k][j] or 0.0 for name, row in record["layers"].items()}
    return (
        f"Crosstalk is {fmean(found.values()):.2f}: so much of an expert's effect on its samples another one adds to "
        f"them, in the mean over pairs; most {names[j]} on those of {names[k]}: {found[k, j]:.2f}, mainly in "
        f"{short(max(layers, key=layers.__getitem__))}. At 0 a plain sum does what each expert does."
    )


Rows = Sequence[Sequence[str]]


def expert_rows(record: Record) -> Rows:
    total, merged = record["total"], record["total"]["merged"]
    columns = (record["experts"], total["norms"], merged["retention"], merged["energy_in_span"])
    body = [(n, f"{size:.3g}", _share(kept), _share(span)) for n, size, kept, span in zip(*columns, strict=True)]
    return [("expert", "norm", "retention", "energy in the result's span"), *body]


def _layer_rows(record: Record) -> Rows:
    head = ["layer", "mass that cancels", "cross terms of factor methods"]
    if "merged" in record["total"]:
        head += ["rank", "norm", "cut by the rank", "outside the span"]
    rows = [head]
    for name, row in {**record["layers"], "all": record["total"]}.items():
        cross, after = row["cross_terms"], row.get("merged")
        cross = "-" if cross is None else f"{cross:.2f}"
        cells = [short(name), _share(row["sign_conflict"]), cross]
        if after:
            rank = " to ".join(map(str, dict.fromkeys(after["rank"])))
            cut = _share(after["cut_by_rank"]), _share(after["outside_span"])
            cells += [rank, f"{after['norm']:.3g}", *cut]
        rows.append(cells)
    return rows


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
