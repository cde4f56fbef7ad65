"""From a run's config to scores: which data sets, with which prompt, by whose gates."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from data.collate import Collator
from data.mixture import Source
from data.ocr import OcrCache
from data.pairs import PairCollator
from data.sources import make_collator, open_ocr, open_sources
from moa.benchmarks.catalogue import BENCHMARKS, benchmark_of
from moa.benchmarks.result import Result
from moa.benchmarks.run import evaluate
from moa.benchmarks.two_towers import evaluate_pairs
from moa.clip_model import ClipMixture
from moa.config import RunConfig, SourceConfig
from moa.model import MixtureModel
from moa.processes import ALONE, Processes


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    # data sets to score; null: the run's eval.sources, or else its data.validation
    sources: list[SourceConfig] | None = None
    only: list[str] | None = None  # names of the data sets to score; null: all
    num_samples: int | None = None  # at most so many of each data set; null: all
    score: bool = True  # false: only write the answers, for splits whose references are secret
    # who decides: router, oracle, uniform, off (the base), the name of one expert, or without:NAME
    gates: str = "router"
    # further gates to score beside these, in one table; null: as the run's eval
    compare: list[str] | None = None
    withhold_task: bool = False  # neither the prompt nor the router is told the task
    batch_size: int | None = None  # samples per forward; null: as the run's eval
    max_new_tokens: int | None = None  # of a generated answer; null: as the run's eval
    num_beams: int | None = None  # 1: greedy; null: as the run's eval
    on_bad_sample: Literal["error", "skip"] | None = None  # null: as the run's data
    num_pictures: int = 12  # samples in the gallery; 0: no pictures at all
    device: str = "auto"  # cpu, cuda, cuda:1; auto: a GPU where there is one
    progress: bool = True  # progress bars

    @property
    def variant(self) -> str:
        """The folder below <run>/eval, empty for the model as it was trained."""
        parts = [self.gates.replace(":", "-")] if self.gates != "router" else []
        return "_".join([*parts, *(["no_task"] if self.withhold_task else [])])


def chosen_sources(config: RunConfig, settings: EvalSettings) -> list[SourceConfig]:
    """The data sets to score, cut to `num_samples`; ValueError where that leaves none."""
    sources = settings.sources or config.eval.sources or config.data.validation
    if not sources:
        raise ValueError("sources: names none, and the run has neither eval.sources nor validation")
    check_sources(sources, settings.only or ())
    return [
        replace(source, num_samples=fewest(source.num_samples, settings.num_samples))
        for source in sources
        if settings.only is None or source.name in settings.only
    ]


def check_sources(sources: Sequence[SourceConfig], only: Sequence[str]) -> None:
    """ValueError for a name that stands twice or not at all, and for an unknown benchmark."""
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"sources: two data sets have the name {', '.join(twice)}")
    for source in sources:
        if source.benchmark is not None and source.benchmark not in BENCHMARKS:
            choices = f"no benchmark {source.benchmark!r}; choices: {', '.join(BENCHMARKS)}"
            raise ValueError(f"sources.{source.name}.benchmark: {choices}")
    for name in only:
        if name not in names:
            raise ValueError(f"only: no data set {name!r}; choices: {', '.join(names)}")


def fewest(*counts: int | None) -> int | None:
    return min((count for count in counts if count is not None), default=None)


def prompt_collator(model: MixtureModel, config: RunConfig, *, withhold_task: bool) -> Collator:
    """The run's own prompts, for generation; held-out tasks are welcome."""
    return make_collator(
        config,
        model.backbone.intake,
        for_generation=True,
        withhold_task=withhold_task,
        allow_unknown_tasks=True,
    )


def score_sources(
    model: MixtureModel,
    config: RunConfig,
    settings: EvalSettings,
    ocr: OcrCache | None = None,
    processes: Processes = ALONE,
) -> list[Result]:
    """The result of every chosen data set, on the main process; the others help, and have none.

    Give the same `ocr` to read each picture only once.
    """
    sources = chosen_sources(config, settings)
    collator = prompt_collator(model, config, withhold_task=settings.withhold_task)
    ocr = ocr if ocr is not None else open_ocr(config.data)
    opened = open_sources(sources, config.data, ocr).values()
    results = [
        score_source(model, config, settings, source, dataset, collator, processes)
        for source, dataset in zip(sources, opened, strict=True)
    ]
    return results if processes.is_main else []


def score_source(
    model: MixtureModel,
    config: RunConfig,
    settings: EvalSettings,
    source: SourceConfig,
    dataset: Source,
    collator: Collator,
    processes: Processes,
) -> Result:
    """One data set: a CLIP compares, the others generate."""
    shared: dict[str, Any] = {
        "name": source.name,
        "gates": settings.gates,
        "batch_size": settings.batch_size or config.eval.batch_size,
        "on_bad_sample": settings.on_bad_sample or config.data.on_bad_sample,
        "num_pictures": settings.num_pictures,
        "progress": settings.progress,
        "processes": processes,
    }
    if isinstance(model, ClipMixture) and isinstance(collator, PairCollator):
        return evaluate_pairs(model, dataset, collator, **shared)
    return evaluate(
        model,
        dataset,
        collator,
        benchmark=benchmark_of(source),
        scored=settings.score,
        max_new_tokens=settings.max_new_tokens or config.eval.max_new_tokens,
        num_beams=settings.num_beams or config.eval.num_beams,
        **shared,
    )
