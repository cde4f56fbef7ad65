"""Second moments of a linear layer's inputs, as a sketch that serves whatever the expert is merged with later.

    G = E[x x^T]  ~  V diag(values - rest) V^T + rest I

V [in, direction] are the leading eigenvectors of G; `rest` is the mean of the other eigenvalues, so the trace is exact,
and G is exact where all directions are kept, or where the others have no input. Sketches with few directions are about
as large as the expert itself, and need no sample of its data again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

EXACT_EIGEN = 2048  # a full decomposition of a matrix this small takes seconds


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Of the inputs x of one layer, over `tokens` of them."""

    vectors: Float[Tensor, "in direction"]  # orthonormal
    values: Float[Tensor, " direction"]  # their eigenvalues, largest first
    rest: float  # eigenvalue of every other direction
    mean: Float[Tensor, " in"]
    tokens: int

    @property
    def root(self) -> Float[Tensor, "in direction"]:
        """L of G = L L^T + rest I."""
        return self.vectors * (self.values - self.rest).clamp(min=0).sqrt()

    def dense(self) -> Float[Tensor, "in in"]:
        return self.within(self.root)

    def within(self, root: Float[Tensor, "axis direction"]) -> Float[Tensor, "axis axis"]:
        """Q^T G Q in some orthonormal axes Q of the inputs, from `root` = Q^T L."""
        second = root @ root.T
        second.diagonal().add_(self.rest)
        return second


class InputSums:
    def __init__(self) -> None:
        self.second: Tensor | None = None  # [in, in] float64
        self.total: Tensor | None = None  # [in]
        self.tokens = 0

    def add(self, rows: Float[Tensor, "token in"]) -> None:
        rows = rows.double()
        second, total = rows.T @ rows, rows.sum(0)
        self.second = second if self.second is None else self.second.add_(second)
        self.total = total if self.total is None else self.total.add_(total)
        self.tokens += len(rows)

    @classmethod
    def mixed(cls, answers: "InputSums", others: "InputSums", share: float) -> "InputSums":
        """Sums over all tokens whose moments are `share` times those of `answers` and the rest those of `others`. Where
        one of the two has no token, they are those of the other alone."""
        found, pairs = cls(), [(share, answers), (1 - share, others)]
        found.tokens = answers.tokens + others.tokens
        seen = [(weight, own) for weight, own in pairs if own.tokens]
        for weight, own in seen:
            factor = (weight if len(seen) == 2 else 1.0) * found.tokens / own.tokens
            assert own.second is not None and own.total is not None
            second, total = factor * own.second, factor * own.total
            found.second = second if found.second is None else found.second.add_(second)
            found.total = total if found.total is None else found.total.add_(total)
        return found

    @property
    def gram(self) -> Float[Tensor, "in in"]:
        """X^T X / tokens"""
        assert self.second is not None and self.tokens
        return self.second / self.tokens

    def sketch(self, width: int, directions: int) -> Moments:
        """The moments of the `width` inputs, with at most so many directions; none where no token came."""
        if self.second is None or self.total is None:
            nothing = torch.zeros(width, dtype=torch.float64)
            return Moments(vectors=nothing[:, None][:, :0], values=nothing[:0], rest=0.0, mean=nothing, tokens=0)
        gram = self.gram
        vectors, values = leading_directions(gram, directions)
        others = width - len(values)
        rest = max(float(gram.trace() - values.sum()), 0.0) / others if others else 0.0
        mean = (self.total / self.tokens).cpu()
        return Moments(vectors=vectors.cpu(), values=values.cpu(), rest=rest, mean=mean, tokens=self.tokens)


def leading_directions(
    matrix: Float[Tensor, "in in"], count: int
) -> tuple[Float[Tensor, "in direction"], Float[Tensor, " direction"]]:
    """The leading eigenvectors and eigenvalues of a positive semidefinite matrix, at most `count`."""
    size = len(matrix)
    if size <= EXACT_EIGEN or count > size // 4:
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    else:
        with torch.random.fork_rng(devices=[]):  # subspace iteration (Halko et al. 2011)
            torch.manual_seed(0)  # the same input gives the same file
            vectors, values, _ = torch.svd_lowrank(matrix, q=count + 16, niter=6)
        values, vectors = values[:count], vectors[:, :count]
    return vectors.contiguous(), values.clamp(min=0)


def own_directions(moments: Sequence[Moments], count: int) -> Float[Tensor, "in direction"]:
    """For each expert, `count` directions in which its inputs have most energy relative to all experts' together. The
    leading generalised eigenvectors of (G_k, sum G) where some sketch tells directions apart."""
    axes, _ = torch.linalg.qr(torch.cat([own.vectors for own in moments], dim=1))
    seconds = torch.stack([own.within(axes.T @ own.root) for own in moments])
    total = seconds.sum(0)
    total.diagonal().add_(1e-6 * total.diagonal().mean())
    inverse = torch.linalg.inv(torch.linalg.cholesky(total))
    relative = inverse @ seconds @ inverse.T
    leading = torch.linalg.eigh(relative).eigenvectors.flip(2)[:, :, :count]  # [expert, axis, count]
    return torch.cat([axes @ (inverse.T @ own) for own in leading], dim=1)


def null_space_rows(
    start: Float[Tensor, "rank in"], others: Sequence[Moments], count: int, own: Moments | None = None
) -> Float[Tensor, "rank in"]:
    """`lora_A` of a new expert that hardly reacts to what other experts read, `count` leading directions of theirs.

        A = orthonormal rows / sqrt(3) in the complement of these directions

    Frozen there, what the new expert adds to another expert's samples is B A x with a small A x, whatever B becomes, so
    the experts sum. Inside the complement the rows are the leading directions of its `own` inputs, where these are
    known; the random `start` fills what they leave open. InfLoRA (2404.00228) with the others of OSRM (2505.22934): for
    parties that share statistics, not data. Raises ValueError where the complement has fewer directions than the rank.
    """
    rank, width = start.shape
    axes, _ = torch.linalg.qr(torch.cat([moments.vectors for moments in others], dim=1))
    total = sum((moments.within(axes.T @ moments.root) for moments in others), start=torch.zeros(()))
    taken = axes @ torch.linalg.eigh(total).eigenvectors.flip(1)[:, :count]
    if taken.shape[1] + rank > width:
        raise ValueError(f"leaves {width - taken.shape[1]} of {width} directions to a rank of {rank}")
    rows = start.double().T
    if own is not None:
        leading, sizes, _ = torch.linalg.svd(own.root - taken @ (taken.T @ own.root), full_matrices=False)
        leading = leading[:, sizes > 1e-6 * sizes.max()][:, :rank]
        rows = torch.cat([leading, rows[:, : rank - leading.shape[1]]], dim=1)
    rows = rows - taken @ (taken.T @ rows)
    return torch.linalg.qr(rows).Q.T / math.sqrt(3)
