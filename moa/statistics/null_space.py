"""lora_A of a new expert that hardly reacts to what other experts read, from the statistics of their inputs.

    A = orthonormal rows / sqrt(3) in the complement of the others' leading input directions

Frozen there, what the new expert adds to another expert's samples is B A x with a small A x, whatever B becomes, so the
experts sum. Inside the complement the rows are the leading directions of its own inputs, where these are known,
else random. InfLoRA (2404.00228) with the others of OSRM (2505.22934): for parties that share statistics, not data.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moa.statistics.moments import Moments


def shared_directions(moments: Sequence[Moments], count: int) -> Float[Tensor, "in direction"]:
    """The leading principal directions of the inputs of all experts together, as far as their sketches have them."""
    axes, _ = torch.linalg.qr(torch.cat([own.vectors for own in moments], dim=1))
    total = sum((own.within(axes.T @ own.root) for own in moments), start=torch.zeros(()))
    return axes @ torch.linalg.eigh(total).eigenvectors.flip(1)[:, :count]


def null_space_rows(
    start: Float[Tensor, "rank in"], others: Sequence[Moments], count: int, own: Moments | None = None
) -> Float[Tensor, "rank in"]:
    """`lora_A` outside of `count` directions of the others; `start` is random, and fills what `own` leaves open.

    Rows have PEFT's mean length, 1/sqrt(3). Raises ValueError where the complement has fewer directions than the rank.
    """
    rank, width = start.shape
    taken = shared_directions(others, count)
    if taken.shape[1] + rank > width:
        raise ValueError(f"leaves {width - taken.shape[1]} of {width} directions to a rank of {rank}")
    rows = start.double().T
    if own is not None:
        leading, sizes, _ = torch.linalg.svd(own.root - taken @ (taken.T @ own.root), full_matrices=False)
        leading = leading[:, sizes > 1e-6 * sizes.max()][:, :rank]
        rows = torch.cat([leading, rows[:, : rank - leading.shape[1]]], dim=1)
    rows = rows - taken @ (taken.T @ rows)
    return torch.linalg.qr(rows).Q.T / math.sqrt(3)
