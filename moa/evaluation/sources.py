"""From a run's config to scores: each data set with its prompt, its gates and its benchmark."""

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.checks import BadSampleError
from data.config import MADE, SourceConfig
from data.mixture import Mapped, Source, read_sample
from data.ocr import OcrCache
from data.pairs import PairCollator
from data.readers.table import open_records
from data.sample import Sample
from data.sources import open_ocr, open_sources
from moa.checkpoint import versions
from moa.clip_model import ClipMixture
from moa.config import RunConfig
from moa.evaluation.dual_encoder import evaluate_pairs
from moa.evaluation.fingerprints import data_digest, read_result, sample_digest, settings_digest
from moa.evaluation.predict import prompt_collator
from moa.evaluation.processes import ALONE, Processes
from moa.evaluation.result import Measured, Result, measured
from moa.evaluation.run import asked_of, evaluate
from moa.evaluation.settings import benchmark_of, chosen_sources
from moa.model import MixtureModel
from moa.sections import EvalConfig


def score_sources(
    model: MixtureModel,
    config: RunConfig,
    ocr: OcrCache | None = None,
    *,
    progress: bool = False,
    processes: Processes = ALONE,
    view: Callable[[Source], Source] = lambda dataset: dataset,
) -> list[Result]:
    """The result of every data set of `config.eval`, on the main process; the others help, and have none. `view` is
    what the model gets to see of a data set."""
    settings = settings_of(config)
    collator = prompt_collator(model, config, withhold_task=settings.withhold_task)
    results = []
    for source, whole in open_datasets(model, config, ocr):
        dataset = view(whole)
        shared: dict[str, Any] = {"name": source.name, "progress": progress, "processes": processes}
        if isinstance(model, ClipMixture) and isinstance(collator, PairCollator):
            result = evaluate_pairs(model, dataset, collator, settings, **shared)
        else:
            shared["benchmark"] = benchmark_of(source)
            result = evaluate(model, dataset, collator, settings, **shared)
        results.append(result)
    return results if processes.is_main else []


def settings_of(config: RunConfig) -> EvalConfig:
    return replace(config.eval, on_bad_sample=config.eval.on_bad_sample or config.data.on_bad_sample)


def open_datasets(
    model: MixtureModel, config: RunConfig, ocr: OcrCache | None = None
) -> list[tuple[SourceConfig, Source]]:
    """Each source with its data set; where their experts decide, ValueError if they are unknown."""
    sources, oracle = chosen_sources(config), config.eval.gates == "oracle"
    ocr = ocr if ocr is not None else open_ocr(config.data)
    opened: Sequence[Source] = [*open_sources(sources, config.data, ocr).values()]
    if oracle or model.routing.kind.by_expert:
        with_expert = trained_experts(config)
        opened = [Mapped(dataset, with_expert) for dataset in opened]
    found = list(zip(sources, opened, strict=True))
    for source, dataset in found if oracle else ():
        check_oracle(source.name, dataset, model.routes)
    return found


def trained_experts(config: RunConfig) -> Callable[[Sample], Sample]:
    """What gives a sample without an expert the one that training gives to its source's name, or else to its task."""
    by_source: dict[str, set[str]] = {}
    by_task: dict[str, set[str]] = {}
    for source in config.data.sources.values():
        if source.expert is not None:
            by_source.setdefault(source.name, set()).add(source.expert)
            for task in tasks_of(source):
                by_task.setdefault(task, set()).add(source.expert)

    def with_expert(sample: Sample) -> Sample:
        found = by_source.get(sample.source) or by_task.get(sample.task, set())
        own = next(iter(found)) if len(found) == 1 else None
        return sample if sample.expert else replace(sample, expert=own)

    return with_expert


def tasks_of(source: SourceConfig, most: int = 1000) -> set[str]:
    """The task that a source names, or those of its first rows; no image is opened."""
    if source.task is not None or source.format in MADE:
        return {source.task} if source.task else set()
    dataset = open_records(source, source.expert)
    found = set()
    for index in range(min(len(dataset), most)):
        with suppress(BadSampleError):  # counted where the source is trained on
            found.add(dataset.records.read(index)[0].task or dataset.default_task)
    return found


def check_oracle(name: str, dataset: Source, experts: Collection[str]) -> None:
    """ValueError where a sample has no expert of this model: the oracle would mix all of them."""
    samples = [read_sample(dataset, index, name) for index in range(len(dataset))]
    lost = [s for s in samples if isinstance(s, Sample) and s.expert not in experts]
    if lost:
        found = f"{len(lost)} of {len(samples)} samples of {name} have no expert, such as {lost[0].id}"
        way_out = f"set eval.sources.{name}.expert, or leave the data set out by eval.only=[...]"
        task, choices = f"(task {lost[0].task!r})", f"choices: {', '.join(experts)}"
        raise ValueError(f"gates=oracle: {found} {task}; {way_out}; {choices}")


def kept_results(model: MixtureModel, config: RunConfig, folder: Path, weights: str | None) -> list[Measured]:
    """The results in `folder` that an evaluation now would only repeat; none of a CLIP."""
    settings = settings_of(config)
    collator = prompt_collator(model, config, withhold_task=settings.withhold_task)
    if weights is None or isinstance(collator, PairCollator):
        return []
    kept = []
    for source, dataset in open_datasets(model, config):
        if (found := read_result(folder, source.name)) is None:
            continue
        read = (read_sample(dataset, index, source.name) for index in range(len(dataset)))
        wanted = {
            "weights": weights,
            "base": model.backbone.fingerprint,
            "settings": settings_digest(asked_of(settings, benchmark_of(source), collator)),
            "data": data_digest(map(sample_digest, read)),
        }
        record, rows = found
        if record["versions"] == versions() and wanted.items() <= record["fingerprints"].items():
            kept.append(measured(record, rows))
    return kept
