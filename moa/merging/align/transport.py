"""OT-Fusion (Singh & Jaggi 2020): units matched by optimal transport, layer by layer, also between unequal widths.

One pass from the input to the output, in the order of the specification: a layer's units are compared by the weights
that make them, once what these weights read is in A's frame. The exact plan between equal widths is a permutation;
entropy (`regularisation`) or unequal widths give soft maps, which average units and change the function.
"""

import numpy as np
import ot
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moa.merging.align.alignment import (
    Maps,
    Spec,
    State,
    Symmetry,
    UnitMap,
    Units,
    align,
    assemble,
    cut,
    rows,
)

SINKHORN_STEPS, EXACT_STEPS = (
    10_000,
    100_000_000,
)  # POT's own limits stop short of optima of 3000 units
Plan = Float[Tensor, "units_a units_b"]


def transport(a: State, b: State, spec: Spec, *, regularisation: float = 0.0) -> Maps:
    """Maps of B's units to A's, with uniform marginals and squared Euclidean costs.

    `regularisation` is Sinkhorn's, as a share of the largest cost; 0 is the exact plan. Raises ValueError for a
    specification with rotations, which no plan can give.
    """
    maps: Maps = {}
    for name, symmetry in spec.items():
        if symmetry.rotate:
            raise ValueError(
                f"spec: {name} may rotate, which transport cannot; build it with rotate=False"
            )
        costs = [_costs(a, b, spec, maps, units) for units in symmetry.units]
        maps[name] = _plan_blocks(costs, symmetry, regularisation)
    return maps


def _costs(a: State, b: State, spec: Spec, maps: Maps, units: Units) -> Plan:
    """Squared distances between A's and B's units, over the weights that read nothing but mapped units."""
    open_axes = {axis for n, s in spec.items() if n not in maps for u in s.units for axis in u.axes}
    settled = [
        (key, axis)
        for key, axis in units.made
        if not any((key, other) in open_axes for other in range(a[key].ndim) if other != axis)
    ]
    moved = align({key: b[key] for key, _ in settled}, spec, maps)
    mine = torch.cat([rows(a[key], axis) for key, axis in settled], 1)
    theirs = torch.cat([rows(moved[key], axis) for key, axis in settled], 1)
    return torch.cdist(mine.double(), theirs.double()).square()


def _plan_blocks(
    costs: list[Plan], symmetry: Symmetry, regularisation: float
) -> tuple[UnitMap, ...]:
    """Every pair of blocks costs what the best plan inside costs; blocks are then assigned whole."""
    count = symmetry.blocks
    grids = [cut(cost, count) for cost in costs]
    plans = [_plans(grid, regularisation) for grid in grids]
    total = sum((p * g for p, g in zip(plans, grids, strict=True)), start=torch.zeros(())).sum(
        (2, 3)
    )
    mine, theirs = linear_sum_assignment(total.numpy())
    return tuple(_unit_map(plan[mine, theirs], theirs) for plan in plans)


def _plans(costs: Float[Tensor, "i j a b"], regularisation: float) -> Float[Tensor, "i j a b"]:
    scaled = (costs / costs.max().clamp(min=1e-12)).flatten(0, 1).numpy()
    plans = [plan(cost, regularisation) for cost in scaled]
    return torch.from_numpy(np.stack(plans)).unflatten(0, costs.shape[:2])


def plan(cost: np.ndarray, regularisation: float) -> np.ndarray:
    """The plan of least cost between uniform marginals; of equal widths a permutation over their number."""
    mine, theirs = cost.shape
    uniform = np.full(mine, 1 / mine), np.full(theirs, 1 / theirs)
    if regularisation > 0:
        return ot.sinkhorn(*uniform, cost, regularisation, numItermax=SINKHORN_STEPS)
    if mine != theirs:
        return ot.emd(*uniform, cost, numItermax=EXACT_STEPS)
    # ot.emd has the same optimum, and takes minutes for a transformer's 3000 hidden units, where this takes a second.
    return np.eye(mine)[linear_sum_assignment(cost)[1]] / mine


def _unit_map(plans: Float[Tensor, "blocks a b"], theirs: np.ndarray) -> UnitMap:
    """What makes a unit of A is the mean of B's units that go there; what reads it, the sum of theirs.

    So a unit and its copies in a wider network are exchanged without changing the function. (The paper's algorithm 1
    takes the mean for both, which for equal widths is the same.)
    """
    mine, width = plans.shape[1:]
    indices = plans.argmax(2)
    if mine == width and torch.allclose(
        plans.gather(2, indices[..., None]), plans.new_tensor(1 / mine)
    ):
        map = assemble(indices, theirs)
        return UnitMap(map, map)
    made, used = assemble((mine * plans).float(), theirs), assemble((width * plans).float(), theirs)
    return UnitMap(made, used)
