"""Several data sets as one endless, deterministic sequence: position -> sample.

The order is cut into blocks. In each block every source has its share of the places, and the places are shuffled; a
source is walked in a new shuffle at each of its passes:

    position -> (block, place) -> source, how many of that source came before -> its index

Shares are weights, or numbers of draws: then a block is an epoch and holds just these. With a `Grouping` the positions
of a window change places, so that batches hold samples of like length. All of it is computed from (seed, position), so
a resumed run needs one integer, and neither worker processes nor ranks change the order.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable
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
class Mapped:
    """A data set whose samples are those of another one, each changed."""

    dataset: Source
    change: Callable[[Sample], Sample]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return self.change(self.dataset[index])


@dataclass(frozen=True)
class Share:
    """What an epoch holds of one source: `draws` are so many `passes` over its samples; `weight` is None for draws."""

    name: str
    size: int
    weight: float | None
    draws: int
    passes: float


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """Batches of like samples: `window` batches are sorted by modality and length, cut into
    batches, and the batches shuffled.

    A batch is that of an optimiser step, so that the samples of a step are still the same for any
    number of processes and micro-batches; these cut it in its sorted order.
    """

    batch_size: int
    window: int = 50  # batches: the wider, the less padding, and the less random the order


class Mixture:
    """`mixture[position]` is a sample, or the BadSampleError that it raised, for any position >= 0.

    Either `weights` (by default 1 for every source) or `draws` per epoch. A relative weight below
    half a thousandth of the sum raises ValueError: such a source would never be drawn.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        weights: dict[str, float] | None = None,
        *,
        draws: dict[str, int] | None = None,
        seed: int = 0,
        grouping: Grouping | None = None,
    ):
        self.sources, self.seed = sources, seed
        self.names = list(sources)
        self.sizes = [len(source) for source in sources.values()]
        if 0 in self.sizes:
            raise ValueError(f"data.sources.{self.names[self.sizes.index(0)]}: holds no samples")
        self.weights = None
        if draws is not None:
            self.quotas = [draws[name] for name in self.names]
        else:
            self.weights = {name: (weights or {}).get(name, 1.0) for name in self.names}
            self.quotas = quotas(list(self.weights.values()), BLOCK)
        self.block = sum(self.quotas)
        for name, quota in zip(self.names, self.quotas, strict=True):
            if quota == 0:
                key = f"{name}.{'epochs' if self.weights is None else 'weight'}"
                raise ValueError(f"data.sources.{key}: too small to be drawn once in {self.block}")
        self.grouping = grouping
        self._window: tuple[int, np.ndarray] | None = None  # the last one that was put in order
        if grouping is not None:
            check_lengths(sources)

    def only(self, names: Collection[str] | None) -> "Mixture":
        """Some of the sources, in their relative shares; None: all of them."""
        if names is None:
            return self
        sources = {name: source for name, source in self.sources.items() if name in names}
        draws = dict(zip(self.names, self.quotas, strict=True)) if self.weights is None else None
        return Mixture(sources, self.weights, draws=draws, seed=self.seed, grouping=self.grouping)

    @property
    def epoch_length(self) -> int:
        return self.block if self.weights is None else sum(self.sizes)

    def locate(self, position: int) -> tuple[str, int]:
        """The source and the index in it that stand at `position`."""
        return self._draw(position if self.grouping is None else self._grouped(position))

    def _draw(self, position: int) -> tuple[str, int]:
        block, place = divmod(position, self.block)
        order, ranks = block_order(tuple(self.quotas), self.seed, block)
        number = int(order[place])
        drawn = block * self.quotas[number] + int(ranks[place])  # of this source, before this one
        (walk, step), name = divmod(drawn, self.sizes[number]), self.names[number]
        order = shuffle(self.sizes[number], self.seed, crc32(name.encode()), walk)
        return name, int(order[step])

    def __getitem__(self, position: int) -> Sample | BadSampleError:
        name, index = self.locate(position)
        return read_sample(self.sources[name], index, name)

    def _grouped(self, position: int) -> int:
        """The position whose draw is at `position` once its window is sorted into batches."""
        assert self.grouping is not None
        length = self.grouping.window * self.grouping.batch_size
        window, place = divmod(position, length)
        if self._window is None or self._window[0] != window:
            drawn = map(self._draw, range(window * length, (window + 1) * length))
            sizes = np.array([lengths_of(self.sources[name], index) for name, index in drawn])
            order = like_together(sizes, self.grouping.batch_size, (self.seed, window))
            self._window = window, order
        return window * length + int(self._window[1][place])

    def epoch(self) -> list[Share]:
        shares = []
        for name, size, quota in zip(self.names, self.sizes, self.quotas, strict=True):
            draws = round(self.epoch_length * quota / self.block)
            weight = None if self.weights is None else self.weights[name]
            shares.append(Share(name, size, weight, draws, draws / size))
        return shares


def check_lengths(sources: dict[str, Source]) -> None:
    """ValueError for a source that cannot tell lengths without opening images."""
    mute = [name for name, source in sources.items() if not hasattr(source, "lengths")]
    if mute:
        problem = f"the reader of {', '.join(mute)} computes no length of a sample without making it"
        choices = "data.group_by_length=false, a reader with lengths(index)"
        raise ValueError(f"data.group_by_length: {problem}; choices: {choices}")


def lengths_of(source: Any, index: int) -> tuple[int, int]:
    """Images and letters of a sample, by its reader; (0, 0) for a bad row, which raises when it is drawn."""
    try:
        return source.lengths(index)
    except BadSampleError:
        return 0, 0


def like_together(sizes: np.ndarray, batch_size: int, key: tuple[int, ...]) -> np.ndarray:
    """The order of rows [images, letters] in which batches are alike, at most one of them with and without images."""
    images, letters = sizes.T
    by_length = np.lexsort((letters, images))
    batches = by_length.reshape(-1, batch_size)
    return batches[shuffle(len(batches), *key, crc32(b"batches"))].ravel()


def read_sample(source: Source, index: int, name: str) -> Sample | BadSampleError:
    """The sample, or the error that gives the reason; other errors are bugs and pass."""
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
    order = order.astype(np.int32)
    ranks = np.empty_like(order)
    for number, quota in enumerate(quotas):
        ranks[order == number] = np.arange(quota)
    return order, ranks


@lru_cache(maxsize=64)
def shuffle(size: int, *key: int) -> np.ndarray:
    """A permutation of 0 .. size - 1 by the key, in four bytes a number where they suffice."""
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).permutation(size)
    return order.astype(np.int32) if size < 2**31 else order
