"""A run on one self-contained HTML page: what was trained on what, scores, gates, samples, merges, cost, rounds.

Made of the files of a run folder alone, without a model. What is not there is left out; what cannot be read, or belongs
to other weights, is a line on the page.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from moa.analysis import fidelity_page, html
from moa.analysis.plots import client_heat_map, gate_heat_map, layer_heat_map, loss_curves
from moa.evaluation.gates_file import PARTIAL, ROUTING, read_routing
from moa.evaluation.result import Score, interval, paired_difference
from moa.evaluation.runs import FEDERATION, RunFolder, read_results, read_run, weights_of
from moa.evaluation.sample_cards import STYLE, samples_section
from moa.files.atomic import write_file

TRAINED, BASE = "as trained", "base"
ROUNDS = 20  # of a federation, that its table has at most
Parts = list[str]


def write_run_page(folder: Path, out: Path | None = None) -> tuple[Path, list[str]]:
    """Write the page of a run folder, by default to its report.html: the file, and what could not be read."""
    run, file = read_run(folder), out or folder / "report.html"
    write_file(file, run_page(run))
    return file, run.problems


def run_page(run: RunFolder) -> str:
    """The page; every section is there, left out, or named with the reason why it cannot be drawn."""
    sections: list[tuple[str, Callable[[RunFolder], Parts]]] = [
        ("Scores", scores_section),
        ("What was trained", trained_section),
        ("Losses", losses_section),
        ("Rounds and clients", federation_section),
        ("Who answers what", gates_section),
        ("Crosstalk", crosstalk_section),
        ("Samples", samples_section),
        ("What merging keeps", merging_section),
        ("Cost", cost_section),
    ]
    parts = [html.element("p", line, "first") for line in first_lines(run)]
    parts += [html.element("p", line, "problem") for line in run.problems]
    for title, make in sections:
        try:
            made = make(run)
        except (ValueError, OSError, LookupError, TypeError, AttributeError, ModuleNotFoundError) as error:
            reason = f"cannot be shown: {type(error).__name__}: {error}"
            made = [html.element("p", reason, "problem")]
        if made:
            parts += [html.element("h2", title), *made]
    return html.page(f"Run {run.path.resolve().name}", parts, STYLE)


def first_lines(run: RunFolder) -> list[str]:
    lines = []
    if run.config is not None:
        names, router = [*run.config.experts], run.config.router.kind
        done, planned, unit = run.progress
        of = "" if done == planned else f" of {planned}"
        lines.append(
            f"{len(names)} LoRA expert{'s' if len(names) > 1 else ''} ({', '.join(names)}) on {run.config.model.name}, "
            f"routed by {router}; {done}{of} {unit} on {len(run.config.data.sources)} sources."
        )
    summary, _ = read_summary(run)
    return lines + [str(line) for line in summary.get("gains", [])]


def read_summary(run: RunFolder) -> tuple[dict[str, Any], str | None]:
    """What scripts.summary wrote of the run's own weights, or nothing and the reason."""
    file = run.path / "summary.json"
    if not file.is_file():
        return {}, None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["weights"]["routed experts"] != weights_of(run.path):
            return {}, "summary.json: of other weights than the run's checkpoint, so it is left out"
        return {**found, "rows": {str(k): dict(v) for k, v in found["rows"].items()}}, None
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        return {}, f"summary.json: cannot be read ({error!r})"


def scores_section(run: RunFolder) -> Parts:
    """A row for each data set, a column for each model or kind of gates; the gain is over the base, by question."""
    own = run.results.get("", {})
    summary, reason = read_summary(run)
    trained = {name: record["score"] for name, (record, _) in own.items()}
    columns: dict[str, Mapping[str, Score]] = {TRAINED: trained, BASE: {}}
    columns |= {row: scores for row, scores in summary.get("rows", {}).items() if row != "routed experts"}
    for gates, found in run.results.items():
        if gates:
            label = BASE if gates == "off" else f"gates: {gates}"
            columns[label] = {name: record["score"] for name, (record, _) in found.items()}
    columns |= other_models(run)
    columns = {label: scores for label, scores in columns.items() if scores}
    parts = [html.element("p", reason, "problem")] if reason else []
    names = list(dict.fromkeys(name for scores in columns.values() for name in scores))
    if not names:
        return parts
    gains = {name: paired_difference(run.results["off"][name][1], own[name][1])
             for name in own if name in run.results.get("off", {})}  # fmt: skip
    head = ["data set", *columns, *(["gain over base"] if gains else []), "metric", "questions"]
    rows = [head]
    for name in names:
        record = own[name][0] if name in own else {}
        metrics = dict.fromkeys(task["primary"] for task in record.get("tasks", {}).values())
        cells = [interval(scores.get(name)) for scores in columns.values()]
        gain = [interval(gains.get(name), "+")] if gains else []
        rows.append([name, *cells, *gain, "+".join(metrics) or "-", str(record.get("n", "-"))])
    note = "Per cent, with 95 % intervals over the images of this one run; another seed differs by more."
    return [*parts, html.table(rows), html.element("p", note)]


def other_models(run: RunFolder) -> dict[str, dict[str, Score]]:
    """Scores of models that eval.py has scored like this run, on the samples that the run was scored on."""
    own = {name: record["fingerprints"].get("data") for name, (record, _) in run.results.get("", {}).items()}
    found: dict[str, dict[str, Score]] = {}
    for place in sorted(run.path.glob("others/*/eval")):
        results = {name: record for name, (record, _) in read_results(place, None, []).items()}
        same = {n: r["score"] for n, r in results.items() if own.get(n) in (None, r["fingerprints"].get("data"))}
        found |= {place.parent.name: same} if same else {}
    return found


def trained_section(run: RunFolder) -> Parts:
    if run.config is None:
        return []
    config, sizes = run.config, {}
    if (run.path / "data.json").is_file():
        sizes = json.loads((run.path / "data.json").read_text(encoding="utf-8"))
    experts = [["expert", "rank", "alpha", "gate", "trained on"]]
    for name, expert in config.experts.items():
        data = [s.name for s in config.data.sources.values() if name in (s.expert, config.data.expert)]
        sized = [str(expert.rank or "-"), f"{expert.alpha or '-'}", expert.gate]
        experts.append([name, *sized, "nothing: frozen" if expert.frozen else ", ".join(data) or "-"])
    sources = [["source", "task", "expert", "samples", "from"]]
    for source in config.data.sources.values():
        count = sizes.get(source.name, {}).get("samples", source.num_samples)
        of = f"{source.format} {source.path or ''} {source.split or ''}"
        sources.append([source.name, source.task or "-", source.expert or "-", str(count or "-"), of.strip()])
    stages = [["stage", "trains", "steps", "warm-up", "learning rate"]]
    for stage in config.stages.values():
        rates = fidelity_page.shown({k: v for k, v in vars(stage.lr).items() if v})
        stages.append([stage.name, stage.kind, str(stage.steps), str(stage.warmup_steps), rates or "-"])
    router = [("router", config.router.kind), ("its evidence", ", ".join(config.router.evidence) or "-")]
    return [*map(html.table, (experts, sources, stages)), html.table(router)]


def losses_section(run: RunFolder) -> Parts:
    tasks = {key for row in run.log for key in row if key.startswith(("loss/", "validation/"))}
    rows = [["", "first", "last", "mean of the last 10"]]
    for key in ("loss", *sorted(tasks), "validation", "crosstalk"):
        values = [row[key] for row in run.log if isinstance(row.get(key), int | float)]
        last = run.final(key)
        if values and last is not None:
            rows.append([key, f"{values[0]:.3f}", f"{values[-1]:.3f}", f"{last:.3f}"])
    if len(rows) == 1:
        return []
    names = [] if run.config is None else [*run.config.experts]
    by_task = any(key.startswith("loss/") for key in tasks)
    # the stages of a federation are those of each client, and not marked
    log = run.log if run.num_rounds is None else [{**row, "stage": ""} for row in run.log]
    drawn = [figure("losses", lambda file: loss_curves(file, log, names))] if by_task else []
    return [*drawn, html.table(rows), html.element("p", "Nats per answer token, means over the samples of a step.")]


def federation_section(run: RunFolder) -> Parts:
    """Who took part in which round and what it sent, then the scores by client and data set."""
    rounds = [row for row in run.log if row.get("stage") == "server"]
    if not rounds or run.num_rounds is None:
        return []
    settings = yaml.safe_load((run.path / FEDERATION).read_text(encoding="utf-8"))["federated"]
    dealt = fidelity_page.shown({key: value for key, value in settings["partition"].items() if value})
    parts = [html.element("p", f"How the data is dealt: {dealt}.")]
    optional = {"validation": "validation loss", "epsilon": "epsilon spent"}
    named = [key for key in optional if any(key in row for row in rounds)]
    table = [["round", "clients", "absent", "refused", "MiB up", "MiB down", *(optional[key] for key in named)]]
    step = -(-len(rounds) // ROUNDS)
    for row in [*rounds[:-1:step], rounds[-1]]:
        counts = len(row["clients"]), len(row["dropouts"]) + len(row["failed"]), len(row["refused"])
        sizes = (f"{row[key] / 2**20:.1f}" for key in ("bytes_up", "bytes_down"))
        table.append(
            [*map(str, (row["round"], *counts)), *sizes, *(f"{row[k]:.3f}" if k in row else "-" for k in named)]
        )
    parts.append(html.table(table))
    file = run.path / "federated.json"
    if not file.is_file():
        return parts
    record = json.loads(file.read_text(encoding="utf-8"))
    parts.append(figure("scores by client and data set", lambda file: client_heat_map(file, record)))
    totals = {**record["summary"], "worst": (record["summary"]["worst"] or {}).get("value")}
    names = {
        "global": "global model, mean over data sets",
        "personal": "clients, each on data sets like its own",
        "worst": "the worst of them",
        "unseen_client": "clients that never trained",
        "forgotten": "forgotten by the global model",
        "forgotten_personal": "forgotten by the clients' own",
    }
    rows = [(text, f"{100 * totals[key]:.1f}") for key, text in names.items() if totals.get(key) is not None]
    return [*parts, html.table(rows), html.element("p", "Per cent of each data set's own score.")]


def gates_section(run: RunFolder) -> Parts:
    file, parts = run.path / "eval" / ROUTING, []
    if not file.is_file():
        file = run.path / "eval" / PARTIAL / ROUTING
        parts = [html.element("p", "Of a part of the tasks or samples.")]
    if not file.is_file():
        return []
    routing = read_routing(file)
    if routing["weights"] != weights_of(run.path):
        return [html.element("p", f"{file.name}: of other weights than the run's checkpoint", "problem")]
    null = run.config is not None and run.config.router.null_expert
    parts.append(figure("mean gate by task", lambda file: gate_heat_map(file, routing, null)))
    if routing.get("dead"):
        parts.append(html.element("p", f"Hardly used in any task: {', '.join(routing['dead'])}."))
    for one, other, cosine in routing.get("duplicates", []):
        parts.append(html.element("p", f"{one} and {other} learned the same update: cosine {cosine:.2f}."))
    if "per_site" in routing:
        parts.append(figure("mean gate by layer", lambda file: layer_heat_map(file, routing, routing["sites"])))
    note = "Each row is the mixture that a task gets, in the mean over its samples; a gate of 0 is an unused expert."
    return [*parts, html.element("p", note)]


def crosstalk_section(run: RunFolder) -> Parts:
    """What training logged of it, by pair: the mean of the last steps."""
    names = [] if run.config is None else [*run.config.experts]
    found = {(j, k): run.final(f"crosstalk/{j}/{k}") for j in names for k in names}
    if all(value is None for value in found.values()):
        return []
    rows = [["samples of", *(f"also {name}" for name in names)]]
    rows += [[k, *("-" if (value := found[j, k]) is None else f"{value:.2f}" for j in names)] for k in names]
    note = (
        "So much of an expert's effect on its own samples another one would add to them; at 0 experts merge by a sum."
    )
    return [html.table(rows), html.element("p", note)]


def merging_section(run: RunFolder) -> Parts:
    """Of each merge below the run: the sentences and the table of its fidelity page."""
    parts: Parts = []
    for file in sorted(run.path.rglob("fidelity.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        about = {key: record[key] for key in ("method", "options", "space", "rank") if record.get(key)}
        parts.append(html.element("h3", file.parent.relative_to(run.path).as_posix()))
        parts += [html.element("p", line) for line in fidelity_page.summary(record, about)]
        parts += [html.element("p", line) for line in fidelity_page.details(record)]
        parts.append(html.table([(key, fidelity_page.shown(value)) for key, value in about.items()]))
        if "merged" in record["total"]:
            parts.append(html.table(fidelity_page.expert_rows(record)))
    return parts


def cost_section(run: RunFolder) -> Parts:
    steps = [row for row in run.log if isinstance(row.get("step_s"), int | float)]
    rows: list[tuple[str, str]] = []
    if seconds := sum(row["step_s"] for row in steps):
        total = {key: sum(row.get(key, 0) for row in steps) for key in ("data_wait_s", "samples", "tokens_read")}
        rows += [
            ("time in steps", f"{seconds / 60:.1f} minutes, of which {total['data_wait_s'] / seconds:.1%} for data"),
            ("samples", f"{total['samples']:,.0f}, {total['samples'] / seconds:.1f} a second"),
            ("tokens read", f"{total['tokens_read']:,.0f}"),
            ("peak memory", f"{max(row.get('memory_gib', 0) for row in steps):.1f} GiB"),
        ]
    for name, (record, _) in run.results.get("", {}).items():
        speed = f"{record.get('seconds', 0):.1f} s of generating, {record.get('tokens_per_second', 0)} tokens a second"
        rows.append((f"evaluation of {name}", speed))
    file = run.path / "versions.json"
    versions = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    rows += [(str(name), str(value)) for name, value in versions.items() if value is not None]
    return [html.table(rows)] if rows else []


def figure(name: str, draw: Callable[[Path], None]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figure.png"
        draw(file)
        return html.image(file, name)
