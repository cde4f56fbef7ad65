"""Read images with the OCR engine into a cache file (data/ocr.py).

    python -m scripts.ocr --out assets/ocr.parquet --scenes train:3000 train:500:line
    python -m scripts.ocr --out my.parquet --folder ~/images
    python -m scripts.ocr --out vqa.parquet --config configs/mine.yaml --source vqav2 --workers 8

An image is read once, however many questions ask about it. A killed run goes on where it stopped;
images already in the file are not read again. Several machines each read a shard, and one merges:

    python -m scripts.ocr --out vqa.parquet --config configs/mine.yaml --source vqav2 --shard 0/4
    python -m scripts.ocr --out vqa.parquet --merge 4     # once vqa.0-of-4.parquet, ... lie beside it
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import track

from data.checks import BadSampleError
from data.images import is_hidden, open_image
from data.ocr import BuildReport, build_cache, merge_shards, read_table, shard_file
from data.ocr_engines import ENGINES, Engine
from data.readers.record import RecordDataset
from data.readers.table import open_records
from moa.cli.command import mistakes_in_one_line, path_argument
from moa.config import RunConfig, SourceConfig, load_config

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class SceneImages:
    """The scenes of some splits as a lazy sequence: each worker renders what it reads."""

    splits: Sequence[tuple[str, int, str | None]]
    seed: int

    def __len__(self) -> int:
        return sum(count for _, count, _ in self.splits)

    def __getitem__(self, index: int) -> Image.Image:
        from data.world.scenes import render_scene

        for split, count, style in self.splits:
            if index < count:
                return render_scene(split, index, self.seed, style)[0]
            index -= count
        raise IndexError(index)


@dataclass(frozen=True)
class FolderImages:
    """The image files under a folder, decoded in the worker."""

    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Image.Image:
        return open_image(self.files[index], str(self.files[index]))


@dataclass(frozen=True)
class SourceImages:
    """The images of a data set, each once; a worker opens the files for itself."""

    source: SourceConfig
    positions: tuple[int, ...]  # of the first sample of each image

    @cached_property
    def dataset(self) -> RecordDataset:
        return open_records(self.source, None)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Image.Image:
        record, where = self.dataset.records.read(self.positions[index])
        assert record.image is not None  # first_samples has left those out
        return open_image(record.image, where)

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "positions": self.positions}


def source_images(config: RunConfig, name: str | None) -> SourceImages:
    """The images of the source of that name, or of the only one that has files."""
    parts = (config.data.sources, config.data.validation, config.eval.sources)
    every = [source for part in parts for source in part.values()]
    found = {s.name: s for s in every if s.format != "scenes" and name in (None, s.name)}
    if len(found) != 1:
        names = sorted({s.name for s in every if s.format != "scenes"})
        raise ValueError(f"--source: name one of {', '.join(names) or 'none: all are scenes'}")
    (source,) = found.values()
    return SourceImages(source, first_samples(open_records(source, None)))


def first_samples(dataset: RecordDataset) -> tuple[int, ...]:
    """The first sample of each image; rows that cannot be read stay, to be counted as failed."""
    first: dict[object, int] = {}
    for index in track(range(len(dataset)), "images", transient=True):
        try:
            record, _ = dataset.records.read(index)
        except BadSampleError:
            first[index] = index
            continue
        if record.image is not None:
            key = record.image if isinstance(record.image, Path) else record.image_id
            first.setdefault(key, index)
    return tuple(first.values())


def folder_images(folder: Path) -> FolderImages:
    """The images under a folder, sorted by path; an empty or missing folder is an error."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    files = sorted(p for p in found if not is_hidden(p.relative_to(folder)))
    if not files:
        raise ValueError(f"--folder {folder}: no image files ({', '.join(sorted(SUFFIXES))})")
    return FolderImages(tuple(files))


def scene_split(text: str) -> tuple[str, int, str | None]:
    """`train:3000` -> ("train", 3000, None); `train:500:line` -> ("train", 500, "line")."""
    name, count, style = [*text.split(":"), "", ""][:3]
    if not name or not count.isdecimal() or text.count(":") > 2:
        raise argparse.ArgumentTypeError(f"{text!r}: write SPLIT:COUNT[:STYLE], as in train:3000")
    return name, int(count), style or None


def shard(text: str) -> tuple[int, int]:
    """`2/8` -> (2, 8): the third of eight shards."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: write I/N with 0 <= I < N, as in 0/4")
    return int(index), int(count)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=path_argument, required=True, help="Parquet file to make or extend"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--scenes", type=scene_split, nargs="+", metavar="SPLIT:COUNT[:STYLE]")
    what.add_argument("--folder", type=path_argument, help="every image file under this folder")
    what.add_argument(
        "--config", type=path_argument, help="a run's YAML: the images of its --source"
    )
    what.add_argument("--merge", type=int, metavar="N", help="make --out of its N shards")
    parser.add_argument(
        "--shard", type=shard, default=(0, 1), metavar="I/N", help="every N-th image from I on"
    )
    parser.add_argument("--source", help="name of a data source of the config")
    parser.add_argument("--engine", choices=ENGINES, default="rapidocr")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default: 0)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--part", type=int, default=200, help="images a save (default: 200)")
    parser.add_argument(
        "--min-confidence", type=float, default=0.5, help="drop lines below it (default: 0.5)"
    )
    parser.add_argument(
        "--side",
        type=int,
        default=320,
        help="rapidocr: shortest side that the detector sees (default: 320)",
    )
    args = parser.parse_args(argv)
    if args.merge is not None and (args.merge < 1 or args.shard != (0, 1)):
        parser.error("--merge N: takes N >= 1 shards, and no --shard")
    return args


def report_lines(report: BuildReport, out: Path) -> list[str]:
    table, settings = read_table(out)
    words = sum(map(len, table.values()))
    size = out.stat().st_size / 1e6
    lines = [
        f"{out}: {len(table)} images, {words} words, {size:.2f} MB; {settings}",
        f"read {report.read}, known before {report.known}, failed {report.failed}",
    ]
    for reason, positions in report.failures.items():
        lines.append(f"  {len(positions)} x {reason} (first at position {positions[0]})")
    return lines


def images_of(args: argparse.Namespace) -> Any:
    if args.config:
        return source_images(load_config(args.config), args.source)
    return folder_images(args.folder) if args.folder else SceneImages(args.scenes, args.seed)


def check_out(out: Path) -> None:
    """OSError, naming the file, where it could not be written; an image is not read for nothing."""
    try:
        new = not out.exists()
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("ab").close()
        if new:
            out.unlink()
    except OSError as error:
        raise OSError(f"--out {out}: cannot be written: {error.strerror}") from None


def engine_of(args: argparse.Namespace) -> Engine:
    sizes = {"limit_side_len": args.side} if args.engine == "rapidocr" else {}
    return ENGINES[args.engine](min_confidence=args.min_confidence, **sizes)


def main(argv: list[str] | None = None) -> None:
    args, report = arguments(argv), BuildReport()
    with mistakes_in_one_line():
        check_out(args.out)
        if args.merge:
            merge_shards(args.out, args.merge)
        else:
            report = build_cache(
                images_of(args),
                args.out,
                num_workers=args.workers,
                part_size=args.part,
                engine=engine_of(args),
                shard=args.shard,
            )
    print("\n".join(report_lines(report, shard_file(args.out, *args.shard))))
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
