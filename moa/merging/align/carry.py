"""A LoRA carried to another base: maps of each layer's inputs and outputs, B <- P_out B and A <- A P_in^T.

activations   x_T ~ P_in x_S, y_T ~ P_out y_S on the same tokens: orthogonal Procrustes, the form of Theseus
frames        u_i, v_i of W_T for those of W_S, by the order of their singular values, without data (as Cross-LoRA,
              arXiv 2508.05232). A pair's sign is that of the side on which the two bases agree
tokens        of embeddings and head: rows go to the same token, their width by Procrustes on the tokens of both

A map has orthonormal rows or columns, and so carries between widths. It maps what the two bases do: directions that no
text or weight reaches stay where the bases agree, so that one base gives the identity, and else are left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moa.merging.align.activations import Covariance
from moa.merging.core import Factors, inner_product
from moa.statistics.gather import groups

Map = Float[Tensor, "target source"]
Seen = tuple[Tensor, list[int]]  # ids [1, token] of a text, and positions in it
AGREES = 0.9  # mean cosine of directions from which two bases are taken to have one frame
ROUNDING = 1e-9  # of the largest singular value


@dataclass(frozen=True, kw_only=True)
class SiteMaps:
    """Of one layer; `error` is the share of the target's variance that the worse one of the maps does not explain."""

    inputs: Map
    outputs: Float[Tensor, "target_out source_out"]  # sparse where rows go to other places
    error: float

    def carry(self, update: Factors) -> tuple[Factors, float]:
        """A P_in^T and P_out B; and the error, which is no less than the share of the update that is left out."""
        a, b = (factor.double() for factor in update)
        moved = a @ self.inputs.T, self.outputs @ b
        error = self.with_lost(*(float(inner_product(pair, pair)) for pair in (moved, (a, b))))
        return (moved[0].to(update[0]), moved[1].to(update[1])), error

    def with_lost(self, kept: float, whole: float) -> float:
        """The error, or the lost share of the update's squared length where that is more."""
        return max(self.error, 1 - kept / whole, 0.0) if whole else 0.0


def frame_map(own: Float[Tensor, "source k"], theirs: Float[Tensor, "target k"], shares: Float[Tensor, " k"]) -> Map:
    """From the orthonormal directions of the source to those of the target; the rest stays where these agree."""
    found = theirs @ own.T
    if own.shape == theirs.shape and shares @ (theirs * own).sum(0) >= AGREES * shares.sum():
        whole = torch.eye(len(own), dtype=own.dtype)
        found += (whole - theirs @ theirs.T) @ (whole - own @ own.T)
    return found


def svd(matrix: Float[Tensor, "rows columns"]) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors [rows, k], singular values that are more than rounding, right vectors [columns, k]."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    live = s > ROUNDING * s.max()
    return u[:, live], s[live], v[live].T


def procrustes(cross: Float[Tensor, "target source"]) -> Map:
    """The map P with orthonormal rows or columns of the largest <P, cross> (Schönemann 1966)."""
    u, s, v = svd(cross)
    return frame_map(v, u, s)


def frame_maps(source: Float[Tensor, "out_s in_s"], target: Float[Tensor, "out_t in_t"]) -> SiteMaps:
    """From the weights of a layer; ValueError where no side has one width in both, so that no sign is known.

    Exact where the target's inputs, or its outputs, are those of the source in a rotated frame. The error is that of
    the side that is compared: 1 - c^2, c the mean |cosine| of its vectors by their singular values.
    """
    (u, s, v), (u_t, s_t, v_t) = svd(source), svd(target)
    count = min(len(s), len(s_t))
    u, v, u_t, v_t = (vectors[:, :count] for vectors in (u, v, u_t, v_t))
    shares = s[:count] * s_t[:count]
    agree = [(theirs * own).sum(0) for own, theirs in ((u, u_t), (v, v_t)) if own.shape == theirs.shape]
    if not agree:
        raise ValueError(f"carry: a layer is {list(source.shape)} in one base and {list(target.shape)} in the other; "
                         "frames need one side of the same width")  # fmt: skip
    cosines = max(agree, key=lambda found: float(shares @ found.abs()))
    signs = torch.where(cosines < 0, -1.0, 1.0)
    maps = {"inputs": frame_map(v, v_t * signs, shares), "outputs": frame_map(u, u_t * signs, shares)}
    return SiteMaps(**maps, error=1 - float(shares @ cosines.abs() / shares.sum()) ** 2)


def token_maps(
    source: Float[Tensor, "source_tokens source_in"],
    target: Float[Tensor, "target_tokens target_in"],
    shared: Int[Tensor, "shared 2"],
    *,
    turn: bool = True,
) -> SiteMaps:
    """Of matrices with a row for each token; `shared` are the rows of a token in both.

    Every other token decides the map of the width, and the rest how well it fits; without `turn` it is the identity.
    ValueError for fewer than two tokens in each half.
    """
    if len(shared) < 4:
        raise ValueError(f"tokens: the two vocabularies have {len(shared)} tokens in common")
    own, theirs = shared.T
    sums = Covariance(), Covariance()
    for half, seen in enumerate(sums):
        seen.add(target[theirs[half::2]].double(), source[own[half::2]].double())
    fitted, held_out = (seen.exact() for seen in sums)
    inputs = procrustes(fitted) if turn else torch.eye(*fitted.shape, dtype=fitted.dtype)
    rows = torch.stack([theirs, own]), torch.ones(len(shared), dtype=torch.float64), (len(target), len(source))
    error = 1 - max(float((inputs * held_out).sum()), 0.0) ** 2
    return SiteMaps(inputs=inputs, outputs=torch.sparse_coo_tensor(*rows, check_invariants=False), error=error)


@torch.no_grad()
def activation_maps(
    source: nn.Module, target: nn.Module, layers: Mapping[str, tuple[int, int]], texts: Sequence[tuple[Seen, Seen]]
) -> Iterator[tuple[str, SiteMaps]]:
    """Of layers, with their shapes in the target, that both models have; from what both do on the same texts.

    A text is its ids and the positions that are compared, for the source and for the target. Every other text decides
    the maps, and the rest how well they fit: with fewer tokens than units any two models fit.
    """
    for group in groups({name: 16.0 * (out**2 + width**2) for name, (out, width) in layers.items()}):
        sums = {(name, side, half): Covariance() for name in group for side in (0, 1) for half in (0, 1)}
        for number, (ours, other) in enumerate(texts):
            own, theirs = seen_at(source, group, *ours), seen_at(target, group, *other)
            for name in group:
                for side in (0, 1):
                    sums[name, side, number % 2].add(theirs[name][side], own[name][side])
        for name in group:
            fitted, held_out = ([sums[name, side, half].exact() for side in (0, 1)] for half in (0, 1))
            maps = [procrustes(cross) for cross in fitted]
            fits = [float((map * cross).sum()) for map, cross in zip(maps, held_out, strict=True)]
            yield name, SiteMaps(inputs=maps[0], outputs=maps[1], error=1 - max(min(fits), 0.0) ** 2)


def seen_at(
    model: nn.Module, layers: Sequence[str], ids: Tensor, places: Sequence[int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs [place, unit] of the layers, at some places of one text."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = inputs[0].double().flatten(0, -2)[places], output.double().flatten(0, -2)[places]

    with ExitStack() as hooks:
        for name in layers:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(partial(keep, name)))
        model(input_ids=ids, use_cache=False)
    return seen
