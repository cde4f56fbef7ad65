"""The mixture of low-rank experts as one path: y = base + ((x A^T) * gates) B^T.

A [rank, in] and B [out, rank] are the experts' factors one below the other; gates `[.., rank]` hold
each expert's weight times its scaling, once per rank. Two matrix products whatever the number of
experts, static shapes, unequal ranks for free, and every parameter used in every forward.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def mix(
    x: Float[Tensor, "batch *seq in"],
    base: Float[Tensor, "batch *seq out"],
    gates: Float[Tensor, "#batch *#seq rank"],
    factors_a: Sequence[Float[Tensor, "_ in"]],
    factors_b: Sequence[Float[Tensor, "out _"]],
) -> Float[Tensor, "batch *seq out"]:
    """The base's output plus the gated experts, differentiable in all tensors, in base's dtype.

    Saves x, x A^T and the gates for the backward pass, as one LoRA of the total rank would: the
    gated product is recomputed, and the factors are concatenated anew rather than kept.
    """
    return _Mix.apply(x.to(base.dtype), base, None, None, gates, *factors_a, *factors_b)


def mix_linear(
    x: Float[Tensor, "batch *seq in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    gates: Float[Tensor, "#batch *#seq rank"],
    factors_a: Sequence[Float[Tensor, "_ in"]],
    factors_b: Sequence[Float[Tensor, "out _"]],
) -> Float[Tensor, "batch *seq out"]:
    """`mix` around a frozen linear layer: no gradient for `weight` and `bias`.

    In one operation the experts add to the layer's output, and in the backward pass to its gradient
    of x, where they lie: both are as large as all the experts' other traffic.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return _Mix.apply(x, None, weight, bias, gates, *factors_a, *factors_b)


def concatenate(
    factors_a: Sequence[Tensor], factors_b: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """All factors as A [rank, in] and B [out, rank]; a lone expert's are not copied."""
    if len(factors_a) == 1:
        return factors_a[0].to(dtype), factors_b[0].to(dtype)
    return torch.cat(tuple(factors_a)).to(dtype), torch.cat(tuple(factors_b), dim=1).to(dtype)


def gated(x: Tensor, a: Tensor, gates: Tensor | None) -> Tensor:
    """(x A^T) * gates in A's dtype; no gates: they are in A already. For inference alone."""
    hidden = F.linear(x if x.dtype == a.dtype else x.to(a.dtype), a)
    if gates is not None:
        hidden *= gates
    return hidden


def add_mixture(base: Tensor, hidden: Tensor, b_t: Tensor) -> Tensor:
    """Add gated A x, times B given as [rank, out], into `base` itself; for inference alone.

    `base` must be fresh: nothing else may hold it.
    """
    base.view(-1, base.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), b_t)
    return base


class _Mix(torch.autograd.Function):
    """apply(x, base, weight, bias, gates, *A factors, *B factors): base, or weight and bias, or None.

    x is in the dtype to compute in.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        gates: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        count = len(factors) // 2
        a, b = concatenate(factors[:count], factors[count:], x.dtype)
        hidden = F.linear(x, a)
        ctx.save_for_backward(x, hidden, weight, gates, *factors)
        gated = (hidden * gates.to(hidden.dtype)).flatten(0, -2)
        if base is not None:
            out = torch.addmm(base.reshape(-1, base.shape[-1]), gated, b.t())
            return out.view(base.shape)
        assert weight is not None
        out = F.linear(x, weight, bias)
        out.view(-1, out.shape[-1]).addmm_(gated, b.t())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, weight, gates, *factors = ctx.saved_tensors
        half = len(factors) // 2
        factors_a, factors_b = factors[:half], factors[half:]
        needs_x, needs_base, _, _, needs_gates, *needs = ctx.needs_input_grad
        a, b = concatenate(factors_a, factors_b, grad.dtype)
        weights, flat = gates.to(grad.dtype), grad.reshape(-1, grad.shape[-1])

        grad_gated = (flat @ b).view(hidden.shape)
        grad_x = grad_gates = None
        if needs_gates:
            grad_gates = (grad_gated * hidden).to(gates.dtype).sum_to_size(gates.shape)
        grad_hidden = grad_gated.mul_(weights).flatten(0, -2)
        grads_a: Sequence[Tensor | None] = [None] * half
        grads_b: Sequence[Tensor | None] = [None] * half
        if needs_x and weight is None:
            grad_x = (grad_hidden @ a).view(x.shape)
        elif needs_x:
            grad_x = (flat @ weight.to(grad.dtype)).addmm_(grad_hidden, a).view(x.shape)
        if any(needs[:half]):
            grads_a = _per_expert(grad_hidden.t() @ x.flatten(0, -2), factors_a)
        if any(needs[half:]):
            gated = (hidden * weights).flatten(0, -2)
            grads_b = _per_expert_transposed(gated.t() @ flat, factors_b)
        base_grad = grad if needs_base else None
        return grad_x, base_grad, None, None, grad_gates, *grads_a, *grads_b


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
