"""OT-Fusion (Singh & Jaggi 2020) between networks of equal widths: units matched by transport, layer by layer.

One pass from the input to the output, in the order of the specification: a layer's units are compared by the weights
that make them, once what these weights read is in A's frame. Between equal widths and uniform marginals the exact plan
is a permutation, so an assignment finds it.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from moa.merging.align.alignment import Maps, Spec, State, Units, align, best_maps, rows


def transport(a: State, b: State, spec: Spec) -> Maps:
    """Maps of B's units to A's with the least squared Euclidean cost.

    Raises ValueError for a specification with rotations, which no plan can give.
    """
    maps: Maps = {}
    for name, symmetry in spec.items():
        if symmetry.rotate:
            raise ValueError(f"spec: {name} may rotate, which transport cannot; use rotate=False")
        costs = [_costs(a, b, spec, maps, units) for units in symmetry.units]
        maps[name] = tuple(best_maps([-cost for cost in costs], symmetry)[0])
    return maps


def _costs(a: State, b: State, spec: Spec, maps: Maps, units: Units) -> Float[Tensor, "units_a units_b"]:
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
