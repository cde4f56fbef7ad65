"""Run the frozen vision tower over every picture of a run once, and keep what it makes of them.

    python scripts/features.py --config RUN.yaml data.feature_cache=features [key.sub=value ...]

Training, validation and evaluation with the same settings then read it instead of decoding, resizing and
computing. A killed command goes on where it stopped; several may share the work, each on its `--shard`.
docs/features.md says when it pays, and how large it gets.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.checks import BadSampleError
from data.features import FeatureStore, picture_keys
from data.mixture import Source, read_sample
from data.sample import Sample
from data.sources import make_collator, open_sources
from moa.build import build_model
from moa.command import mistakes_in_one_line, progress_bar
from moa.config import RunConfig, load_config
from moa.features import describe, keep, open_features
from moa.model import MixtureModel

BATCH = 32  # pictures at once


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="samples I, I+N, I+2N ...")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings of the run")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args, console = parse(argv), Console(soft_wrap=True)
    with mistakes_in_one_line():
        config = load_config(args.config, args.overrides)
        model = build_model(config).eval().to(args.device)
        store = open_features(config, model)
        if store is None:
            raise ValueError("data.feature_cache: names no folder")
        console.print(describe(store))
        bad = fill(store, model, config, share_of(args.shard), console)
        console.print(describe(store))
        if bad:
            console.print(f"{len(bad)} samples without a picture that can be used, as {bad[0]}")


def share_of(text: str) -> tuple[int, int]:
    """I/N as numbers; ValueError for anything else."""
    first, _, number = text.partition("/")
    if not (first.isdigit() and number.isdigit() and int(first) < int(number)):
        raise ValueError(f"--shard: {text!r} is not I/N with I below N")
    return int(first), int(number)


def fill(
    store: FeatureStore,
    model: MixtureModel,
    config: RunConfig,
    share: tuple[int, int],
    console: Console,
) -> list[BadSampleError]:
    """Add every picture that is not there; the samples that could not be used."""
    collator = make_collator(
        config,
        model.backbone.intake,
        for_generation=True,
        allow_unknown_tasks=True,
        features=store,
    )
    bad: list[BadSampleError] = []
    for samples in batches(unknown(config, store, share, bad, console)):
        batch, rejected = collator.split(samples)
        bad += rejected
        if batch is not None:
            keep(store, model, batch.to(model.backbone.model.device), config.train.precision)
    store.flush()
    return bad


def unknown(
    config: RunConfig,
    store: FeatureStore,
    share: tuple[int, int],
    bad: list[BadSampleError],
    console: Console,
) -> Iterator[Sample]:
    """A sample of each picture that the store lacks; those that cannot be read go to `bad`."""
    sources = opened(config, store)
    places = [(name, i) for name, source in sources.items() for i in range(len(source))]
    first, number = share
    taken: set[str] = set()
    mine = places[first::number]
    with progress_bar("pictures", len(mine), console) as advance:
        for name, index in mine:
            sample = read_sample(sources[name], index, name)
            if isinstance(sample, BadSampleError):
                bad.append(sample)
            else:
                (key, *_) = picture_keys([sample]) or [""]
                if key and key not in store and key not in taken:
                    taken.add(key)
                    yield sample
            advance(name)


def opened(config: RunConfig, store: FeatureStore) -> dict[str, Source]:
    """Every data set of the run; OCR is not needed."""
    lists = {"training": config.data.sources, "validation": config.data.validation}
    if config.train.precision == "fp32":  # evaluation knows no other
        lists["evaluation"] = config.eval.sources
    return {
        f"{use} {name}": source
        for use, sources in lists.items()
        for name, source in open_sources(sources, config.data, None, store).items()
    }


def batches(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    group: list[Sample] = []
    for sample in samples:
        group.append(sample)
        if len(group) == BATCH:
            yield group
            group = []
    if group:
        yield group


if __name__ == "__main__":
    main()
