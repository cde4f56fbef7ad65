"""Learn from a little data how a run's experts should be merged.

    python -m scripts.learn_weights run=runs/demo method=lora_soups out=weights.json
    python -m scripts.learn_weights run=runs/demo method=lorahub merge=ties budget=60 out=weights.json
    python -m scripts.learn_weights run=runs/demo method=regmean out=merged
    python -m scripts.learn_weights method=list

The data are `num_samples` of each of the run's validation sets. Most methods write the weight of every expert, per
site where they learn it so, for `python -m scripts.merge run=runs/demo weights=weights.json` by the same method;
regmean, regmean_pp, iteris and ziplora write the merged adapter. All print the score of a merge before (at its own
weights) and after.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from moa.cli.command import command, progress_bar
from moa.cli.ranges import Count, FilePath, NotNegative, Positive, Seed, Share, ShareAboveZero, Size
from moa.merging.learn.learners import LEARNERS
from moa.merging.methods.table import check_options, find_method
from moa.merging.rank import parse_rank


@dataclass(frozen=True, kw_only=True)
class LearnConfig:
    method: str = "lora_soups"  # `method=list` prints all, with their settings and papers
    run: FilePath | None = None  # a run or step folder, whose experts are merged
    # FILE.json of weights; for a method that writes no weights the folder of an adapter
    out: FilePath | None = None
    num_samples: Count = 32  # of each validation set
    batch_size: Size = 16
    seed: Seed = 0  # of the choice of samples and of searches
    # what is compared: loss of the answers (lower is better), or mean score of generated answers
    metric: Literal["loss", "scores"] = "loss"
    rank: Any = "sum"  # of the merge that is scored: a number, sum, or energy:0.99
    merge: str = "linear"  # for searches: the merging method whose weights are sought
    merge_options: dict[str, Any] = field(default_factory=dict)  # its options
    steps: Count | None = None  # of gradient descent; null here and below: the method's own
    lr: Positive | None = None
    per_site: bool | None = None  # false: one weight for all sites
    similarity: NotNegative | None = None  # of ziplora: weight of the mergers' cosine
    # of regmean and regmean_pp: what is left of the inputs' moments off the diagonal
    nondiagonal: Share | None = None
    # of these and iteris: pull to the mean of the experts, as a share of the inputs' mean square
    ridge: NotNegative | None = None
    size: Size | None = None  # of fresh_lora: its rank
    tune: bool | None = None  # of regmean: nondiagonal and ridge by the score, of six pairs
    answer_share: ShareAboveZero | None = (
        None  # of regmean: of the moments, as in scripts.statistics; null: tokens count alike
    )
    balance: bool | None = None  # of iteris: experts of large outputs count no more than others
    iterations: Count | None = None  # of iteris
    budget: Count | None = None  # of lorahub and enmp: merges tried
    prune: ShareAboveZero | None = None  # of enmp: of the pairs of a module and an expert
    optimizer: str | None = None  # of lorahub and enmp: one of nevergrad's, such as NGOpt or CMA
    bound: Positive | None = None  # of lorahub: weights lie in [-bound, bound]
    penalty: NotNegative | None = None  # of lorahub: on the mean size of the weights
    values: list[float] | None = None  # of grid
    runs: Count | None = None  # of uq_merge: passes over each image
    noise: NotNegative | None = None  # of uq_merge: on the images, as a share of their spread

    def __post_init__(self) -> None:
        parse_rank(self.rank)
        if self.values is not None and not self.values:
            raise ValueError("values: names none")


def learn(settings: LearnConfig, console: Console) -> None:
    if settings.method == "list":
        console.print(*learner_lines(), sep="\n", highlight=False, soft_wrap=True)
    else:
        run_learner(settings, console)


def run_learner(settings: LearnConfig, console: Console) -> None:
    options = check_settings(settings)
    from data.sources import open_ocr
    from moa.merging.learn.calibration import load_unrouted, read_calibration
    from moa.merging.learn.session import Session

    learner, run = LEARNERS[settings.method], str(settings.run)
    model, config = load_unrouted(run)
    chosen = {"num_samples": settings.num_samples, "seed": settings.seed}
    data = read_calibration(config, model, ocr=open_ocr(config.data), **chosen)
    merge = {"method": settings.merge, "options": settings.merge_options, "rank": settings.rank}
    total = learner.ticks(options, len(model.bank.names))
    with progress_bar(settings.method, total, console) as advance:
        about = {name: getattr(settings, name) for name in ("metric", "batch_size", "seed")}
        about["tick"] = lambda number, value: advance(f"{value:.4f}")
        session = Session(model=model, config=config, data=data, merge=merge, **about)
        before = session.value(session.remerge(None))
        start = time.perf_counter()
        found = learner.function(session, **options)
        seconds = time.perf_counter() - start
        after = session.value(found.merged)
    record = {
        "method": settings.method,
        "options": options,
        "merge": merge,
        "run": run,
        "experts": digests(run),
        "data": {name: len(samples) for name, samples in data.samples.items()},
        "num_skipped": data.num_skipped,
        "seed": settings.seed,
        "score": {"metric": settings.metric, "before": before, "after": after},
        "seconds": round(seconds, 2),
        **found.about,
    }
    write(Path(str(settings.out)), found, record)
    console.print(
        f"{settings.metric} on {sum(record['data'].values())} validation samples: {before:.4f} before, "
        f"{after:.4f} after, {seconds:.1f} s\nwritten: {settings.out}",
        soft_wrap=True,
    )


def digests(run: str) -> dict[str, str]:
    """Of the experts that the weights are learned with, so that they are not used with others."""
    from moa.merging.source import open_run
    from moa.merging.weights import digest

    return {expert.name: digest(expert) for expert in open_run(run).experts}


def check_settings(settings: LearnConfig) -> dict[str, Any]:
    """The learner's options; ValueError for what is missing, unknown or without effect."""
    if settings.method not in LEARNERS:
        raise ValueError(f"method: no such method {settings.method!r}; choices: {[*LEARNERS]}")
    for key in ("run", "out"):
        if getattr(settings, key) is None:
            raise ValueError(f"{key}: names no {'folder' if key == 'run' else 'file'}")
    learner = LEARNERS[settings.method]
    options = {key for row in LEARNERS.values() for key in row.options}
    given = {k: v for k in sorted(options) if (v := getattr(settings, k)) is not None}
    for key in given:
        if key not in learner.options:
            rule = f"has no effect with method={settings.method}"
            raise ValueError(f"{key}: {rule}; it has {list(learner.options) or 'none'}")
    if not learner.searches and (settings.merge != "linear" or settings.merge_options):
        raise ValueError(f"merge: has no effect with method={settings.method}, which learns a sum")
    find_method(settings.merge)
    check_options(settings.merge, settings.merge_options)
    if learner.writes_adapter:
        from moa.merging.export.folder import check_out

        check_out(str(settings.out))
    elif not str(settings.out).endswith(".json"):
        raise ValueError(f"out: {settings.method} writes weights to a file .json, got {settings.out}")
    return {**learner.options, **given}


def write(out: Path, found: Any, record: Mapping[str, Any]) -> None:
    """The weights as a file, or the merge of the learned experts as an adapter."""
    from moa.files.atomic import write_json
    from moa.merging.export.export import export_adapter

    if found.weights is not None:
        write_json(out, {**record, "weights": found.weights})
        return
    base = found.experts[0].config.get("base_model_name_or_path")
    count = sum(record["data"].values())
    about = f"LoRA experts merged by `{record['method']}`, learned from {count} validation samples."
    shared: dict[str, Any] = {"report": {"merge": record}, "card": {"about": about}}
    export_adapter(out, found.merged, found.experts, base=base, dtype="float32", **shared)


def learner_lines() -> Iterator[str]:
    for name, learner in LEARNERS.items():
        options = ", ".join(f"{key}={value}" for key, value in learner.options.items())
        yield f"{name}: {learner.paper}" + (f"\n    {options}" if options else "")


main = command(LearnConfig, learn, __doc__, quiet=True)

if __name__ == "__main__":
    main()
