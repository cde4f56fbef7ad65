"""What a merge and its export print on the console."""

from pathlib import Path
from typing import Any

from rich.table import Table

MODELS = {"routed_model": "the model that routes each sample", "live_mixture": "the live mixture"}
LOW_AGREEMENT = 0.5  # of greedy tokens
MANY_PAIRS = 10  # more are in fidelity.json
LABELS = {
    "written": "against the written weights, added by hand",
    "live_mixture": "against the live mixture at these weights",
    "base_to_live_mixture": "for scale, the base against that mixture",
    "routed_model": "against the model that routes each sample",
}


def summary_tables(summary: dict[str, Any]) -> list[Table]:
    """What was kept: of each expert over all sites, and in each layer."""
    total = summary["total"]
    experts = Table("expert", "weight", "sites", "norm", "retention", "in span", title="kept")
    for name, row in total["experts"].items():
        weight = "per site" if row["weight"] is None else f"{row['weight']:.3f}"
        kept = (number(row["retention"]), number(row["energy_in_span"]))
        experts.add_row(name, weight, str(row["sites"]), f"{row['norm']:.3g}", *kept)
    layers = Table(title="by layer, with each expert's retention")
    for name in ("layer", "rank", "energy kept", *total["experts"]):
        layers.add_column(name, overflow="fold")  # of layers cut short, many would read alike
    for layer, row in {**summary["layers"], "all": total}.items():
        retained = [number(expert["retention"]) for expert in row["experts"].values()]
        layers.add_row(_short(layer), str(row["rank"]), f"{row['energy_kept']:.4f}", *retained)
    return [experts, layers]


def interference_tables(record: dict[str, Any]) -> list[Table]:
    """Of a fidelity record: each expert, and the pairs that meet most."""
    names, total = record["experts"], record["total"]
    experts = Table("expert", "sites", "norm", "largest in", "idle ranks", title="experts")
    for index, name in enumerate(names):
        sizes = {layer: row["norms"][index] for layer, row in record["layers"].items()}
        sites = sum(row["norms"][index] > 0 for row in record["sites"].values())
        largest = _short(max(sizes, key=sizes.__getitem__))
        experts.add_row(name, str(sites), f"{total['norms'][index]:.3g}", largest, str(total["zero_rows"][index]))
    pairs = Table("pair", "cosine", "disagree", "overlap", "lowest in", title="pairs")
    both = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    both.sort(key=lambda pair: -abs(total["cosine"][pair[0]][pair[1]]))
    for i, j in sorted(both[:MANY_PAIRS], key=lambda pair: total["cosine"][pair[0]][pair[1]]):
        cosines = {layer: row["cosine"][i][j] for layer, row in record["layers"].items()}
        lowest = min(cosines, key=cosines.__getitem__)
        disagree = total["sign_disagreement"][i][j]
        pairs.add_row(
            f"{names[i]}, {names[j]}",
            f"{total['cosine'][i][j]:.3f}",
            "-" if disagree is None else f"{disagree:.1%}",
            f"{total['overlap'][i][j]:.3f}",
            f"{_short(lowest)}: {cosines[lowest]:.3f}",
        )
    return [experts, *([pairs] if both else []), *([crosstalk_table(record)] if "crosstalk" in total and both else [])]


def crosstalk_table(record: dict[str, Any]) -> Table:
    """The ordered pairs that disturb each other most, on the inputs of the second."""
    names, total, layers = record["experts"], record["total"]["crosstalk"], record["layers"]
    table = Table("expert", "on the inputs of", "crosstalk", *map(_short, layers), title="crosstalk")
    places = [(k, j) for k in range(len(names)) for j in range(len(names)) if total[k][j] is not None]
    for k, j in sorted(places, key=lambda place: -total[place[0]][place[1]])[:MANY_PAIRS]:
        by_layer = [number(row["crosstalk"][k][j]) for row in layers.values()]
        table.add_row(names[j], names[k], number(total[k][j]), *by_layer)
    return table


def _short(layer: str) -> str:
    return layer.removeprefix("model.").removeprefix("language_model.").replace("multi_modal_projector", "projector")


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def report_lines(report: dict[str, Any], out: Path) -> list[str]:
    lines = [f"{report['kind']}: {out}, {report['dtype']}, {report['keys_written']} tensors"]
    if not report["verified"]:
        return [*lines, "not verified (verify=false)"]
    lines.append("reloaded in a fresh process; largest logit difference, equal greedy tokens:")
    return [*lines, *(f"  {line}" for line in comparison_lines(report)), *filter(None, [advice(report)])]


def comparison_lines(report: dict[str, Any]) -> list[str]:
    """What the check of an export measured; empty where it was not run."""
    lines = []
    for name, row in report.get("comparisons", {}).items():
        gap = f"{row['max_abs_logit_diff']:.3g} of {row['max_abs_logit']:.3g}"
        lines.append(f"{LABELS[name]}: {gap}, {row['greedy_token_agreement']:.0%}")
    return lines


def agreement_line(report: dict[str, Any]) -> str | None:
    """The share of greedy tokens that the merge has in common with the routed model, or else with the live mixture."""
    found = report.get("comparisons", {})
    key = next((key for key in MODELS if key in found), None)
    if key is None:
        return None
    of = f"{MODELS[key]} ({report['probe']['samples']} prompts)"
    return f"{found[key]['greedy_token_agreement']:.0%} of the merge's greedy tokens are those of {of}."


def advice(report: dict[str, Any]) -> str | None:
    """What to try first where the merge answers differently from the model that it replaces."""
    found = report.get("comparisons", {})
    shares = [found[key]["greedy_token_agreement"] for key in MODELS if key in found]
    if not shares or shares[0] >= LOW_AGREEMENT:
        return None
    line = f"advice: {agreement_line(report)} Expect low scores; try "
    if "distill" in report:
        return line + "more steps, another lr, start=MERGED, or a larger rank"
    return line + (
        "rank=sum where the rank is lower, then weights learned from a little data (scripts.learn_weights "
        "method=lora_soups), then compare methods with scripts.compare_merges"
    )
