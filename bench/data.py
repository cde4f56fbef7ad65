"""Reading samples, with the router's OCR evidence, against PIL and the processor alone; memory over a million rows.

    python -m bench.data [images=256] [rows=1000000]

Images of 640 x 480 (scikit-image's photographs, as JPEG) with a question each go through reader, OCR cache,
checks and collation as in training, and beside it, in the same rounds, through nothing but `PIL.Image.open` and
LLaVA's processor at 336 pixels. Then a process of its own reads every row of a large file, images aside.
Samples/s are ours over theirs, memory is in MB. Writes results/bench_data.json.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.settings import ROOT, in_own_process, machine, process_kib, write_results
from data.config import SourceConfig
from moa.cli.command import command
from moa.cli.ranges import Count

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
WORDS = ("open", "exit", "sale", "caution")
BATCH, SIDE, ROUNDS = 16, 336, 5


def write_images(folder: Path, count: int) -> None:
    """`count` different JPEG files, a row of questions for each, and their OCR words by content hash."""
    from PIL import Image
    from skimage import data as photographs

    from data.ocr import content_hash, write_table
    from data.sample import OcrWord

    table, rows = {}, []
    for index in range(count):
        image = Image.fromarray(getattr(photographs, PHOTOGRAPHS[index % 4])()).convert("RGB")
        shifted = image.resize((640, 480)).rotate(index % 7)
        shifted.putpixel((index % 640, 0), (index % 256, 0, 0))
        shifted.save(folder / f"{index}.jpg", quality=90)
        with Image.open(folder / f"{index}.jpg") as saved:
            words = tuple(OcrWord(text=w, box=(9, 9, 99, 40), confidence=0.95) for w in WORDS)
            table[content_hash(saved.convert("RGB"))] = words
        rows.append(row(index, f"{index}.jpg"))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    write_table(folder / "ocr.parquet", table, {"engine": "none", "min_confidence": 0.9})


def row(index: int, image: str) -> dict[str, Any]:
    question = f"What is the person number {index} in the middle of the image doing?"
    return {"image": image, "question": question, "answers": ["reading a sign"], "task": "vqa"}


def open_source(folder: Path) -> SourceConfig:
    return SourceConfig(name="rows", format="jsonl", path=str(folder / "rows.jsonl"))


def read_all(folder: Path, processor: Any, count: int) -> None:
    """As training does: reader, OCR words of the cache, checks, collation."""
    from data.boxes import CODECS
    from data.collate import ChatCollator
    from data.ocr import OcrCache
    from data.readers.table import open_records

    samples = open_records(open_source(folder), "vqa", OcrCache(folder / "ocr.parquet"))
    collator = ChatCollator(processor=processor, tasks=["vqa"], experts=["vqa"], codec=CODECS["llava"])
    for start in range(0, count, BATCH):
        batch, rejected = collator.split([samples[i] for i in range(start, start + BATCH)])
        assert batch is not None and not rejected and bool(batch.ocr_mask.all())


def open_all(folder: Path, processor: Any, count: int) -> None:
    """The least that any pipeline does: open, decode, process."""
    from PIL import Image

    asked = [json.loads(line)["question"] for line in (folder / "rows.jsonl").open()]
    for start in range(0, count, BATCH):
        images = [[Image.open(folder / f"{i}.jpg").convert("RGB")] for i in range(start, start + BATCH)]
        texts = [f"{processor.image_token} {asked[i]}" for i in range(start, start + BATCH)]
        processor(images=images, text=texts, padding=True, return_tensors="pt")


def against_pil(results: dict[str, Any], count: int) -> None:
    from transformers import AutoProcessor

    from bench.bench_model import race, ratio

    processor = AutoProcessor.from_pretrained(ROOT / "assets/demo_base")
    processor.image_processor.size = {"shortest_edge": SIDE}
    processor.image_processor.crop_size = {"height": SIDE, "width": SIDE}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, count)
        runs = {"ours": partial(read_all, folder, processor, count)}
        runs |= {"theirs": partial(open_all, folder, processor, count)}
        seconds = race(runs, ROUNDS, "cpu")
    results["samples_vs_pil"] = ratio(seconds, "theirs", "ours")
    ours, theirs = (count / min(seconds[name]) for name in runs)
    print(f"{ours:.0f} samples/s with reader, OCR evidence and collation")
    print(f"{theirs:.0f} samples/s with PIL and the processor alone")


def read_rows(folder: Path) -> tuple[float, float, float]:
    """Memory before, its peak over all rows, and rows/s, the index aside."""
    from data.readers.table import open_records

    before = process_kib("VmRSS") / 1e3
    samples = open_records(open_source(folder), "vqa")
    began, peak = time.perf_counter(), 0.0
    for index in range(len(samples)):
        samples.lengths(index)
        if index % 10_000 == 0:
            peak = max(peak, process_kib("VmRSS") / 1e3)
    return before, max(peak, process_kib("VmRSS") / 1e3), len(samples) / (time.perf_counter() - began)


def many_rows(results: dict[str, Any], count: int) -> None:
    from PIL import Image

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Image.new("RGB", (8, 8)).save(folder / "0.jpg")
        with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row(i, "0.jpg")) + "\n" for i in range(count))
        before, peak, rate = in_own_process(read_rows, folder)
    results |= {"rows": count, "rows_extra_mb": peak - before, "rows_per_s": rate}
    print(f"{count} rows: {rate:.0f} rows/s, {peak - before:.0f} MB above the {before:.0f} before")


@dataclass(frozen=True, kw_only=True)
class Settings:
    images: Count = 256  # a multiple of 16
    rows: Count = 1_000_000

    def __post_init__(self) -> None:
        if self.images % BATCH:
            raise ValueError(f"images: must be a multiple of {BATCH}, got {self.images}")


def run(settings: Settings, console: Console) -> None:
    import torch

    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    against_pil(results, settings.images)
    many_rows(results, settings.rows)
    write_results("data", {"where": machine(), **results})


if __name__ == "__main__":
    command(Settings, run, __doc__)()
