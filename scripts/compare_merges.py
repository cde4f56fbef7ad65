"""Which merge keeps the skills? Every method on a run's experts, scored on the run's data sets.

    python -m scripts.compare_merges runs/demo --out results [--rank sum] [--methods ties,wudi] [--num-samples 64]
        [--learned lora_soups,ziplora] [--num-learn 32] [--steps 100]

Each row is ONE plain adapter at the method's defaults, as scripts.merge would write it, or with the options of
`OPTIONS` where the defaults mean nothing here. The learned ones see some samples of the run's validation sets, and
are scored on the test sets like all others; their seconds are those of learning. `adapter_fusion` is no merge: an
attention over the experts' outputs, learned from the same samples. Writes compare_merges.json and
compare_merges.md: scores in per cent by data set, their mean over those that belong to an expert (it is named, or
trained on a source of this name or task) and over the others, rank, and seconds.
"""

import argparse
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import track

from data.sources import open_ocr
from moa.build import build_model, only_adapter
from moa.checkpoint import CONFIG, load_model, step_folder
from moa.cli.command import mistakes_in_one_line, path_argument
from moa.config import RunConfig, load_config
from moa.evaluation.result import Result
from moa.evaluation.sources import EvalSettings, score_sources
from moa.files.atomic import write_file, write_json
from moa.merging.core import Expert, parse_rank
from moa.merging.export.export import export_adapter
from moa.merging.inputs import open_adapters
from moa.merging.learn.calibration import load_unrouted, read_few_shot
from moa.merging.learn.fusion import learn_fusion
from moa.merging.learn.table import LEARNERS, Session
from moa.merging.merge import MergedSite, merge
from moa.merging.methods.table import METHODS, find_method

# Two-expert methods have no meaning for a run of more; a uniform sum at full weight is task_arithmetic.
LEFT_OUT = ("slerp", "sa_merge")
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "task_arithmetic": [{"scale": 1.0}, {"scale": 0.5}],
    "robustmerge": [
        {"variant": v} for v in ("paper_per_task", "paper_factor_sum", "official_code")
    ],
    "ties": [{}, {"reduce": "sum"}],
}
FUSION = "adapter_fusion"
LEARNED = (*LEARNERS, FUSION)
Row = dict[str, Any]


def contenders(methods: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for method in methods:
        for options in OPTIONS.get(method, [{}]):
            yield method, options


def score_merge(
    experts: list[Expert],
    step: Path,
    method: str,
    options: dict[str, Any],
    args: argparse.Namespace,
) -> Row:
    began = time.perf_counter()
    merged = merge(experts, method=method, options=options, rank=args.rank)
    seconds = time.perf_counter() - began
    return {
        "method": method,
        "options": options,
        "seconds": seconds,
        **score_adapter(merged, experts, step, args),
    }


def score_adapter(
    merged: dict[str, MergedSite], experts: list[Expert], step: Path, args: argparse.Namespace
) -> Row:
    """Rank and scores of one merge, written and read as a plain adapter that is always on."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        export_adapter(folder, merged, experts)
        config = load_config(step / CONFIG, only_adapter(folder))
        model = build_model(config).eval()
    return {
        "rank": max(site.lora_a.shape[0] for site in merged.values()),
        "scores": scores_of(model, config, args),
    }


def score_learned(
    session: Session, name: str, experts: list[Expert], step: Path, args: argparse.Namespace
) -> Row:
    """One learner of `LEARNERS` at its defaults, or the adapter fusion, which is no merge."""
    changes = {} if args.steps is None else {"steps": args.steps}
    began = time.perf_counter()
    if name == FUSION:
        fusion = learn_fusion(session.model, session.few.batches(session.batch_size), **changes)
        row: Row = {"seconds": time.perf_counter() - began, "rank": None}
        with fusion.attached():
            row["scores"] = scores_of(session.model, session.config, args, "off")
        return {"method": FUSION, "options": {"samples": args.num_learn, "merge": False}, **row}
    learner = LEARNERS[name]
    options = learner.options | {k: v for k, v in changes.items() if k in learner.options}
    found = learner.function(session, **options)
    seconds = time.perf_counter() - began
    row = score_adapter(found.merged, experts, step, args)
    return {"method": name, "options": {"samples": args.num_learn}, "seconds": seconds, **row}


def open_session(args: argparse.Namespace) -> Session:
    model, config = load_unrouted(str(args.run))
    few = read_few_shot(config, model, num_samples=args.num_learn, seed=0, ocr=args.ocr)
    return Session(model=model, config=config, few=few, merge={"rank": args.rank})


def scores_of(
    model: Any, config: RunConfig, args: argparse.Namespace, gates: str = "router"
) -> dict[str, float]:
    settings = EvalSettings(
        num_pictures=0, num_samples=args.num_samples, gates=gates, progress=False
    )
    results = score_sources(model, config, settings, args.ocr)
    args.trained |= trained_sets(results, config)
    return {result.name: float(result.score["value"] or 0.0) for result in results}


def trained_sets(results: Iterable[Result], config: RunConfig) -> set[str]:
    """The data sets with samples of an expert: they name it, or it was trained on a source of their name or task."""
    own = [s for s in config.data.sources.values() if config.data.expert or s.expert]
    names, tasks = {s.name for s in own}, {s.task for s in own if s.task}
    samples = {r.name: [p.sample for p in r.predictions] for r in results}
    return {
        name
        for name, found in samples.items()
        if any(s.expert in config.experts or s.source in names or s.task in tasks for s in found)
    }


def markdown(rows: list[Row], trained: set[str]) -> str:
    names = list(rows[0]["scores"])
    lines = [
        "| merge | trained | held out | " + " | ".join(names) + " | rank | seconds |",
        "|---" * (len(names) + 5) + "|",
    ]
    for row in sorted(rows, key=lambda row: -(mean_of(row, trained) or 0.0)):
        options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        label = f"`{row['method']}`" + (f" ({options})" if options else "")
        means = (mean_of(row, trained), mean_of(row, set(names) - trained))
        cells = [per_cent(value) for value in (*means, *row["scores"].values())]
        end = [str(row["rank"] or ""), "" if row["seconds"] is None else f"{row['seconds']:.2f}"]
        lines.append("| " + " | ".join([label, *cells, *end]) + " |")
    return "\n".join(lines) + "\n"


def mean_of(row: Row, names: set[str]) -> float | None:
    return mean(row["scores"][name] for name in names) if names else None


def per_cent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", type=path_argument, help="run or step folder, whose experts are merged"
    )
    parser.add_argument("--out", type=path_argument, default=Path("results"))
    parser.add_argument(
        "--rank", default="sum", help="of every result: a number, sum or energy:0.99"
    )
    parser.add_argument(
        "--methods", help="of METHODS, with commas; default: all that take any number"
    )
    parser.add_argument(
        "--learned", help=f"of {', '.join(LEARNED)}, with commas; default: all; none: ''"
    )
    parser.add_argument("--num-learn", type=int, default=32, help="validation samples a data set")
    parser.add_argument("--steps", type=int, help="of gradient descent; default: each method's")
    parser.add_argument("--num-samples", type=int, default=64, help="questions a data set")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with mistakes_in_one_line():
        compare(args, Console())


def compare(args: argparse.Namespace, console: Console) -> None:
    parse_rank(args.rank)
    methods = args.methods.split(",") if args.methods else [m for m in METHODS if m not in LEFT_OUT]
    for method in methods:
        find_method(method)
    learned = LEARNED if args.learned is None else tuple(filter(None, args.learned.split(",")))
    if unknown := set(learned) - set(LEARNED):
        raise ValueError(f"--learned: no {sorted(unknown)}; choices: {', '.join(LEARNED)}")
    step = step_folder(args.run)
    model, _, config = load_model(args.run, "cpu")
    args.ocr = open_ocr(config.data)
    args.trained = set[str]()
    experts = open_adapters([str(step / "experts" / name) for name in config.experts])
    rows: list[Row] = [
        {"method": label, "options": {}, "seconds": None, "rank": None,
         "scores": scores_of(model, config, args, gates)}
        for label, gates in (("base", "off"), ("routed, not merged", "router"))
    ]  # fmt: skip
    for method, options in track(list(contenders(methods)), description="merging and scoring"):
        rows.append(score_merge(experts, step, method, options, args))
    session = open_session(args)
    for name in track(learned, description="learning and scoring"):
        rows.append(score_learned(session, name, experts, step, args))
    table = markdown(rows, args.trained)
    write_json(
        args.out / "compare_merges.json", {"run": str(args.run), "rank": args.rank, "rows": rows}
    )
    write_file(args.out / "compare_merges.md", table)
    console.print(table, soft_wrap=True)


if __name__ == "__main__":
    main()
