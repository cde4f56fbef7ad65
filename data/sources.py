"""From the config to map-style data sets, their mixture, and the collator."""

from collections.abc import Iterable
from typing import Any

from data.boxes import CODECS
from data.collate import ChatCollator
from data.config import MADE, DataConfig, SourceConfig
from data.mixture import Grouping, Mixture, Source
from data.ocr import OcrCache
from data.ocr_engines import RapidOcr
from data.pairs import PairCollator
from data.prompt import Intake
from data.readers.table import open_records
from moa.config import RunConfig


def open_source(source: SourceConfig, expert: str | None, ocr: OcrCache | None) -> Source:
    if source.format not in MADE:
        return open_records(source, expert, ocr)
    assert source.num_samples is not None  # checked by SourceConfig
    split = source.split or "train"
    shared: dict[str, Any] = {"num_samples": source.num_samples, "style": source.style}
    shared |= {"expert": expert, "source": source.name, "seed": source.seed}
    # the embedded worlds need the libraries of the extra `demo`
    if source.format == "drawings":
        from data.world.drawings import DrawingDataset

        return DrawingDataset(split, source.task or "names", template=source.prompt, **shared)
    from data.world.scene_dataset import SceneDataset

    shared |= {"asks": source.asks, "convention": source.convention, "sign": source.sign}
    return SceneDataset(split, source.task, ocr=ocr, **shared)


def open_ocr(data: DataConfig, path: str | None = None) -> OcrCache | None:
    """The OCR words of images, from `path` (a source's own cache) or the run's; None where there is no evidence."""
    file = path or data.ocr_cache
    if file is None:
        return None
    engine = RapidOcr(min_confidence=data.ocr_min_confidence) if data.ocr_engine else None
    return OcrCache(file, engine=engine)


def open_sources(sources: Iterable[SourceConfig], data: DataConfig, ocr: OcrCache | None) -> dict[str, Source]:
    """One data set per entry, by name; caches are shared, since they hold their words in memory."""
    sources = [*sources]
    caches: dict[str | None, OcrCache | None] = {None: ocr}
    for path in {source.ocr_cache for source in sources if source.ocr_cache}:
        caches[path] = open_ocr(data, path)
    return {s.name: open_source(s, data.expert or s.expert, caches[s.ocr_cache]) for s in sources}


def open_mixture(config: RunConfig, ocr: OcrCache | None) -> Mixture:
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


def make_collator(config: RunConfig, intake: Intake, **changes: Any) -> Any:
    """The run's ChatCollator, or PairCollator for a dual encoder; `changes` are its fields."""
    fields: dict[str, Any] = {"processor": intake.processor, "tasks": list(config.data.tasks)}
    fields |= {"experts": config.routes, "settings": config.prompt}
    if intake.context_length is not None:
        if changes.pop("pack_length", None):
            raise ValueError("train.pack_length: has no effect on a dual encoder (it reads pairs)")
        return PairCollator(**fields, context_length=intake.context_length, **changes)
    codec = intake.box_codec if config.prompt.box_codec == "auto" else config.prompt.box_codec
    fields |= {"text_only": intake.text_only, "one_image": intake.one_image, "stops": intake.stops}
    return ChatCollator(**fields, codec=None if codec is None else CODECS[codec], **changes)
