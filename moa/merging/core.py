"""The factored update: every expert of one site in the exact coordinates that the experts span.

    dW_i = scaling_i B_i A_i = Q_B M_i Q_A^T,   Q_B [out, rows], Q_A [in, cols] orthonormal

rows and cols are at most R, the sum of the ranks. Q_B spans all scaled B side by side, Q_A all A; each is kept as these
columns and an R x R matrix that makes them orthonormal, so that a product with it costs no more than one with the
factors. For methods on single entries the axes are turned so that the first hold the most energy of all experts: then
the M_i are a function of the updates alone, whatever the order or factoring of the experts (Core Space merging,
Panariello et al. 2025, takes the axes from the stacked factors). The best rank-r result is an SVD of an R x R matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moa.merging.rank import parse_energy
from moa.statistics.moments import leading_directions

EXACT_SVD = 1024  # a full SVD of a matrix this small takes less than a second
SPAN_TOLERANCE = 1e-7  # of the largest singular value: below it a direction is rounding
Factors = tuple[Tensor, Tensor]  # A [rank, in], B [out, rank], all scale folded into B


@dataclass(frozen=True, kw_only=True)
class Basis:
    """Orthonormal vectors Q = columns @ turn, which need not be made to multiply with them."""

    columns: Float[Tensor, "size columns"]
    turn: Float[Tensor, "columns axes"]

    def expand(self, x: Float[Tensor, "axes count"]) -> Float[Tensor, "size count"]:
        """Q x"""
        return self.columns @ (self.turn @ x)

    def project(self, y: Float[Tensor, "size count"]) -> Float[Tensor, "axes count"]:
        """Q^T y"""
        return self.turn.T @ (self.columns.T @ y)

    def turned(self, axes: Float[Tensor, "axes other"]) -> "Basis":
        return Basis(columns=self.columns, turn=self.turn @ axes)

    @property
    def vectors(self) -> Float[Tensor, "size axes"]:
        return self.columns @ self.turn


@dataclass(frozen=True, kw_only=True)
class CoreUpdates:
    """dW_i = q_b cores[i] q_a^T, exactly."""

    b: Basis
    a: Basis
    cores: Float[Tensor, "expert rows cols"]

    @property
    def q_b(self) -> Float[Tensor, "out rows"]:
        return self.b.vectors

    @property
    def q_a(self) -> Float[Tensor, "in cols"]:
        return self.a.vectors


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """An update B A, each singular value shared by both factors: they keep their precision in 16 bits, at one scale."""

    lora_a: Float[Tensor, "rank in"]
    lora_b: Float[Tensor, "out rank"]
    singular_values: Float[Tensor, " rank"]  # kept
    # what the rank kept and what it cut off: squared Frobenius norms, or output energies where it was cut by these
    kept: float
    lost: float
    # right and left singular vectors in core axes, [rank, cols] and [rows, rank]
    core: Factors | None = None

    def scaled(self, factor: float) -> "LowRank":
        """The update times a number above 0."""
        energies: Any = {"kept": self.kept * factor**2, "lost": self.lost * factor**2}
        a, b = self.lora_a * factor**0.5, self.lora_b * factor**0.5
        return replace(self, lora_a=a, lora_b=b, singular_values=self.singular_values * factor, **energies)


def to_core(
    factors: Sequence[Factors | None],
    *,
    canonical: bool = True,
    more: Float[Tensor, "in count"] | None = None,
    since: Factors | None = None,
) -> CoreUpdates:
    """The core form of one site from each expert's (A, scaling * B).

    None is an expert without this site, whose core is zero; at least one must have it. Axes that are not `canonical`
    depend on the factoring, which a sum of the cores does not mind. The input axes span `more` vectors beside A's rows.
    With `since` the cores are the changes from it.
    """
    factors = [*factors, *([since] if since is not None else [])]
    present = [pair for pair in factors if pair is not None]
    rows = torch.cat([a for a, _ in present]).T
    a, r_a = _orthonormal(rows if more is None else torch.cat([rows, more.to(rows.dtype)], 1))  # r_a [cols, columns]
    b, r_b = _orthonormal(torch.cat([b for _, b in present], dim=1))  # r_b [rows, R]
    cores = r_b.new_zeros(len(factors), r_b.shape[0], r_a.shape[0])
    start = 0
    for index, pair in enumerate(factors):
        if pair is not None:
            own = slice(start, start + pair[0].shape[0])
            cores[index] = r_b[:, own] @ r_a[:, own].T
            start = own.stop
    cores = cores if since is None else cores[:-1] - cores[-1]
    if not canonical:
        return CoreUpdates(b=b, a=a, cores=cores)
    turn_b, turn_a = _principal_axes(b, cores), _principal_axes(a, cores.mT)
    return CoreUpdates(b=b.turned(turn_b), a=a.turned(turn_a), cores=turn_b.T @ cores @ turn_a)


def _orthonormal(columns: Float[Tensor, "size columns"]) -> tuple[Basis, Float[Tensor, "axes columns"]]:
    """Q and R with Q R = columns: from their Gram matrix where it is well conditioned, else Householder's QR.

    The Gram matrix costs one product where a QR costs several slow passes, and squares the condition number: the
    vectors are orthonormal to eps * cond^2 of the columns scaled to length 1, which is bounded here by eps^(2/3).
    """
    length = columns.norm(dim=0)
    if columns.shape[1] <= columns.shape[0] and length.all():
        gram = (columns.T @ columns) / (length[:, None] * length)
        values, vectors = torch.linalg.eigh(gram)
        if values[-1] < values[0] * torch.finfo(columns.dtype).eps ** (-1 / 3):
            root = values.sqrt()
            return Basis(columns=columns, turn=vectors / root / length[:, None]), (vectors * root).T * length
    q, r = torch.linalg.qr(columns)
    return Basis(columns=q, turn=torch.eye(q.shape[1], dtype=q.dtype)), r


def _principal_axes(basis: Basis, cores: Float[Tensor, "expert axes _"]) -> Float[Tensor, "axes axes"]:
    """The rotation of a basis to the experts' energy, most first; signs fixed in the original space."""
    axes = torch.linalg.eigh((cores @ cores.mT).sum(0)).eigenvectors.flip(1)
    probe = _probe(basis.columns.shape[0]).to(axes.dtype)
    return axes * _signs(((probe @ basis.columns) @ basis.turn) @ axes)


def _probe(size: int) -> Float[Tensor, " size"]:
    """A fixed direction, orthogonal to no vector that is likely to occur."""
    return torch.sin(12.9898 * torch.arange(1, size + 1, dtype=torch.float64))


def _signs(products: Float[Tensor, " count"]) -> Float[Tensor, " count"]:
    """+1 or -1: the free sign of each singular vector, chosen by its product with the probe."""
    return torch.where(products < 0, -1.0, 1.0).to(products.dtype)


def compress(
    updates: CoreUpdates,
    core: Float[Tensor, "rows cols"],
    rank: int | str,
    total_rank: int,
    metric: Float[Tensor, "cols cols"] | None = None,
) -> LowRank:
    """The best approximation of q_b core q_a^T at the given rank, as balanced factors.

    `rank` is a number, "sum" (exact: `total_rank`, the sum of the experts' ranks) or "energy:x",
    the smallest rank that keeps the share x of the squared Frobenius norm (Eckart-Young), or, with a `metric`, of the
    output energy: see `cut_by_output`.
    """
    if metric is not None:
        cut, size, kept, lost = cut_by_output(core, metric, rank, total_rank)
        return replace(compress(updates, cut, size, total_rank), kept=kept, lost=lost)
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    size = min(choose_rank(s, rank, total_rank), s.numel())
    u, kept, v = u[:, :size], s[:size], v[:size]
    a, lost = updates.a.expand(v.T).T, float(s[size:].square().sum())
    return replace(_balanced(updates.b.expand(u), kept, a, lost=lost), core=(v, u))


def cut_by_output(
    matrix: Float[Tensor, "rows cols"], metric: Float[Tensor, "cols cols"], rank: int | str, total_rank: int
) -> tuple[Float[Tensor, "rows cols"], int, float, float]:
    """The matrix of lower rank whose outputs are nearest on inputs of second moments `metric`.

    Also its rank, and the output energy that it kept and lost. Of E|(M - M_r) x|^2 the minimum is U U^T M with the
    leading eigenvectors U of M C M^T (reduced-rank regression): Eckart-Young of M C^(1/2), without root and inverse.
    """
    gram = matrix @ metric @ matrix.T
    most = {"sum": total_rank}.get(str(rank), rank)
    vectors, values = leading_directions(gram, most if isinstance(most, int) else len(gram))
    size = min(choose_rank(values.sqrt(), rank, total_rank), len(values))
    kept = float(values[:size].sum())
    leading = vectors[:, :size]
    return leading @ (leading.T @ matrix), size, kept, max(float(gram.trace()) - kept, 0.0)


def compress_dense(
    dense: Float[Tensor, "out in"], rank: int | str, total_rank: int, metric: Float[Tensor, "in in"] | None = None
) -> LowRank:
    """The best approximation of a dense update at the given rank, as balanced factors; `metric` as in `compress`.

    By a full SVD where that is cheap or all ranks are wanted, else by subspace iteration (Halko et al. 2011,
    algorithm 4.4), which finds the leading part to rounding where the spectrum falls.
    """
    if metric is not None:
        cut, size, kept, lost = cut_by_output(dense, metric, rank, total_rank)
        return replace(compress_dense(cut, size, total_rank), kept=kept, lost=lost)
    full = min(dense.shape)
    wanted = total_rank if rank == "sum" else rank
    if full <= EXACT_SVD or not isinstance(wanted, int):
        u, s, v = torch.linalg.svd(dense, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same input gives the same file
            u, s, v = torch.svd_lowrank(dense, q=min(full, wanted + 16), niter=6)
        v = v.T
    size = min(choose_rank(s, rank, total_rank), s.numel())
    kept = s[:size].square().sum()
    lost = float((dense.square().sum() - kept).clamp(min=0))
    return _balanced(u[:, :size], s[:size], v[:size], lost=lost)


def _balanced(u: Tensor, s: Tensor, v: Tensor, *, lost: float) -> LowRank:
    root = s.sqrt()
    sign = _signs(_probe(u.shape[0]).to(u.dtype) @ u)
    a, b = (root * sign)[:, None] * v, u * root * sign
    return LowRank(lora_a=a, lora_b=b, singular_values=s, kept=float(s.square().sum()), lost=lost)


def choose_rank(singular_values: Float[Tensor, " rank"], rank: int | str, total_rank: int) -> int:
    """The number of singular values that `rank` keeps: N, "sum" or "energy:x"; at least 1."""
    if rank == "sum":
        return total_rank
    if isinstance(rank, int):
        return rank
    energy = singular_values.square().cumsum(0)
    share = parse_energy(rank)
    return 1 + int((energy < share * energy[-1]).sum())


@dataclass(frozen=True, kw_only=True)
class Relation:
    """How a merged update relates to the experts' own; every field has one number per expert."""

    energy: Float[Tensor, " expert"]  # |dW_i|^2
    overlap: Float[Tensor, " expert"]  # <dW_merged, dW_i>
    # |P dW_i P'|^2, P and P' on the result's columns and rows
    span_energy: Float[Tensor, " expert"]


def relate_cores(low: LowRank, cores: Float[Tensor, "expert rows cols"]) -> Relation:
    """Of a result in the experts' own core axes, which needs nothing larger than a core."""
    assert low.core is not None, "the result was not made in the core"
    v, u = low.core
    inside = u.T @ cores @ v.T  # [expert, rank, rank]
    live = _live(low)
    return Relation(
        energy=cores.square().sum((1, 2)),
        overlap=(inside.diagonal(dim1=1, dim2=2) * low.singular_values).sum(1),
        span_energy=inside[:, live][:, :, live].square().sum((1, 2)),
    )


def relate(low: LowRank, factors: Sequence[Factors | None]) -> Relation:
    """Of any result; None is an expert without this site."""
    live = _live(low)
    root = low.singular_values[live].sqrt()
    u, v = low.lora_b[:, live] / root, low.lora_a[live] / root[:, None]
    rows = torch.zeros(3, len(factors), dtype=low.lora_a.dtype)
    for index, pair in enumerate(factors):
        if pair is not None:
            rows[0, index] = inner_product(pair, pair)
            rows[1, index] = inner_product((low.lora_a, low.lora_b), pair)
            rows[2, index] = ((u.T @ pair[1]) @ (pair[0] @ v.T)).square().sum()
    return Relation(energy=rows[0], overlap=rows[1], span_energy=rows[2])


def _live(low: LowRank) -> Tensor:
    return low.singular_values > SPAN_TOLERANCE * low.singular_values.max()


def inner_product(one: Factors, other: Factors) -> Tensor:
    """<B A, B' A'> of two updates, from their factors."""
    return ((one[1].T @ other[1]) * (one[0] @ other[0].T)).sum()
