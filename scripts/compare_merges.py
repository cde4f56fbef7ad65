"""Which merge keeps the skills? Every method on a run's experts, at its defaults and tuned by one rule, with controls.

    python -m scripts.compare_merges run=runs/demo out=results
    python -m scripts.compare_merges run=runs/demo methods=[ties,wudi] learned=[] ranks=[8] num_samples=64

Each row is ONE adapter of one rank. The tuned column has the same rule for all (moa/merging/learn/tuning.py): the mean
expert's length times ten scales, and one option of the method, by the loss of `num_learn` samples of each validation
set, which the learners see too. The test sets, data.sources of the evaluation, decide nothing.

Writes compare_merges.json and compare_merges.md. Scores are means over the data sets that belong to an expert (it is
named, or trained on a source of this name or task) in per cent, with a 95 % interval over the questions; `of routed` is
their ratio to the routed run's, `of the gain` the same of what both add to the base, on the same questions; `worst` is
the data set that keeps the least of the routed score; `held out` are the other data sets. Controls: the base, each
expert alone, a random direction, and a new LoRA trained on the same samples (`fresh_lora`). `adapter_fusion` is not a
merge: an attention over the experts' outputs.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from moa.cli.command import command
from moa.cli.ranges import Count, FilePath, Seed
from moa.merging.learn.learners import LEARNERS
from moa.merging.methods.table import METHODS, TUNED, find_method
from moa.merging.rank import parse_rank
from moa.metrics.intervals import Kind, paired_interval

# Two-expert methods have no meaning for a run of more; a uniform sum at full weight is task_arithmetic.
LEFT_OUT = ("slerp", "sa_merge")
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "robustmerge": [{"variant": v} for v in ("paper_per_task", "paper_factor_sum", "official_code")],
    "ties": [{}, {"reduce": "sum"}],
}
FUSION = "adapter_fusion"
LEARNED = (*LEARNERS, FUSION)
BASE, ROUTED = "base", "routed, not merged"
COLUMNS = ("default", "tuned")
Questions = dict[str, np.ndarray]  # by data set: the score of each question
Row = dict[str, Any]  # method, options, data, rank; for `default` and `tuned` its scores and how it was made


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    run: FilePath | None = None  # run or step folder, whose experts are merged
    out: FilePath = "results"  # folder to write
    ranks: list[Any] = field(default_factory=lambda: ["sum", 8])  # of the results: a number, sum or energy:0.99
    # names of scripts.merge method=list; null: all that take any number of experts, those that read the statistics of
    # inputs where the run has them
    methods: list[str] | None = None
    learned: list[str] = field(default_factory=lambda: list(LEARNED))  # learners
    tuned: bool = True  # false: defaults alone
    num_learn: Count = 48  # validation samples of each data set, for tuning and learners
    steps: Count | None = None  # of gradient descent; null: each learner's own
    num_samples: Count = 512  # questions of each data set
    seed: Seed = 0  # of the choice of samples, the searches and the random control

    def __post_init__(self) -> None:
        for rank in self.ranks:
            parse_rank(rank)
        if not self.ranks:
            raise ValueError("ranks: names none")
        for method in self.methods or ():
            find_method(method)
        if unknown := set(self.learned) - set(LEARNED):
            raise ValueError(f"learned: no {sorted(unknown)}; choices: {', '.join(LEARNED)}")


def compare(settings: CompareConfig, console: Console) -> None:
    from moa.checkpoint import load_model
    from moa.files.atomic import write_file, write_json

    if settings.run is None:
        raise ValueError("run: names no folder")
    arena = open_arena(settings, settings.run, console)
    routed, _, config = load_model(settings.run, "cpu")
    alone = [(f"expert {name}", name) for name in routed.bank.names]
    rows: list[Row] = [
        {"method": label, "options": {}, "data": "none", "default": {"scores": arena.scores(routed, config, gates)}}
        for label, gates in ((BASE, "off"), (ROUTED, "router"), *alone)
    ]
    del routed
    for rank in settings.ranks:
        session = arena.session(rank)
        rows += [arena.method_row(session, *job) for job in track([*jobs(settings, arena)], f"rank {rank}: methods")]
        rows.append(arena.random_row(session))
        rows += [arena.learned_row(session, name) for name in track(settings.learned, f"rank {rank}: learners")]
    summarise(rows, arena.trained)
    table, out = markdown(rows), Path(settings.out)
    for made in (row[column] for row in rows for column in COLUMNS if column in row):
        made["scores"] = {name: float(scores.mean()) for name, scores in made["scores"].items()}
    record = {**asdict(settings), "trained": sorted(arena.trained), "rows": rows}
    write_json(out / "compare_merges.json", record)
    write_file(out / "compare_merges.md", table)
    console.print(table, soft_wrap=True)


def open_arena(settings: CompareConfig, run: str, console: Console) -> "Arena":
    from data.sources import open_ocr
    from moa.checkpoint import step_folder
    from moa.files.peft import STATISTICS_FILE
    from moa.merging.learn.calibration import load_unrouted, read_calibration
    from moa.merging.source import open_run, with_statistics

    source = open_run(step_folder(run))
    merged = [f for e, f in zip(source.experts, source.folders, strict=True) if e.name not in source.shared]
    known = all((folder / STATISTICS_FILE).is_file() for folder in merged)
    if known or any(find_method(method).reads_inputs for method in settings.methods or ()):
        source = with_statistics(source)
    else:
        left = ", ".join(name for name, row in METHODS.items() if row.reads_inputs)
        console.print(f"left out: {left}; scripts.statistics writes what they read", soft_wrap=True)
    model, config = load_unrouted(run)
    ocr = open_ocr(config.data)
    data = read_calibration(config, model, num_samples=settings.num_learn, seed=settings.seed, ocr=ocr)
    return Arena(settings=settings, model=model, config=config, data=data, ocr=ocr, experts=source.experts)


def jobs(settings: CompareConfig, arena: "Arena") -> Iterator[tuple[str, dict[str, Any]]]:
    """Methods with options, of each row."""
    known = any(expert.inputs is not None for expert in arena.experts)
    every = [m for m, row in METHODS.items() if m not in LEFT_OUT and (known or not row.reads_inputs)]
    for method in every if settings.methods is None else settings.methods:
        for options in OPTIONS.get(method, [{}]):
            yield method, options


@dataclass(kw_only=True)
class Arena:
    """A run's experts in one live model without its router, and the questions that every merge gets."""

    settings: CompareConfig
    model: Any
    config: Any
    data: Any  # for tuning and learners
    ocr: Any
    experts: Sequence[Any]  # with the statistics of their inputs, where these are known
    trained: set[str] = field(default_factory=set)  # data sets that belong to an expert

    def scores(self, model: Any, config: Any, gates: str) -> Questions:
        from moa.evaluation.settings import with_eval
        from moa.evaluation.sources import score_sources

        shown = {"num_images": 0, "num_samples": self.settings.num_samples}
        results = score_sources(model, with_eval(config, gates=gates, **shown), self.ocr)
        if not self.trained:  # by the run's own config
            self.trained.update(trained_sets(results, config))
        return {result.name: np.array(result.sample_scores) for result in results}

    def session(self, rank: Any) -> Any:
        from moa.merging.learn.session import Session

        about = {"data": self.data, "merge": {"rank": rank}, "seed": self.settings.seed}
        return Session(model=self.model, config=self.config, **about)

    def column(self, merged: Any, began: float, **about: Any) -> Row:
        """A merge's scores, with the seconds that making it took."""
        from moa.merging.learn.calibration import MERGED, with_merged

        about["seconds"] = time.perf_counter() - began
        with with_merged(self.model, merged, self.experts):
            return {**about, "scores": self.scores(self.model, self.config, MERGED)}

    def tuned(self, session: Any, candidates: Iterable[tuple[Mapping[str, Any], Any]], added: Sequence[str]) -> Row:
        from moa.merging.learn import tuning

        began = time.perf_counter()
        wanted = tuning.mean_length([e for e in self.experts if e.name not in session.shared])
        rank = session.merge["rank"]
        complete = lambda merged: tuning.with_added(merged, self.experts, added, rank)  # noqa: E731
        found = tuning.tune(candidates, wanted, session.value, complete=complete)
        about = {"options": dict(found.options), "scale": found.scale, "loss": found.loss, "passes": len(found.tried)}
        return self.column(found.merged, began, **about)

    def method_row(self, session: Any, method: str, options: dict[str, Any]) -> Row:
        from moa.merging.learn.tuning import choices
        from moa.merging.merge import merge

        rank, shared = session.merge["rank"], session.shared
        own: dict[str, Any] = {"method": method, "rank": rank}
        began = time.perf_counter()
        row = {**own, "options": options, "data": "inputs" if find_method(method).reads_inputs else "none"}
        row["default"] = self.column(merge(self.experts, options=options, added=shared, **own), began)
        if self.settings.tuned:
            # shared experts are added to what was scaled, and the rank is that of both
            merged = [expert for expert in self.experts if expert.name not in shared]
            own["rank"] = "sum" if shared else rank
            grid = dict([TUNED[method]]) if method in TUNED else {}
            made = ((chosen, merge(merged, options=chosen, **own)) for chosen in choices(options, grid))
            row["tuned"] = self.tuned(session, made, shared)
        return row

    def random_row(self, session: Any) -> Row:
        """A random direction, as long as the mean expert."""
        from moa.merging.learn import tuning
        from moa.merging.merge import merge

        rank, merged = session.merge["rank"], [e for e in self.experts if e.name not in session.shared]
        began, random = time.perf_counter(), merge([tuning.random_expert(merged, self.settings.seed)], rank=rank)
        even = tuning.scaled(random, tuning.mean_length(merged) / tuning.length_of(random))
        whole = tuning.with_added(even, self.experts, session.shared, rank)
        row: Row = {"method": "random direction", "options": {}, "data": "none", "rank": rank}
        row["default"] = self.column(whole, began)
        if self.settings.tuned:
            row["tuned"] = self.tuned(session, [({}, random)], session.shared)
        return row

    def learned_row(self, session: Any, name: str) -> Row:
        """A learner at its defaults, or the adapter fusion; tuned by its length alone."""
        from moa.merging.learn.fusion import learn_fusion

        steps: dict[str, Any] = {} if self.settings.steps is None else {"steps": self.settings.steps}
        began, row = time.perf_counter(), {"method": name, "options": {}, "rank": session.merge["rank"]}
        if name == FUSION:
            fusion = learn_fusion(self.model, self.data.batches(session.batch_size), **steps)
            seconds = time.perf_counter() - began
            with fusion.attached():
                found = {"scores": self.scores(self.model, self.config, "off"), "seconds": seconds}
            return {**row, "data": "answers", "default": found, "rank": None}
        learner = LEARNERS[name]
        own = {key: value for key, value in steps.items() if key in learner.options}
        merged = learner.function(session, **(learner.options | own)).merged
        row |= {"data": learner.data, "default": self.column(merged, began)}
        if self.settings.tuned and not session.shared:
            row["tuned"] = self.tuned(session, [({}, merged)], [])
        return row


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


def summarise(rows: list[Row], trained: set[str]) -> None:
    """Put into every column what the table shows of its scores, in per cent."""
    base, routed = (next(r for r in rows if r["method"] == m)["default"]["scores"] for m in (BASE, ROUTED))
    for made in (row[column] for row in rows for column in COLUMNS if column in row):
        scores = made["scores"]
        kept = {name: scores[name].mean() / routed[name].mean() for name in trained if routed[name].mean() > 0}
        worst = min(kept, key=kept.__getitem__) if kept else None
        rest = [scores[name] for name in scores if name not in trained]
        made["summary"] = {
            "trained": interval(scores, None, trained, "difference"),
            "held_out": 100 * float(np.mean([own.mean() for own in rest])) if rest else None,
            "of_routed": interval(scores, routed, trained, "ratio"),
            "of_gain": interval(less(scores, base), less(routed, base), trained, "ratio"),
            "worst": None if worst is None else [worst, 100 * float(kept[worst])],
        }


def less(one: Questions, other: Questions) -> Questions:
    return {name: own - other[name] for name, own in one.items()}


def interval(one: Questions, other: Questions | None, names: set[str], kind: Kind) -> list[float] | None:
    """The value in per cent and the ends of its interval over the questions; None where it has no value."""
    if not names:
        return None
    first = [one[name][None] for name in sorted(names)]
    second = [other[name][None] for name in sorted(names)] if other else [np.zeros_like(own) for own in first]
    with np.errstate(invalid="ignore"):  # some draw may divide by zero, which is no interval
        found = paired_interval(first, second, kind=kind)
    values = [100 * value for value in (found.value, found.low, found.high)]
    return values if np.isfinite(values).all() else None


def markdown(rows: list[Row]) -> str:
    """One row a merge and rank, the best of the tuned column first; shares are those of its last column."""
    head = ["merge", "data", "rank", "default", "tuned", "of routed", "of the gain", "worst", "held out", "seconds"]
    lines = [head, ["---"] * len(head)]
    for row in sorted(rows, key=lambda row: -(last(row)["summary"]["trained"] or [0.0])[0]):
        options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        label = f"`{row['method']}`" + (f" ({options})" if options else "")
        made = [row[column] for column in COLUMNS if column in row]
        found = made[-1]["summary"]
        means = [shown(m["summary"]["trained"]) for m in made] + ["-"] * (2 - len(made))
        worst = "-" if found["worst"] is None else f"{found['worst'][0]} {found['worst'][1]:.0f}"
        held_out = "-" if found["held_out"] is None else f"{found['held_out']:.0f}"
        seconds = " / ".join(f"{m['seconds']:.1f}" for m in made if "seconds" in m)
        cells = [*means, shown(found["of_routed"]), shown(found["of_gain"]), worst, held_out, seconds]
        lines.append([label, row["data"], str(row.get("rank") or ""), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def last(row: Row) -> Row:
    found: Row = row["tuned" if "tuned" in row else "default"]
    return found


def shown(found: Sequence[float] | None) -> str:
    if found is None:
        return "-"
    return f"{found[0]:.0f} [{found[1]:.0f}, {found[2]:.0f}]"


main = command(CompareConfig, compare, __doc__)

if __name__ == "__main__":
    main()
