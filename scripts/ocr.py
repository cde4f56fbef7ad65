"""Read images with an OCR engine into a cache file (data/ocr.py).

    python -m scripts.ocr out=assets/ocr.parquet scenes=[train:3000,train:500:line]
    python -m scripts.ocr out=my.parquet folder=~/images
    python -m scripts.ocr out=vqa.parquet config=configs/mine.yaml source=vqav2 workers=8

An image is read once, however many questions ask about it. A killed run continues where it stopped;
images already in the file are not read again. Several machines each read a shard, and one merges:

    python -m scripts.ocr out=vqa.parquet config=configs/mine.yaml source=vqav2 shard=0/4
    python -m scripts.ocr out=vqa.parquet merge=4     # once vqa.0-of-4.parquet, ... are beside it
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from moa.cli.command import command
from moa.cli.ranges import Count, FilePath, Processes, Seed, Share
from moa.config import load_config

if TYPE_CHECKING:
    from data.ocr import BuildReport


@dataclass(frozen=True, kw_only=True)
class Settings:
    out: FilePath  # Parquet file to make or extend
    scenes: list[str] | None = None  # SPLIT:COUNT[:STYLE] of each part
    folder: FilePath | None = None  # every image file under this folder
    config: FilePath | None = None  # a run's YAML: the images of one of its sources
    merge: Count | None = None  # make `out` of so many shards
    source: str | None = None  # of config: the source's name; null: the only one with files
    shard: str = "0/1"  # I/N: every N-th image from I on
    engine: Literal["rapidocr", "tesseract"] = "rapidocr"
    seed: Seed = 0  # of the scenes
    workers: Processes = 2  # processes
    part: Count = 200  # images between two saves
    min_confidence: Share = 0.5  # lines below it are dropped
    side: Count | None = None  # of rapidocr: shortest side that the detector sees; null: 320

    def __post_init__(self) -> None:
        what = [key for key in ("scenes", "folder", "config", "merge") if getattr(self, key)]
        if len(what) != 1:
            raise ValueError(f"give one of scenes, folder, config and merge; got {what or 'none'}")
        found = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        if found is None or not int(found[1]) < int(found[2]):
            raise ValueError(f"shard: {self.shard!r}: write I/N with 0 <= I < N, as in 0/4")
        for key, default, needs, works in (
            ("shard", "0/1", "an engine to read with", self.merge is None),
            ("source", None, "config", self.config is not None),
            ("seed", 0, "scenes", self.scenes is not None),
            ("side", None, "engine=rapidocr", self.engine == "rapidocr"),
        ):
            if getattr(self, key) != default and not works:
                raise ValueError(f"{key}: has no effect without {needs}")

    @property
    def place(self) -> tuple[int, int]:
        index, count = self.shard.split("/")
        return int(index), int(count)


def images_of(settings: Settings) -> Any:
    from data.ocr_images import folder_images, scene_images, source_images

    if settings.config:
        return source_images(load_config(settings.config), settings.source)
    if settings.folder:
        return folder_images(Path(settings.folder))
    return scene_images(settings.scenes or (), settings.seed)


def check_out(out: Path) -> None:
    """OSError, naming the file, where it could not be written, before an image is read in vain."""
    try:
        new = not out.exists()
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("ab").close()
        if new:
            out.unlink()
    except OSError as error:
        raise OSError(f"out: {out} cannot be written: {error.strerror}") from None


def run(settings: Settings, console: Console) -> None:
    from data.ocr import BuildReport, build_cache, merge_shards, shard_file
    from data.ocr_engines import ENGINES

    out, report = Path(settings.out), BuildReport()
    check_out(out)
    if settings.merge:
        merge_shards(out, settings.merge)
    else:
        sizes = {"limit_side_len": settings.side} if settings.side else {}
        engine = ENGINES[settings.engine](min_confidence=settings.min_confidence, **sizes)
        how: dict[str, Any] = {"num_workers": settings.workers, "part_size": settings.part}
        report = build_cache(images_of(settings), out, engine=engine, shard=settings.place, **how)
    print("\n".join(report_lines(report, shard_file(out, *settings.place))))
    sys.exit(1 if report.failed else 0)


def report_lines(report: "BuildReport", out: Path) -> list[str]:
    from data.ocr import read_table

    table, settings = read_table(out)
    words, size = sum(map(len, table.values())), out.stat().st_size / 1e6
    return [
        f"{out}: {len(table)} images, {words} words, {size:.2f} MB; {settings}",
        f"read {report.read}, known before {report.known}, failed {report.failed}",
        *(f"  {len(n)} x {why} (first at position {n[0]})" for why, n in report.failures.items()),
    ]


main = command(Settings, run, __doc__)

if __name__ == "__main__":
    main()
