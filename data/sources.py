"""From the config's source entries to map-style data sets: add a reader to `READERS`."""

from collections.abc import Sequence
from typing import Any

from data.boxes import CODECS
from data.collate import Collator
from data.jsonl import JsonlDataset
from data.mixture import Mixture, Source
from data.ocr import OcrCache, OcrEngine
from data.scene_dataset import SceneDataset
from moa.config import DataConfig, RunConfig, SourceConfig


def open_scenes(source: SourceConfig, expert: str | None, ocr: Any) -> Source:
    assert source.num_samples is not None  # checked by SourceConfig
    return SceneDataset(
        source.split,
        source.task,
        num_samples=source.num_samples,
        style=source.style,
        expert=expert,
        source=source.name,
        seed=source.seed,
        ocr=ocr,
    )


def open_jsonl(source: SourceConfig, expert: str | None, ocr: Any) -> Source:
    assert source.path is not None  # checked by SourceConfig
    return JsonlDataset(
        source.path, source=source.name, expert=expert, num_samples=source.num_samples, ocr=ocr
    )


READERS = {"scenes": open_scenes, "jsonl": open_jsonl}


def open_ocr(data: DataConfig) -> OcrCache | None:
    """The function from a picture to its OCR words, or None where the run has no OCR evidence."""
    if data.ocr_cache is None:
        return None
    engine = OcrEngine(min_confidence=data.ocr_min_confidence) if data.ocr_engine else None
    return OcrCache(data.ocr_cache, engine=engine)


def open_sources(
    sources: Sequence[SourceConfig], data: DataConfig, ocr: OcrCache | None
) -> dict[str, Source]:
    """One data set per entry, by name; `ocr` is shared, since it holds its words in memory."""
    return {s.name: READERS[s.kind](s, data.expert or s.expert, ocr) for s in sources}


def open_mixture(data: DataConfig, seed: int, ocr: OcrCache | None) -> Mixture:
    """The training mixture of a run."""
    weights = {source.name: source.weight for source in data.sources}
    return Mixture(open_sources(data.sources, data, ocr), weights, seed=seed)


def make_collator(config: RunConfig, processor: Any, **changes: Any) -> Collator:
    """The run's collator; `changes` are its fields, for evaluation."""
    prompt = config.prompt
    fields: dict[str, Any] = {
        "processor": processor,
        "tasks": list(config.data.tasks),
        "experts": list(config.experts),
        "codec": CODECS[prompt.box_codec],
        "task_in_prompt": prompt.task_in_prompt,
        "ocr_in_prompt": prompt.ocr_in_prompt,
        "task_dropout": prompt.task_dropout,
        "task_template": prompt.task_template,
        "ocr_template": prompt.ocr_template,
        "max_length": prompt.max_length,
        "max_ocr_words": prompt.max_ocr_words,
    }
    return Collator(**fields | changes)
