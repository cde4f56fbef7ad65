"""Linear merging methods: sums of the experts' updates, exact in core space.

A method is a function of (cores [expert, rows, cols], weights [expert], its own options by keyword)
that returns the merged core [rows, cols]. The keyword arguments are the options of the command line.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from moa.merging.core import Method


def linear(
    cores: Float[Tensor, "expert rows cols"], weights: Float[Tensor, " expert"]
) -> Float[Tensor, "rows cols"]:
    """Weighted sum of the updates, the weights taken as they are; by default their mean."""
    return torch.einsum("e,erc->rc", weights, cores)


def task_arithmetic(
    cores: Float[Tensor, "expert rows cols"],
    weights: Float[Tensor, " expert"],
    *,
    scale: float = 1.0,
) -> Float[Tensor, "rows cols"]:
    """Sum of the updates times `scale`; a negative weight forgets (tuned: often 0.3 for 8 tasks)."""
    return scale * torch.einsum("e,erc->rc", weights, cores)


METHODS = {
    "linear": Method(
        function=linear,
        default_weights="mean",
        is_sum=True,
        spaces=("core",),
        paper="Model Soups (Wortsman et al., 2022), on updates",
    ),
    "task_arithmetic": Method(
        function=task_arithmetic,
        default_weights="ones",
        is_sum=True,
        spaces=("core",),
        paper="Editing Models with Task Arithmetic (Ilharco et al., 2023)",
    ),
}
