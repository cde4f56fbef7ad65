"""The factored update: every expert of one site in the exact coordinates that the experts span.

    dW_i = scaling_i B_i A_i = Q_B M_i Q_A^T,   Q_B [out, rows], Q_A [in, cols] orthonormal

rows and cols are at most R, the sum of the ranks. Q_B comes from one QR of all scaled B side by side,
Q_A from all A; both are then turned so that their first vectors hold the most energy of all experts
together. So the M_i are a function of the updates alone: neither the order of the experts nor the way
one is factored enters, not even in methods that look at single entries (Core Space merging, Panariello
et al. 2025, takes the axes from the stacked factors instead, which depend on the factoring).
The best rank-r result is an SVD of an R x R matrix (reference: PEFT's `svd`, of the dense update).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moa import peft_io

ENERGY_PREFIX = "energy:"
EXACT_SVD = 1024  # a full SVD of a matrix this small takes less than a second
SPAN_TOLERANCE = 1e-7  # of the largest singular value: below it a direction is rounding
Factors = tuple[Tensor, Tensor]  # A [rank, in], B [out, rank], all scale folded into B


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One adapter whose weights are read a site at a time, so that memory is one site's."""

    name: str
    config: Mapping[str, Any]
    ranks: Mapping[str, int]  # site -> rank
    shapes: Mapping[str, tuple[int, int]]  # site -> (out, in)
    read: Callable[[str], tuple[Tensor, Tensor]]  # site -> lora_A, lora_B as stored

    def factors(
        self, site: str, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
        """(A, scaling * B): the product B A is the expert's update, all scale folded in."""
        lora_a, lora_b = self.read(site)
        return lora_a.to(dtype), lora_b.to(dtype) * peft_io.site_scaling(self.config, site)


@dataclass(frozen=True, kw_only=True)
class CoreUpdates:
    """dW_i = q_b cores[i] q_a^T, exactly."""

    q_b: Float[Tensor, "out rows"]
    q_a: Float[Tensor, "in cols"]
    cores: Float[Tensor, "expert rows cols"]


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """An update B A with balanced factors: the singular values are shared, half in each.

    So both factors keep their precision in 16 bits, and further training sees one scale.
    """

    lora_a: Float[Tensor, "rank in"]
    lora_b: Float[Tensor, "out rank"]
    singular_values: Float[Tensor, " rank"]  # kept
    lost: float  # squared Frobenius norm of what the rank cut off


def expert_from_folder(path: str | Path, name: str | None = None) -> Expert:
    """An expert that is read lazily from its PEFT folder; named after the folder by default.

    Raises ValueError as `peft_io.read_header` does.
    """
    header = peft_io.read_header(path)

    def read(site: str) -> tuple[Tensor, Tensor]:
        key_a, key_b = peft_io.site_keys(site)
        tensors = peft_io.read_site(header, site)
        return tensors[key_a], tensors[key_b]

    return Expert(
        name=name or header.path.resolve().name,
        config=header.config,
        ranks=header.ranks,
        shapes=header.shapes,
        read=read,
    )


def expert_from_tensors(
    name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> Expert:
    """An expert in memory, such as a live bank's `state(name)` and `peft_config(name)`."""
    ranks, shapes = peft_io.check_tensors(name, tensors, config)

    def read(site: str) -> tuple[Tensor, Tensor]:
        key_a, key_b = peft_io.site_keys(site)
        return tensors[key_a].detach().cpu(), tensors[key_b].detach().cpu()

    return Expert(name=name, config=config, ranks=ranks, shapes=shapes, read=read)


def to_core(factors: Sequence[Factors | None]) -> CoreUpdates:
    """The core form of one site from each expert's (A, scaling * B).

    None is an expert without this site, whose core is zero; at least one must have it.
    """
    present = [pair for pair in factors if pair is not None]
    q_a, r_a = torch.linalg.qr(torch.cat([a for a, _ in present]).T)  # r_a [cols, R]
    q_b, r_b = torch.linalg.qr(torch.cat([b for _, b in present], dim=1))  # r_b [rows, R]
    cores = q_b.new_zeros(len(factors), q_b.shape[1], q_a.shape[1])
    start = 0
    for index, pair in enumerate(factors):
        if pair is not None:
            own = slice(start, start + pair[0].shape[0])
            cores[index] = r_b[:, own] @ r_a[:, own].T
            start = own.stop
    turn_b, turn_a = _principal_axes(q_b, cores), _principal_axes(q_a, cores.mT)
    return CoreUpdates(q_b=q_b @ turn_b, q_a=q_a @ turn_a, cores=turn_b.T @ cores @ turn_a)


def _principal_axes(
    q: Float[Tensor, "size axes"], cores: Float[Tensor, "expert axes _"]
) -> Float[Tensor, "axes axes"]:
    """The rotation of q's columns to where the experts' energy lies, most first; signs fixed in the original space."""
    axes = torch.linalg.eigh((cores @ cores.mT).sum(0)).eigenvectors.flip(1)
    return axes * _signs(q @ axes)


def _signs(vectors: Float[Tensor, "size count"]) -> Float[Tensor, " count"]:
    """+1 or -1 for each vector: a singular vector's free sign, chosen so that its largest entry is positive."""
    return torch.sign(vectors.gather(0, vectors.abs().argmax(0, keepdim=True))[0])


def compress(
    updates: CoreUpdates, core: Float[Tensor, "rows cols"], rank: int | str, total_rank: int
) -> LowRank:
    """The best approximation of q_b core q_a^T at the asked rank, as balanced factors.

    `rank` is a number, "sum" (exact: `total_rank`, the sum of the experts' ranks) or "energy:x",
    the smallest rank that keeps the share x of the squared Frobenius norm (Eckart-Young).
    """
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    size = min(choose_rank(s, rank, total_rank), s.numel())
    u, v = updates.q_b @ u[:, :size], v[:size] @ updates.q_a.T
    return _balanced(u, s[:size], v, lost=float(s[size:].square().sum()))


def compress_dense(dense: Float[Tensor, "out in"], rank: int | str, total_rank: int) -> LowRank:
    """The best approximation of a dense update at the asked rank, as balanced factors.

    By a full SVD where that is cheap or all ranks are wanted, else by subspace iteration (Halko et al. 2011,
    algorithm 4.4), which finds the leading part to rounding where the spectrum falls.
    """
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
    sign = _signs(u)
    return LowRank(
        lora_a=(root * sign)[:, None] * v, lora_b=u * root * sign, singular_values=s, lost=lost
    )


def choose_rank(singular_values: Float[Tensor, " rank"], rank: int | str, total_rank: int) -> int:
    """The number of singular values that `rank` keeps: N, "sum" or "energy:x"; at least 1."""
    if rank == "sum":
        return total_rank
    if isinstance(rank, int):
        return rank
    energy = singular_values.square().cumsum(0)
    share = parse_rank_energy(rank)
    return 1 + int((energy < share * energy[-1]).sum())


def parse_rank(rank: int | float | str) -> int | str:
    """`rank` as the number, "sum" or "energy:x" that it means; ValueError with the choices."""
    text = str(rank).strip()
    if text.isdigit() and int(text) > 0:
        return int(text)
    if text == "sum":
        return text
    if text.startswith(ENERGY_PREFIX):
        parse_rank_energy(text)
        return text
    raise ValueError(f"rank: must be a positive number, 'sum' or 'energy:0.99', got {rank!r}")


def parse_rank_energy(rank: str) -> float:
    try:
        share = float(rank.removeprefix(ENERGY_PREFIX))
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"rank: the x of 'energy:x' must be in (0, 1], got {rank!r}")
    return share


def inner_product(one: Factors, other: Factors) -> Tensor:
    """<B A, B' A'> of two updates, from their factors."""
    return ((one[1].T @ other[1]) * (one[0] @ other[0].T)).sum()


def energy_in_span(low: LowRank, factors: Factors) -> Tensor:
    """|P dW P'|^2 with P, P' the projections on the row and column space of `low`."""
    live = low.singular_values > SPAN_TOLERANCE * low.singular_values.max()
    root = low.singular_values[live].sqrt()
    u, v = low.lora_b[:, live] / root, low.lora_a[live] / root[:, None]
    return ((u.T @ factors[1]) @ (factors[0] @ v.T)).square().sum()
