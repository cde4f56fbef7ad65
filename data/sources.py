"""From the config's source entries to map-style data sets."""

from collections.abc import Iterable
from typing import Any

from data.boxes import CODECS
from data.collate import Collator, Intake
from data.mixture import Grouping, Mixture, Source
from data.ocr import OcrCache
from data.ocr_engines import RapidOcr
from data.pairs import PairCollator
from data.readers.table import open_records
from data.world.drawings import DrawingDataset
from data.world.scene_dataset import SceneDataset
from moa.config import MADE, DataConfig, RunConfig, SourceConfig


def open_source(
    source: SourceConfig,
    expert: str | None,
    ocr: OcrCache | None,
) -> Source:
    if source.format not in MADE:
        return open_records(source, expert, ocr)
    assert source.num_samples is not None  # checked by SourceConfig
    if source.format == "drawings":
        return DrawingDataset(
            source.split or "train",
            source.task or "names",
            num_samples=source.num_samples,
            style=source.style,
            template=source.prompt,
            expert=expert,
            source=source.name,
            seed=source.seed,
        )
    return SceneDataset(
        source.split or "train",
        source.task,
        num_samples=source.num_samples,
        style=source.style,
        expert=expert,
        source=source.name,
        seed=source.seed,
        ocr=ocr,
    )


def open_ocr(data: DataConfig, path: str | None = None) -> OcrCache | None:
    """The function from an image to its OCR words, or None where the run has no OCR evidence.

    `path` is a source's own cache; None is that of the run.
    """
    file = path or data.ocr_cache
    if file is None:
        return None
    engine = RapidOcr(min_confidence=data.ocr_min_confidence) if data.ocr_engine else None
    return OcrCache(file, engine=engine)


def open_sources(
    sources: Iterable[SourceConfig],
    data: DataConfig,
    ocr: OcrCache | None,
) -> dict[str, Source]:
    """One data set per entry, by name; caches are shared, since they hold their words in memory."""
    sources = [*sources]
    caches: dict[str | None, OcrCache | None] = {None: ocr}
    for path in {source.ocr_cache for source in sources if source.ocr_cache}:
        caches[path] = open_ocr(data, path)
    return {s.name: open_source(s, data.expert or s.expert, caches[s.ocr_cache]) for s in sources}


def open_mixture(config: RunConfig, ocr: OcrCache | None) -> Mixture:
    """The training mixture of a run."""
    data = config.data
    sources = open_sources(data.sources.values(), data, ocr)
    grouping = None
    if data.group_by_length:
        grouping = Grouping(batch_size=config.train.batch_size, window=data.group_window)
    if any(source.counts_draws for source in data.sources.values()):
        draws = {n: draws_of(s, len(sources[n])) for n, s in data.sources.items()}
        return Mixture(sources, draws=draws, seed=config.seed, grouping=grouping)
    weights = {n: 1.0 if s.weight is None else s.weight for n, s in data.sources.items()}
    return Mixture(sources, weights, seed=config.seed, grouping=grouping)


def draws_of(source: SourceConfig, size: int) -> int:
    """Draws per epoch of a source with `count` or `epochs`."""
    return source.count if source.count is not None else round((source.epochs or 0.0) * size)


def make_collator(config: RunConfig, intake: Intake, **changes: Any) -> Collator:
    """The run's collator, one of pairs for the processor of a CLIP; `changes` are its fields."""
    prompt, processor = config.prompt, intake.processor
    codec = intake.box_codec if prompt.box_codec == "auto" else prompt.box_codec
    fields: dict[str, Any] = {
        "processor": processor,
        "tasks": list(config.data.tasks),
        "experts": config.routes,
        "codec": None if codec is None else CODECS[codec],
        "text_only": intake.text_only,
        "stops": intake.stops,
        "task_in_prompt": prompt.task_in_prompt,
        "ocr_in_prompt": prompt.ocr_in_prompt,
        "task_dropout": prompt.task_dropout,
        "task_template": prompt.task_template,
        "ocr_template": prompt.ocr_template,
        "ocr_separator": prompt.ocr_separator,
        "max_length": prompt.max_length,
        "max_ocr_words": prompt.max_ocr_words,
        "min_visible": prompt.min_visible,
    }
    context = getattr(processor, "context_length", None)  # that of a ClipProcessor alone
    if context is None:
        return Collator(**fields | changes)
    return PairCollator(**fields | {"max_length": min(context, prompt.max_length)} | changes)
