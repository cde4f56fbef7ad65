"""From a run's config to scores: which data sets, with which prompt, by whose gates."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data.checks import BadSampleError
from data.collate import Collator
from data.mixture import Source, read_sample
from data.ocr import OcrCache
from data.pairs import PairCollator
from data.readers.table import open_records
from data.sample import Sample
from data.sources import make_collator, open_ocr, open_sources
from moa.benchmarks.catalogue import benchmark_of, check_sources
from moa.checkpoint import versions
from moa.cli.ranges import Count, CountOrZero, Size
from moa.clip_model import ClipMixture
from moa.config import MADE, RunConfig, SourceConfig, check
from moa.evaluation.dual_encoder import evaluate_pairs
from moa.evaluation.fingerprints import data_digest, read_result, sample_digest, settings_digest
from moa.evaluation.processes import ALONE, Processes
from moa.evaluation.result import Measured, Result, measured_in
from moa.evaluation.run import evaluate, prompt_settings
from moa.model import MixtureModel


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    # data sets to score; null: the run's eval.sources, or else its data.validation
    sources: dict[str, SourceConfig] | None = None
    only: list[str] | None = None  # names of the data sets to score; null: all
    num_samples: Count | None = None  # at most so many of each data set; null: all
    score: bool = True  # false: only write the answers, for splits whose references are secret
    # who decides: router, oracle, uniform, off (the base), the name of one expert, or without:NAME
    gates: str = "router"
    # further gates to score beside these, in one table; null: as the run's eval
    compare: list[str] | None = None
    withhold_task: bool = False  # neither the prompt nor the router is told the task
    batch_size: Size | None = None  # samples per forward; null: as the run's eval
    max_new_tokens: Size | None = None  # of a generated answer; null: as the run's eval
    num_beams: Size | None = None  # 1: greedy; null: as the run's eval
    on_bad_sample: Literal["error", "skip"] | None = None  # null: as the run's data
    # results that lie in the folder are not measured again if weights, data, settings and versions are the same
    reuse: bool = False
    other_base: bool = False  # score on a base that changed since, or is another one
    num_pictures: CountOrZero = 12  # samples in the gallery; 0: no pictures at all
    device: str = "auto"  # cpu, cuda, cuda:1; auto: a GPU where there is one
    progress: bool = True  # progress bars

    def __post_init__(self) -> None:
        for key in ("num_samples", "batch_size", "max_new_tokens", "num_beams"):
            value = getattr(self, key)
            check(value is None or value >= 1, key, f"must be 1 or more, got {value}")
        check(self.num_pictures >= 0, "num_pictures", f"must be 0 or more, got {self.num_pictures}")
        check(self.only is None or bool(self.only), "only", "names no data set; null means all")

    @property
    def is_full(self) -> bool:
        """Whether every sample of the run's own data sets is scored."""
        return (
            self.sources is None and self.only is None and self.num_samples is None and self.score
        )

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
    check_sources(sources.values(), settings.only or ())
    return [
        replace(source, num_samples=fewest(source.num_samples, settings.num_samples))
        for name, source in sources.items()
        if settings.only is None or name in settings.only
    ]


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
    opened = open_datasets(model, config, settings, sources, ocr)
    results = [
        score_source(model, config, settings, source, dataset, collator, processes)
        for source, dataset in zip(sources, opened, strict=True)
    ]
    return results if processes.is_main else []


def open_datasets(
    model: MixtureModel,
    config: RunConfig,
    settings: EvalSettings,
    sources: Sequence[SourceConfig],
    ocr: OcrCache | None,
) -> Sequence[Source]:
    """The data set of each source; where their experts decide, ValueError if they are unknown."""
    opened: Sequence[Source] = [*open_sources(sources, config.data, ocr).values()]
    if settings.gates == "oracle" or model.routing.kind.by_expert:
        expert_of = trained_experts(config)
        opened = [Guided(dataset=dataset, expert_of=expert_of) for dataset in opened]
    if settings.gates == "oracle":
        check_oracle(dict(zip((s.name for s in sources), opened, strict=True)), model.routes)
    return opened


@dataclass(frozen=True, kw_only=True)
class Guided:
    """A data set whose samples without an expert get that of their source or task in training."""

    dataset: Source
    expert_of: Callable[[Sample], str | None]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        return sample if sample.expert else replace(sample, expert=self.expert_of(sample))


def trained_experts(config: RunConfig) -> Callable[[Sample], str | None]:
    """Sample -> the expert that training gives to sources of its source's name, or else to its task.

    None where that is no expert, or several.
    """
    by_source: dict[str, set[str]] = {}
    by_task: dict[str, set[str]] = {}
    for source in config.data.sources.values():
        if source.expert is not None:
            by_source.setdefault(source.name, set()).add(source.expert)
            for task in tasks_of(source):
                by_task.setdefault(task, set()).add(source.expert)

    def expert_of(sample: Sample) -> str | None:
        found = by_source.get(sample.source) or by_task.get(sample.task, set())
        return next(iter(found)) if len(found) == 1 else None

    return expert_of


def tasks_of(source: SourceConfig, most: int = 1000) -> set[str]:
    """The task that a source names, or those of its first rows; no picture is opened."""
    if source.task is not None or source.format in MADE:
        return {source.task} if source.task else set()
    dataset = open_records(source, source.expert)
    found = set()
    for index in range(min(len(dataset), most)):
        with suppress(BadSampleError):  # counted where the source is trained on
            found.add(dataset.records.read(index)[0].task or dataset.default_task)
    return found


def check_oracle(datasets: Mapping[str, Source], experts: Collection[str]) -> None:
    """ValueError where a sample has no expert of this model: the oracle would mix all of them."""
    for name, dataset in datasets.items():
        samples = [read_sample(dataset, index, name) for index in range(len(dataset))]
        lost = [s for s in samples if isinstance(s, Sample) and s.expert not in experts]
        if lost:
            raise ValueError(
                f"gates=oracle: {len(lost)} of {len(samples)} samples of {name} have no expert, such as "
                f"{lost[0].id} (task {lost[0].task!r}): neither the source nor a training source of this "
                f"name or task names one of {', '.join(experts)}; set sources.{name}.expert, or leave the "
                "data set out by only=[...]"
            )


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
    asked = asked_of(config, settings, source)
    shared: dict[str, Any] = {
        "name": source.name,
        "num_pictures": settings.num_pictures,
        "progress": settings.progress,
        "processes": processes,
    }
    if isinstance(model, ClipMixture) and isinstance(collator, PairCollator):
        rest = {key: asked[key] for key in ("gates", "batch_size", "on_bad_sample")}
        return evaluate_pairs(model, dataset, collator, **rest, **shared)
    return evaluate(model, dataset, collator, **asked, **shared)


def asked_of(config: RunConfig, settings: EvalSettings, source: SourceConfig) -> dict[str, Any]:
    """How the model is asked, as far as it is no matter of the prompt."""
    return {
        "benchmark": benchmark_of(source),
        "scored": settings.score,
        "gates": settings.gates,
        "batch_size": settings.batch_size or config.eval.batch_size,
        "max_new_tokens": settings.max_new_tokens or config.eval.max_new_tokens,
        "num_beams": settings.num_beams or config.eval.num_beams,
        "on_bad_sample": settings.on_bad_sample or config.data.on_bad_sample,
    }


def kept_results(
    model: MixtureModel,
    config: RunConfig,
    settings: EvalSettings,
    folder: Path,
    weights: str | None,
) -> list[Measured]:
    """The results in `folder` that an evaluation now would only repeat; none of a CLIP."""
    collator = prompt_collator(model, config, withhold_task=settings.withhold_task)
    if weights is None or isinstance(collator, PairCollator):
        return []
    kept, sources = [], chosen_sources(config, settings)
    opened = open_datasets(model, config, settings, sources, open_ocr(config.data))
    for source, dataset in zip(sources, opened, strict=True):
        if (found := read_result(folder, source.name)) is None:
            continue
        asked = asked_of(config, settings, source) | {"prompt": prompt_settings(collator)}
        read = (read_sample(dataset, index, source.name) for index in range(len(dataset)))
        wanted = {
            "weights": weights,
            "base": model.backbone.fingerprint,
            "settings": settings_digest(asked),
            "data": data_digest(map(sample_digest, read)),
        }
        record, rows = found
        if record["versions"] == versions() and wanted.items() <= record["fingerprints"].items():
            kept.append(measured_in(record, rows))
    return kept
