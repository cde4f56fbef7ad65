"""Several data sets as one endless, deterministic sequence: position -> sample.

The order is cut into blocks. In each block every source has its share of the places, and the
places are shuffled; a source is walked in a new shuffle at each of its passes:

    position -> (block, place) -> source, how many of that source came before -> its index

All of it is computed from (seed, position), so a resumed run needs one integer, and neither worker
processes nor ranks change what stands where.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable
from zlib import crc32

import numpy as np

from data.checks import BadSampleError
from data.sample import Sample

BLOCK = 1000  # places in a block: shares are exact to a thousandth


@runtime_checkable
class Source(Protocol):
    """A map-style data set."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass(frozen=True)
class Share:
    """What an epoch (as many draws as there are samples) holds of one source."""

    name: str
    size: int
    weight: float
    draws: int
    passes: float


class Mixture:
    """`mixture[position]` is a sample, or the BadSampleError that it raised, for any position >= 0.

    A relative weight below half a thousandth of the sum raises ValueError: such a source would
    never be drawn.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        weights: dict[str, float] | None = None,
        *,
        seed: int = 0,
    ):
        self.sources, self.seed = sources, seed
        self.names = list(sources)
        self.weights = {name: (weights or {}).get(name, 1.0) for name in self.names}
        self.sizes = [len(source) for source in sources.values()]
        empty = [name for name, size in zip(self.names, self.sizes, strict=True) if size == 0]
        if empty:
            raise ValueError(f"data.sources.{empty[0]}: holds no samples")
        self.quotas = quotas([self.weights[name] for name in self.names], BLOCK)
        for name, quota in zip(self.names, self.quotas, strict=True):
            if quota == 0:
                raise ValueError(
                    f"data.sources.{name}.weight: too small to be drawn once in {BLOCK}"
                )

    def locate(self, position: int) -> tuple[str, int]:
        """The source and the index in it that stand at `position`."""
        block, place = divmod(position, BLOCK)
        order, ranks = block_order(tuple(self.quotas), self.seed, block)
        number = int(order[place])
        drawn = block * self.quotas[number] + int(ranks[place])  # of this source, before this one
        walk, step = divmod(drawn, self.sizes[number])
        return self.names[number], int(
            shuffle(self.sizes[number], self.seed, crc32(self.names[number].encode()), walk)[step]
        )

    def __getitem__(self, position: int) -> Sample | BadSampleError:
        name, index = self.locate(position)
        return read_sample(self.sources[name], index, name)

    def epoch(self) -> list[Share]:
        total = sum(self.sizes)
        shares = []
        for name, size, quota in zip(self.names, self.sizes, self.quotas, strict=True):
            draws = round(total * quota / BLOCK)
            share = Share(name, size, self.weights[name], draws, draws / size)
            shares.append(share)
        return shares


def read_sample(source: Source, index: int, name: str) -> Sample | BadSampleError:
    """The sample, or the error that says why there is none; other errors are bugs and pass."""
    try:
        return source[index]
    except BadSampleError as error:
        return error
    except OSError as error:  # a missing or truncated file, from a reader that does not say so
        return BadSampleError(f"source {name!r}, sample {index}", "broken image", str(error))


def quotas(weights: Sequence[float], total: int) -> list[int]:
    """`total` places shared by weight, with the largest remainders rounded up."""
    exact = [weight / sum(weights) * total for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


@lru_cache(maxsize=8)
def block_order(quotas: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Source number at each place of a block, and how often it stood in the block before."""
    order = np.repeat(np.arange(len(quotas)), quotas)[shuffle(sum(quotas), seed, 0, block)]
    ranks = np.empty_like(order)
    for number, quota in enumerate(quotas):
        ranks[order == number] = np.arange(quota)
    return order, ranks


@lru_cache(maxsize=64)
def shuffle(size: int, *key: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).permutation(size)
