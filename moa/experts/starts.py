"""How a fresh LoRA expert starts: a row per start.

Where B A is not zero, the expert holds its start: the frozen A0 and B0 that are subtracted from it, so that

    y = W x + gate scaling (B A - B0 A0) x

is W x at first whatever the gates are, and the base's weights stay as they are. PiSSA, MiLoRA, GOAT and R-LoRA change W
instead, and their adapters are no updates of the base that others have.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # A [rank, in], B [out, rank]
Outside = Callable[[str, Tensor], Tensor]  # (site, a random A) -> A, of one expert
Triplets = tuple[Tensor, Tensor, Tensor]  # U [out, number], S [number], V^T [number, in]
GOAT_RHO = 10.0  # what GOAT divides singular values by
R_LORA_GAMMA = 64.0


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What a start may read: the layer, the expert, and its place among the experts of the same start."""

    shape: tuple[int, int]  # [out, in] of the layer
    rank: int
    scaling: float
    seed: str  # of the expert at this site
    site_seed: str  # of all experts at this site
    place: int
    count: int
    triplets: Callable[[], Triplets]  # of the layer's weight that the start chose
    outside: Callable[[Tensor], Tensor]  # A outside of what others read, from a random one


@dataclass(frozen=True, kw_only=True)
class Start:
    pair: Callable[[Draw], Pair]
    held: bool = False  # B A is not zero
    # of those that read the weight: which singular triplets, by their number, rank, place and count
    chosen: Callable[[int, int, int, int], range] | None = None


def lora(draw: Draw) -> Pair:
    """A uniform in ±1/sqrt(in), B zero: PEFT's default."""
    return uniform((draw.rank, draw.shape[1]), draw.seed), zero_b(draw)


def gaussian(draw: Draw) -> Pair:
    """A normal with deviation 1/rank, B zero: PEFT's `gaussian`."""
    return normal((draw.rank, draw.shape[1]), draw.seed) / draw.rank, zero_b(draw)


def orthogonal(draw: Draw) -> Pair:
    """The rows of all such experts at a site are orthogonal to one another, as long as those of `lora`; B zero. A_i
    A_j^T = 0, so that experts start in different subspaces of the input."""
    width, rows = draw.shape[1], draw.count * draw.rank
    if rows > width:
        raise ValueError(
            f"init=orthogonal: {draw.count} experts of rank {draw.rank} need {rows} inputs, it has {width}"
        )
    basis, triangle = torch.linalg.qr(normal((width, rows), draw.site_seed))
    basis = basis * triangle.diagonal().sign()  # one of the two signs, whatever the library
    return basis.t()[draw.place * draw.rank :][: draw.rank] / math.sqrt(3), zero_b(draw)


def random_b(draw: Draw) -> Pair:
    """A as `lora`, B uniform in ±out^(1/4) / sqrt(64 rank), so that heads of one A differ (R-LoRA, 2502.15455)."""
    out = draw.shape[0]
    b = uniform((out, draw.rank), f"{draw.seed}/B")
    return uniform((draw.rank, draw.shape[1]), draw.seed), b * out**0.25 / math.sqrt(R_LORA_GAMMA)


def singular(draw: Draw, divisor: float = 1.0) -> Pair:
    """B = U sqrt(S), A = sqrt(S) V^T with S over the scaling, so that scaling B A is that part of W over `divisor`.

    Of the largest: PiSSA (arXiv 2404.02948), eq. 3-4. Of the smallest: MiLoRA (2406.09044). Of the i-th of N equal
    segments, over 10: GOAT (2502.16894), eq. 8.
    """
    u, s, v = draw.triplets()
    root = (s / (draw.scaling * divisor)).sqrt()
    return root[:, None] * v, u * root


def null_space(draw: Draw) -> Pair:
    """A outside of what other experts read, by the statistics of their inputs: moa/statistics/moments.py; B zero."""
    return draw.outside(uniform((draw.rank, draw.shape[1]), draw.seed)), zero_b(draw)


def zero_b(draw: Draw) -> Tensor:
    return torch.zeros(draw.shape[0], draw.rank)


def segment(length: int, rank: int, place: int) -> range:
    """The first of a segment's triplets; none where it is shorter than the rank."""
    return range(length * place, length * place + rank) if rank <= length else range(0)


STARTS = {
    "lora": Start(pair=lora),
    "gaussian": Start(pair=gaussian),
    "orthogonal": Start(pair=orthogonal),
    "null_space": Start(pair=null_space),
    "random_b": Start(pair=random_b, held=True),
    "svd_top": Start(pair=singular, held=True, chosen=lambda number, rank, place, count: range(rank)),
    "svd_bottom": Start(
        pair=singular, held=True, chosen=lambda number, rank, place, count: range(number - rank, number)
    ),
    "svd_segments": Start(
        pair=partial(singular, divisor=GOAT_RHO),
        held=True,
        chosen=lambda number, rank, place, count: segment(number // count, rank, place),
    ),
}


class Starts:
    """The starts of all fresh experts of a bank; the singular vectors of a layer are computed once for all of them."""

    def __init__(
        self,
        inits: Mapping[str, str],
        ranks: Mapping[str, int],
        seed: int,
        outside: Mapping[str, Outside] | None = None,
    ) -> None:
        self.inits, self.ranks, self.seed, self.outside = inits, ranks, seed, outside or {}
        self.kept: dict[str, dict[str, Triplets]] = {}  # site -> expert -> what it reads of the weight

    def pair(self, name: str, site: str, shape: tuple[int, int], scaling: float, weight: Tensor) -> Pair:
        """A [rank, in] and B [out, rank] of an expert at a site; ValueError for what does not fit the layer."""
        init = self.inits[name]
        alike = [other for other, own in self.inits.items() if own == init]
        draw = Draw(
            shape=shape,
            rank=self.ranks[name],
            scaling=scaling,
            seed=f"{self.seed}/{name}/{site}",
            site_seed=f"{self.seed}/{site}",
            place=alike.index(name),
            count=len(alike),
            triplets=lambda: self.triplets(name, site, weight),
            outside=lambda start: self.outside.get(name, lambda _, own: own)(site, start),
        )
        try:
            return STARTS[init].pair(draw)
        except ValueError as error:
            raise ValueError(f"experts.{name}.{error}, at {site}") from None

    def triplets(self, name: str, site: str, weight: Tensor) -> Triplets:
        if site not in self.kept:
            if not weight.is_floating_point():
                raise ValueError(f"init={self.inits[name]}: the weight is quantised ({weight.dtype})")
            whole, self.kept[site] = singular_triplets(weight), {}
            for other, init in self.inits.items():
                if chosen := STARTS[init].chosen:
                    alike = [n for n, own in self.inits.items() if own == init]
                    places = chosen(len(whole[1]), self.ranks[other], alike.index(other), len(alike))
                    rows, (u, s, v) = slice(max(places.start, 0), places.stop), whole
                    self.kept[site][other] = u[:, rows].clone(), s[rows].clone(), v[rows].clone()
        found, init = self.kept[site].pop(name), self.inits[name]
        if len(found[1]) < self.ranks[name]:
            rule = f"{min(weight.shape)} singular values are too few for rank {self.ranks[name]}"
            raise ValueError(f"init={init}: {rule} ({[*self.inits.values()].count(init)} experts start so)")
        return found


def singular_triplets(weight: Float[Tensor, "out in"]) -> Triplets:
    """U [out, number], S [number] and V^T [number, in], the largest first; in each column of U the entry that is
    largest in size is positive, so that the signs are those of every library."""
    u, s, v = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return u * signs, s, v * signs.t()


def uniform(shape: tuple[int, int], seed: str) -> Tensor:
    return (torch.rand(shape, generator=seeded(seed)) * 2 - 1) / math.sqrt(shape[1])


def normal(shape: tuple[int, ...], seed: str) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def seeded(text: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))
