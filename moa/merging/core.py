"""The factored update: every expert of one site in the exact coordinates that the experts span.

    dW_i = scaling_i B_i A_i = Q_B M_i Q_A^T,   Q_B [out, rows], Q_A [in, cols] orthonormal

rows and cols are at most R, the sum of the ranks. Q_B comes from one QR of all scaled B side by side,
Q_A from all A. Every merging method that has a meaning here works on the small M_i alone, which is
exact, depends neither on the order of the experts nor on how one is factored, and makes the best
rank-r result an SVD of an R x R matrix (reference: a full SVD of the dense update, PEFT's `svd`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moa import peft_io

ENERGY_PREFIX = "energy:"


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
class Method:
    """A row of a method table: what the command line must know of a function of tensors."""

    function: Callable[..., Tensor]
    default_weights: Literal["mean", "ones"]  # where the user gives none: 1/N each, or 1 each
    is_sum: bool  # the result is a weighted sum of the updates, so some mixture equals it
    spaces: tuple[str, ...]
    paper: str


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
    core: Float[Tensor, "rows cols"]  # the same update in the core coordinates
    left: Float[Tensor, "rows rank"]
    right: Float[Tensor, "rank cols"]
    lost: float  # squared Frobenius norm of what the rank cut off

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0]


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


def to_core(
    factors: Sequence[tuple[Float[Tensor, "_ in"], Float[Tensor, "out _"]] | None],
) -> CoreUpdates:
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
    return CoreUpdates(q_b=q_b, q_a=q_a, cores=cores)


def compress(
    updates: CoreUpdates, core: Float[Tensor, "rows cols"], rank: int | str, total_rank: int
) -> LowRank:
    """The best approximation of q_b core q_a^T at the asked rank, as balanced factors.

    `rank` is a number, "sum" (exact: `total_rank`, the sum of the experts' ranks) or "energy:x",
    the smallest rank that keeps the share x of the squared Frobenius norm (Eckart-Young).
    """
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    size = min(choose_rank(s, rank, total_rank), s.numel())
    u, s_kept, v = u[:, :size], s[:size], v[:size]
    lora_b, root = updates.q_b @ u, s_kept.sqrt()
    # A pair of singular vectors has a free sign; fixed, so that equal updates give equal files.
    sign = torch.sign(lora_b.gather(0, lora_b.abs().argmax(0, keepdim=True))[0])
    return LowRank(
        lora_a=(root * sign)[:, None] * (v @ updates.q_a.T),
        lora_b=lora_b * root * sign,
        core=(u * s_kept) @ v,
        left=u,
        right=v,
        lost=float(s[size:].square().sum()),
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


def inner_products(
    core: Float[Tensor, "rows cols"], cores: Float[Tensor, "expert rows cols"]
) -> Float[Tensor, " expert"]:
    """<dW, dW_i> of one update with each expert's; the orthonormal bases drop out."""
    return torch.einsum("rc,erc->e", core, cores)


def energy_in_span(
    low: LowRank, cores: Float[Tensor, "expert rows cols"]
) -> Float[Tensor, " expert"]:
    """|P dW_i P'|^2 with P, P' the projections on the row and column space of the result."""
    return (low.left.T @ cores @ low.right.T).square().sum((1, 2))
