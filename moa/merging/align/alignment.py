"""Networks trained apart, brought into one frame before they are averaged.

A network's hidden units have no order: permuting them, with the rows that make them and the columns that read them,
changes nothing. A *specification* lists where a network has such freedom, as plain data: name -> Symmetry, the axes of
state-dict tensors that one map moves together (`clip.py` has those of a CLIP). A map of B's units to
A's is a permutation, written as indices [units], or a matrix [units of A, units of B].

`weight_matching`, `transport` and `activations.py` find maps, `align` applies them. Models fine-tuned from one
base are aligned already.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Axis = tuple[str, int]  # key of a tensor, and which of its axes
State = Mapping[str, Tensor]
Indices = Int[Tensor, " units"]
Matrix = Float[Tensor, "units_a units_b"]
PROGRESS = 1e-5  # a map that gains less, as a share of its agreement, is left as it is


@dataclass(frozen=True, kw_only=True)
class Units:
    """The axes along which some tensors make units, and others read them."""

    made: tuple[Axis, ...]
    used: tuple[Axis, ...] = ()

    @property
    def axes(self) -> tuple[Axis, ...]:
        return self.made + self.used


@dataclass(frozen=True, kw_only=True)
class Symmetry:
    """Units that may be moved: blocks of them against each other, and the units inside every block.

    An MLP's hidden layer is one block. Attention heads are `blocks`, and two groups of units that go with them: those
    that queries and keys share, and those that values give to the output. `rotate` allows any rotation inside a
    block, where nothing nonlinear is between `made` and `used`.
    """

    units: tuple[Units, ...]
    blocks: int = 1
    rotate: bool = False


Spec = Mapping[str, Symmetry]


# As the specification: B's units in terms of A's, one map for each group of units.
Maps = dict[str, tuple[Tensor, ...]]


def align(state: State, spec: Spec, maps: Maps) -> dict[str, Tensor]:
    """The network in the frame that the maps lead to; tensors that no axis of `maps` names are the given ones."""
    moved = dict(state)
    for name, group in maps.items():
        for units, map in zip(spec[name].units, group, strict=True):
            for key, axis in units.axes:
                if key in moved:
                    moved[key] = move(moved[key], axis, map)
    return moved


def weight_matching(
    a: State,
    b: State,
    spec: Spec,
    *,
    seed: int = 0,
    max_sweeps: int = 100,
    start: Maps | None = None,
    on_sweep: Callable[[int, int], None] = lambda sweep, changed: None,
) -> Maps:
    """Maps of B's units to A's, one symmetry after the other in random order until none improves.

    Coordinate ascent on the inner product of all weights: Git Re-Basin (Ainsworth et al. 2023), algorithm 1. The
    result is a local optimum; `start` (none: B as it is) and the seed decide which. `on_sweep` gets each sweep's number
    and how many maps it changed.
    """
    check_pair(a, b, spec)
    rng = np.random.default_rng(seed)
    maps = dict(start or {name: identity(b, symmetry) for name, symmetry in spec.items()})
    for sweep in range(max_sweeps):
        changed = 0
        for name in rng.permutation(list(spec)):
            agreements = agreement(a, b, spec, maps, name)
            before = sum(value_of(g, m) for g, m in zip(agreements, maps[name], strict=True))
            found, after = best_maps(agreements, spec[name])
            if after > before + PROGRESS * abs(before):
                maps[name] = tuple(found)
                changed += 1
        on_sweep(sweep, changed)
        if not changed:
            break
    return maps


def transport(a: State, b: State, spec: Spec) -> Maps:
    """Maps of B's units to A's with the least squared Euclidean cost: OT-Fusion (Singh & Jaggi 2020).

    One pass in the order of the specification: a layer's units are compared by the weights that make them, once what
    these weights read is in A's frame. Between equal widths the exact plan is a permutation, which an assignment finds.
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


def agreement(a: State, b: State, spec: Spec, maps: Maps, name: str) -> list[Matrix]:
    """For each group of units the inner products of A's with B's, all other axes of B in A's frame."""
    others = {other: map for other, map in maps.items() if other != name}
    keys = {key for units in spec[name].units for key, _ in units.axes}
    moved = align({key: b[key] for key in keys}, spec, others)
    products = (
        [rows(a[key], axis) @ rows(moved[key], axis).T for key, axis in units.axes] for units in spec[name].units
    )
    return [sum(own, start=torch.zeros(())) for own in products]


def best_maps(agreements: list[Matrix], symmetry: Symmetry) -> tuple[list[Tensor], float]:
    """The maps of all groups of greatest agreement, and that: exact, blocks being assigned by their best inner maps."""
    count = symmetry.blocks
    inner = [_best(cut(matrix, count), symmetry.rotate) for matrix in agreements]
    scores = sum((values for _, values in inner), start=torch.zeros(count, count))
    mine, theirs = linear_sum_assignment(scores.numpy(), maximize=True)
    found = [assemble(maps[mine, theirs], theirs) for maps, _ in inner]
    return found, float(scores[mine, theirs].sum())


def _best(matrices: Float[Tensor, "i j a b"], rotate: bool) -> tuple[Tensor, Float[Tensor, "i j"]]:
    """For every pair of blocks the permutation or rotation M of greatest <matrix, M>, and that value."""
    if rotate:  # orthogonal Procrustes
        u, s, v = torch.linalg.svd(matrices)
        return u @ v, s.sum(-1)
    flat = [linear_sum_assignment(m.numpy(), maximize=True)[1] for m in matrices.flatten(0, 1)]
    indices = torch.from_numpy(np.stack(flat)).unflatten(0, matrices.shape[:2])
    return indices, matrices.gather(3, indices[..., None])[..., 0].sum(-1)


def assemble(inner: Tensor, theirs: np.ndarray) -> Tensor:
    """One map of the whole from those of A's blocks in turn: block i is made of block theirs[i] of B."""
    width = inner.shape[-1]
    if inner.ndim == 2:  # permutations
        return (inner + width * torch.from_numpy(theirs)[:, None]).flatten()
    whole = torch.zeros(inner.shape[0], inner.shape[1], inner.shape[0], width)
    for i, j in enumerate(theirs):
        whole[i, :, j] = inner[i]
    return whole.flatten(2).flatten(0, 1)


def value_of(matrix: Matrix, map: Tensor) -> float:
    """<matrix, M> of a permutation or a matrix."""
    if map.ndim == 1:
        return float(matrix[torch.arange(len(map)), map].double().sum())
    return float((matrix * map).double().sum())


def identity(state: State, symmetry: Symmetry) -> tuple[Tensor, ...]:
    sizes = (state[key].shape[axis] for key, axis in (units.made[0] for units in symmetry.units))
    return tuple(map(torch.arange, sizes))


def rows(tensor: Tensor, axis: int) -> Float[Tensor, "units rest"]:
    """One row for each unit along an axis."""
    return tensor.float().movedim(axis, 0).reshape(tensor.shape[axis], -1)


def move(tensor: Tensor, axis: int, map: Tensor) -> Tensor:
    """The tensor with the units along an axis mapped."""
    if map.ndim == 1:
        return tensor.index_select(axis, map)
    return torch.tensordot(map, tensor.float(), dims=([1], [axis])).movedim(0, axis).to(tensor.dtype)


def check_pair(a: State, b: State, spec: Spec) -> None:
    """ValueError unless both have all tensors of the specification, in one shape."""
    for key in dict.fromkeys(key for s in spec.values() for u in s.units for key, _ in u.axes):
        for name, state in (("A", a), ("B", b)):
            if key not in state:
                raise ValueError(f"{name}: {key} is missing, which the specification names")
        if a[key].shape != b[key].shape:
            raise ValueError(
                f"{key}: is {list(a[key].shape)} in A and {list(b[key].shape)} in B; only equal widths are aligned"
            )


def cut(matrix: Matrix, count: int) -> Float[Tensor, "i j a b"]:
    return matrix.unflatten(0, (count, -1)).unflatten(2, (count, -1)).transpose(1, 2)
