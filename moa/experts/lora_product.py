"""The mixture of low-rank experts as one path: y = base + ((x A^T) * rank_gates) B^T.

A [rank, in] and B [out, rank] are the experts' factors one below the other. rank_gates [.., rank]
hold each expert's gate times its scaling, once per rank. Two matrix products whatever the number of
experts, static shapes, unequal ranks for free, and every parameter used in every forward.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


def mix(
    x: Float[Tensor, "batch *seq in"],
    base: Float[Tensor, "batch *seq out"],
    gates: Float[Tensor, "#batch *#seq expert"],
    place: Int[Tensor, " rank"],
    scaling: Float[Tensor, " rank"],
    factors_a: Sequence[Float[Tensor, "_ in"]],
    factors_b: Sequence[Float[Tensor, "out _"]],
) -> Float[Tensor, "batch *seq out"]:
    """The base's output plus the gated experts, differentiable in all but `place` and `scaling`.

    `place` names the gate of each rank. Saves x, x A^T and the gates for the backward pass, as one
    LoRA of the total rank would: the gated product is recomputed, and the factors are concatenated
    anew rather than kept. The result has the base's dtype.
    """
    return _Mix.apply(x.to(base.dtype), base, gates, place, scaling, *factors_a, *factors_b)


def widen(
    gates: Float[Tensor, "*lead expert"],
    place: Int[Tensor, " rank"],
    scaling: Float[Tensor, " rank"],
) -> Float[Tensor, "*lead rank"]:
    """Each rank's gate, times its scaling."""
    return gates.index_select(-1, place) * scaling


def concatenate(factors_a: Sequence[Tensor], factors_b: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All factors as A [rank, in] and B [out, rank]; a lone expert's are not copied."""
    if len(factors_a) == 1:
        return factors_a[0].to(dtype), factors_b[0].to(dtype)
    return torch.cat(tuple(factors_a)).to(dtype), torch.cat(tuple(factors_b), dim=1).to(dtype)


def add_mixture(base: Tensor, x: Tensor, rank_gates: Tensor, a: Tensor, b_t: Tensor) -> Tensor:
    """Add the experts into `base` itself, from A [rank, in] and B^T [rank, out]; for inference alone.

    `base` must be fresh: nothing else may hold it.
    """
    hidden = F.linear(x.to(a.dtype), a).mul_(rank_gates)
    base.view(-1, base.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), b_t)
    return base


class _Mix(torch.autograd.Function):
    """apply(x, base, gates, place, scaling, *A factors, *B factors); x is in the base's dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Tensor, gates: Tensor, place: Tensor, scaling: Tensor,
        *factors: Tensor,
    ) -> Tensor:  # fmt: skip
        count = len(factors) // 2
        a, b = concatenate(factors[:count], factors[count:], x.dtype)
        hidden = F.linear(x, a)
        ctx.save_for_backward(x, hidden, gates, place, scaling, *factors)
        gated = hidden * widen(gates, place, scaling).to(hidden.dtype)
        out = torch.addmm(base.reshape(-1, base.shape[-1]), gated.flatten(0, -2), b.t())
        return out.view(base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, gates, place, scaling, *factors = ctx.saved_tensors
        half = len(factors) // 2
        factors_a, factors_b = factors[:half], factors[half:]
        needs_x, needs_base, needs_gates, _, _, *needs = ctx.needs_input_grad
        a, b = concatenate(factors_a, factors_b, grad.dtype)
        rank_gates, flat = widen(gates, place, scaling), grad.reshape(-1, grad.shape[-1])
        weights = rank_gates.to(grad.dtype)

        grad_gated = (flat @ b).view(hidden.shape)
        grad_x = grad_gates = None
        if needs_gates:  # summed over tokens in the gates' own precision
            wide = (grad_gated * hidden).to(gates.dtype).sum_to_size(rank_gates.shape)
            wide = (wide * scaling).to(gates.dtype)
            grad_gates = torch.zeros_like(gates).index_add_(-1, place, wide)
        grad_hidden = grad_gated.mul_(weights).flatten(0, -2)
        grads_a: Sequence[Tensor | None] = [None] * half
        grads_b: Sequence[Tensor | None] = [None] * half
        if needs_x:
            grad_x = (grad_hidden @ a).view(x.shape)
        if any(needs[:half]):
            grads_a = _per_expert(grad_hidden.t() @ x.flatten(0, -2), factors_a)
        if any(needs[half:]):
            gated = (hidden * weights).flatten(0, -2)
            grads_b = _per_expert_transposed(gated.t() @ flat, factors_b)
        base_grad = grad if needs_base else None
        return grad_x, base_grad, grad_gates, None, None, *grads_a, *grads_b


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
