"""Arrow: a token router without training, from the experts themselves (arXiv 2405.11157, section 3.3).

The row of an expert is v, the first right singular vector of its update B A: of all input directions of length 1 the
one that the update answers most. The logit of a token x is |v x|, since the sign of v means nothing.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def directions(
    factors_a: Sequence[Float[Tensor, "_ in"]], factors_b: Sequence[Float[Tensor, "out _"]]
) -> Float[Tensor, "expert in"]:
    """Each expert's v in float32, zeros for an update that is zero.

    In core space: with A^T = Q R, (B A)^T B A is Q (R B^T B R^T) Q^T, so that a matrix of the rank's size is
    decomposed.
    """
    rows = []
    for a, b in zip(factors_a, factors_b, strict=True):
        q, r = torch.linalg.qr(a.float().t())
        values, vectors = torch.linalg.eigh(r @ (b.float().t() @ b.float()) @ r.t())
        rows.append(q @ vectors[:, -1] * (values[-1] > 0))
    return torch.stack(rows)
