"""Which merge keeps the skills? Every method on a run's experts, scored on the run's data sets.

    python -m scripts.compare_merges run=runs/demo out=results
    python -m scripts.compare_merges run=runs/demo methods=[ties,wudi] learned=[] rank=16 num_samples=64

Each row is ONE plain adapter at the method's defaults, as scripts.merge would write it, or with the options of
`OPTIONS` where the defaults mean nothing here. The learned ones see some samples of the run's validation sets, and
are scored on the test sets like all others; their seconds are those of learning. `adapter_fusion` is not a merge: an
attention over the experts' outputs, learned from the same samples. Writes compare_merges.json and
compare_merges.md: scores in per cent by data set, their mean over those that belong to an expert (it is named, or
trained on a source of this name or task) and over the others, rank, and seconds.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import track

from moa.cli.command import run_command
from moa.cli.ranges import Count, FilePath
from moa.merging.learn.learners import LEARNERS
from moa.merging.methods.table import METHODS, find_method
from moa.merging.rank import parse_rank

# Two-expert methods have no meaning for a run of more; a uniform sum at full weight is task_arithmetic.
LEFT_OUT = ("slerp", "sa_merge")
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "task_arithmetic": [{"scale": 1.0}, {"scale": 0.5}],
    "robustmerge": [{"variant": v} for v in ("paper_per_task", "paper_factor_sum", "official_code")],
    "ties": [{}, {"reduce": "sum"}],
}
FUSION = "adapter_fusion"
LEARNED = (*LEARNERS, FUSION)
Row = dict[str, Any]
Scores = Callable[..., dict[str, float]]  # (model, config, gates) -> score by data set


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    run: FilePath | None = None  # run or step folder, whose experts are merged
    out: FilePath = "results"  # folder to write
    rank: Any = "sum"  # of every result: a number, sum or energy:0.99
    # names of scripts.merge method=list; by default all that take any number of experts and no statistics
    methods: list[str] = field(
        default_factory=lambda: [m for m, row in METHODS.items() if m not in LEFT_OUT and not row.reads_inputs]
    )
    learned: list[str] = field(default_factory=lambda: list(LEARNED))  # learners
    num_learn: Count = 32  # validation samples of each data set, for the learners
    steps: Count | None = None  # of gradient descent; null: each learner's own
    num_samples: Count = 64  # questions of each data set

    def __post_init__(self) -> None:
        parse_rank(self.rank)
        for method in self.methods:
            find_method(method)
        if unknown := set(self.learned) - set(LEARNED):
            raise ValueError(f"learned: no {sorted(unknown)}; choices: {', '.join(LEARNED)}")


def main(argv: Sequence[str] | None = None) -> None:
    run_command(CompareConfig, compare, __doc__, argv)


def compare(settings: CompareConfig, console: Console) -> None:
    from data.sources import open_ocr
    from moa.checkpoint import load_model, step_folder
    from moa.evaluation.settings import with_eval
    from moa.evaluation.sources import score_sources
    from moa.files.atomic import write_file, write_json
    from moa.merging.merge import merge
    from moa.merging.source import open_run, with_statistics

    if settings.run is None:
        raise ValueError("run: names no folder")
    step = step_folder(settings.run)
    model, _, config = load_model(settings.run, "cpu")
    ocr, trained = open_ocr(config.data), set[str]()
    shown = {"num_images": 0, "num_samples": settings.num_samples}

    def scores_of(model: Any, config: Any, gates: str = "router") -> dict[str, float]:
        results = score_sources(model, with_eval(config, gates=gates, **shown), ocr)
        if not trained:  # by the run's own config: a merged adapter's has one expert for all samples
            trained.update(trained_sets(results, config))
        return {result.name: float(result.score["value"] or 0.0) for result in results}

    source = open_run(step)
    if any(find_method(method).reads_inputs for method in settings.methods):
        source = with_statistics(source)
    experts = source.experts
    rows: list[Row] = [
        {"method": label, "options": {}, "seconds": None, "rank": None,
         "scores": scores_of(model, config, gates)}
        for label, gates in (("base", "off"), ("routed, not merged", "router"))
    ]  # fmt: skip
    merges = [(m, options) for m in settings.methods for options in OPTIONS.get(m, [{}])]
    for method, options in track(merges, description="merging and scoring"):
        began = time.perf_counter()
        merged = merge(experts, method=method, options=options, rank=settings.rank, added=source.shared)
        row = {"method": method, "options": options, "seconds": time.perf_counter() - began}
        rows.append(row | score_adapter(merged, experts, step, scores_of))
    if settings.learned:
        rows += score_learned(settings, ocr, experts, step, scores_of)
    table, out = markdown(rows, trained), Path(settings.out)
    record = {"run": settings.run, "rank": settings.rank, "rows": rows}
    write_json(out / "compare_merges.json", record)
    write_file(out / "compare_merges.md", table)
    console.print(table, soft_wrap=True)


def score_adapter(merged: Any, experts: Sequence[Any], step: Path, scores_of: Scores) -> Row:
    """Rank and scores of one merge, written and read as a plain adapter that is always on."""
    from moa.build import build_model, only_adapter
    from moa.checkpoint import CONFIG
    from moa.config import load_config
    from moa.merging.export.export import export_adapter

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        export_adapter(folder, merged, experts)
        config = load_config(step / CONFIG, only_adapter(folder))
        model = build_model(config).eval()
    rank = max(site.lora_a.shape[0] for site in merged.values())
    return {"rank": rank, "scores": scores_of(model, config)}


def score_learned(
    settings: CompareConfig, ocr: Any, experts: Sequence[Any], step: Path, scores_of: Scores
) -> Iterator[Row]:
    """Each learner at its defaults, and the adapter fusion, which is not a merge."""
    from moa.merging.learn.calibration import load_unrouted, read_calibration
    from moa.merging.learn.fusion import learn_fusion
    from moa.merging.learn.session import Session

    model, config = load_unrouted(str(settings.run))
    data = read_calibration(config, model, num_samples=settings.num_learn, seed=0, ocr=ocr)
    session = Session(model=model, config=config, data=data, merge={"rank": settings.rank})
    steps: dict[str, Any] = {} if settings.steps is None else {"steps": settings.steps}
    for name in track(settings.learned, description="learning and scoring"):
        row: Row = {"method": name, "options": {"samples": settings.num_learn}}
        began = time.perf_counter()
        if name == FUSION:
            fusion = learn_fusion(model, data.batches(session.batch_size), **steps)
            row |= {"seconds": time.perf_counter() - began, "rank": None}
            row["options"]["merge"] = False
            with fusion.attached():
                row["scores"] = scores_of(model, config, "off")
        else:
            learner = LEARNERS[name]
            own = {key: value for key, value in steps.items() if key in learner.options}
            found = learner.function(session, **(learner.options | own))
            row["seconds"] = time.perf_counter() - began
            row |= score_adapter(found.merged, experts, step, scores_of)
        yield row


def trained_sets(results: Iterable[Any], config: Any) -> set[str]:
    """The data sets with samples of an expert: they name it, or it was trained on a source of their name or task."""
    own = [s for s in config.data.sources.values() if config.data.expert or s.expert]
    names, tasks = {s.name for s in own}, {s.task for s in own if s.task}
    samples = {r.name: [p.sample for p in r.responses] for r in results}
    return {
        name
        for name, found in samples.items()
        if any(s.expert in config.experts or s.source in names or s.task in tasks for s in found)
    }


def markdown(rows: list[Row], trained: set[str]) -> str:
    names = list(rows[0]["scores"])
    head = ["merge", "trained", "held out", *names, "rank", "seconds"]
    lines = [head, ["---"] * len(head)]
    for row in sorted(rows, key=lambda row: -(mean_of(row, trained) or 0.0)):
        options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        label = f"`{row['method']}`" + (f" ({options})" if options else "")
        means = (mean_of(row, trained), mean_of(row, set(names) - trained))
        cells = ["-" if v is None else f"{100 * v:.0f}" for v in (*means, *row["scores"].values())]
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.2f}"
        lines.append([label, *cells, str(row["rank"] or ""), seconds])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def mean_of(row: Row, names: set[str]) -> float | None:
    return mean(row["scores"][name] for name in names) if names else None


if __name__ == "__main__":
    main()
