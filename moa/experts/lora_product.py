"""The mixture of low-rank experts as one path: y = base + ((x A^T) * rank_gates) B^T.

A [rank, in] and B [out, rank] are the experts' factors one below the other. rank_gates [.., rank]
hold each expert's gate times its scaling, once per rank. Two matrix products whatever the number of
experts, static shapes, unequal ranks for free, and every parameter used in every forward.

A factor that several experts have in common (HydraLoRA, arXiv 2404.19245: one A, a B each) stands in A or B once:

    y = base + (((x A^T) S) * rank_gates) T B^T     S, T of zeros and ones, None where nothing is shared

An expert's core C is in S too, as C^T where the ones of its ranks are, and S is differentiable.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

FactorsA = Sequence[Float[Tensor, "_ in"]]  # of several experts
FactorsB = Sequence[Float[Tensor, "out _"]]


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """What each rank of a site's experts is: its gate, its scaling, and its row of A and column of B."""

    place: Int[Tensor, " rank"]  # of its expert among the gates
    scaling: Float[Tensor, " rank"]
    spread: Float[Tensor, "rows rank"] | None = None  # S: 1 where a row of A is the rank's, or cores
    gather: Float[Tensor, "rank columns"] | None = None  # T: 1 where a column of B is the rank's


def mix(
    x: Float[Tensor, "batch *seq in"],
    base: Float[Tensor, "batch *seq out"],
    gates: Float[Tensor, "#batch *#seq expert"],
    ranks: Ranks,
    factors_a: FactorsA,
    factors_b: FactorsB,
    root: bool = False,
) -> Float[Tensor, "batch *seq out"]:
    """The base's output plus the gated experts, differentiable in x, base, gates and factors.

    With `root` the gradients of x and the factors are those of the square root of the gates, so that an expert of a
    small gate learns faster (MoE-LoRA on Riemannian preconditioners, arXiv 2502.15828, section 3.2).

    The factors are different ones, in the order of S and T. Saves x, x A^T and the gates for the backward pass, as
    one LoRA of A's rank would: the gated product is recomputed, and the factors are concatenated anew rather than
    kept. The result has the base's dtype.
    """
    maps = ranks.place, ranks.scaling, ranks.spread, ranks.gather
    return _Mix.apply(x.to(base.dtype), base, gates, *maps, root, len(factors_a), *factors_a, *factors_b)


def widen(
    gates: Float[Tensor, "*lead expert"], place: Int[Tensor, " rank"], scaling: Float[Tensor, " rank"]
) -> Float[Tensor, "*lead rank"]:
    return gates.index_select(-1, place) * scaling


def concatenate(factors_a: FactorsA, factors_b: FactorsB, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All factors as A [rows, in] and B [out, columns]; a lone one is not copied."""
    a = factors_a[0] if len(factors_a) == 1 else torch.cat(tuple(factors_a))
    b = factors_b[0] if len(factors_b) == 1 else torch.cat(tuple(factors_b), dim=1)
    return a.to(dtype), b.to(dtype)


def chosen(rows: Tensor, map: Tensor | None) -> Tensor:
    """Rows or columns as S or T choose or sum them. Each is a product with zeros and ones: exact, and summed in one
    order, which index_add on a GPU is not."""
    return rows if map is None else rows @ map.to(rows.dtype)


def add_mixture(
    base: Tensor, x: Tensor, rank_gates: Tensor, a: Tensor, b_t: Tensor, spread: Tensor | None, gather: Tensor | None
) -> Tensor:
    """Add the experts into `base` itself, from A [rows, in] and B^T [columns, out]; for inference alone. `base` must be
    fresh: nothing else may hold it."""
    hidden = chosen(F.linear(x.to(a.dtype), a), spread).mul_(rank_gates)
    hidden = chosen(hidden, gather)
    base.view(-1, base.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), b_t)
    return base


class _Mix(torch.autograd.Function):
    """apply(x, base, gates, place, scaling, S, T, root, number of A factors, *A factors, *B factors); x is in the
    base's dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Tensor, gates: Tensor, place: Tensor, scaling: Tensor, spread: Tensor | None,
        gather: Tensor | None, root: bool, number: int, *factors: Tensor,
    ) -> Tensor:  # fmt: skip
        a, b = concatenate(factors[:number], factors[number:], x.dtype)
        hidden = F.linear(x, a)
        ctx.save_for_backward(x, hidden, gates, place, scaling, spread, gather, *factors)
        ctx.number, ctx.root = number, root
        gated = chosen(hidden, spread) * widen(gates, place, scaling).to(hidden.dtype)
        gated = chosen(gated, gather)
        out = torch.addmm(base.reshape(-1, base.shape[-1]), gated.flatten(0, -2), b.t())
        return out.view(base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, gates, place, scaling, spread, gather, *factors = ctx.saved_tensors
        number = ctx.number
        factors_a, factors_b = factors[:number], factors[number:]
        needs_x, needs_base, needs_gates, *_ = ctx.needs_input_grad
        needs = ctx.needs_input_grad[-len(factors) :]
        a, b = concatenate(factors_a, factors_b, grad.dtype)
        rank_gates, flat = widen(gates, place, scaling), grad.reshape(-1, grad.shape[-1])
        learned = widen(gates.clamp(min=0).sqrt(), place, scaling) if ctx.root else rank_gates
        weights, rows, hidden = learned.to(grad.dtype), hidden, chosen(hidden, spread)  # [.., rank]

        grad_gated = chosen(flat @ b, transposed(gather)).view(hidden.shape)
        grad_x = grad_gates = grad_spread = None
        if needs_gates:  # summed over tokens in the gates' own precision
            wide = (grad_gated * hidden).to(gates.dtype).sum_to_size(rank_gates.shape)
            wide = (wide * scaling).to(gates.dtype)
            grad_gates = torch.zeros_like(gates).index_add_(-1, place, wide)
        grad_hidden = grad_gated.mul_(weights).flatten(0, -2)
        if spread is not None and ctx.needs_input_grad[5]:
            grad_spread = (rows.flatten(0, -2).t() @ grad_hidden).to(spread.dtype)
        grad_hidden = chosen(grad_hidden, transposed(spread))  # [tokens, rows]
        grads_a: Sequence[Tensor | None] = [None] * number
        grads_b: Sequence[Tensor | None] = [None] * len(factors_b)
        if needs_x:
            grad_x = (grad_hidden @ a).view(x.shape)
        if any(needs[:number]):
            grads_a = _per_expert(grad_hidden.t() @ x.flatten(0, -2), factors_a)
        if any(needs[number:]):
            gated = chosen((hidden * weights).flatten(0, -2), gather)
            grads_b = _per_expert_transposed(gated.t() @ flat, factors_b)
        base_grad = grad if needs_base else None
        return grad_x, base_grad, grad_gates, None, None, grad_spread, *[None] * 3, *grads_a, *grads_b


def transposed(map: Tensor | None) -> Tensor | None:
    return None if map is None else map.t()


def _per_expert(grad: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """[total rank, in] as one gradient per factor [rank, in]."""
    pieces = grad.split([factor.shape[0] for factor in factors])
    return [piece.to(factor.dtype) for piece, factor in zip(pieces, factors, strict=True)]


def _per_expert_transposed(grad: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """[total rank, out] as one gradient per factor [out, rank]."""
    ranks = [factor.shape[1] for factor in factors]
    if len(set(ranks)) == 1:
        # One copy for all: autograd takes contiguous pieces as they are, and copies others singly.
        pieces = grad.view(len(ranks), ranks[0], -1).transpose(1, 2).contiguous().unbind()
    else:
        pieces = tuple(piece.t() for piece in grad.split(ranks))
    return [piece.to(factor.dtype) for piece, factor in zip(pieces, factors, strict=True)]
