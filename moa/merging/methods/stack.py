"""The experts' updates of one site side by side, read in blocks of rows, so that memory is one block's.

A method gets a Stack, whether its rows are those of the small core matrices, of the dense updates
of a LoRA, or of two checkpoints on disk. Nothing here depends on the size of the blocks, nor on the order of experts.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

BLOCK_VALUES = 1 << 18  # of one expert in a block
# A float's bits, read as a whole number, have the order of its magnitude; a pass reads 16 of them.
WHOLE = {torch.float64: torch.int64, torch.float32: torch.int32}
DIGITS = 1 << 16
# Products and rotations leave values off by some steps of the dtype, of their matrix's norm; up to 8 were seen.
ROUNDING = 100


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One matrix [rows, cols] of each expert."""

    site: str
    experts: tuple[str, ...]
    ranks: tuple[int, ...]  # of each expert's update here; 0 where it has none
    shape: tuple[int, int]  # rows, cols
    read: Callable[[int, int], Float[Tensor, "expert _ cols"]]  # rows start to stop of every expert
    depth: float = 0.0  # of the site's block among the model's: 0 the first, 1 the last
    block_rows: int = 0  # 0: as many as make BLOCK_VALUES
    # The second moments of an expert's inputs, by its number, in the axes of the columns: for methods that read them.
    inputs: Callable[[int], Float[Tensor, "cols cols"]] | None = None
    # How far each expert's values may be off, if they were computed: of its size, not of theirs. None: as read.
    rounding: Float[Tensor, " expert"] | None = None

    def blocks(self) -> Iterator[tuple[int, Float[Tensor, "expert _ cols"]]]:
        """(first row, block), from the top to the bottom."""
        rows, cols = self.shape
        step = self.block_rows or max(1, BLOCK_VALUES // cols)
        for start in range(0, rows, step):
            yield start, self.read(start, min(start + step, rows))

    def whole(self) -> Float[Tensor, "expert rows cols"]:
        return self.read(0, self.shape[0])

    def map(
        self, merge_block: Callable[[int, Float[Tensor, "expert _ cols"]], Float[Tensor, "_ cols"]]
    ) -> Float[Tensor, "rows cols"]:
        """The merged matrix, one block after the other by `merge_block(first row, block)`."""
        merged: Tensor | None = None
        for start, block in self.blocks():
            rows = merge_block(start, block)
            if merged is None:
                merged = rows.new_empty(self.shape)
            merged[start : start + len(rows)] = rows
        assert merged is not None, f"{self.site} has no rows"
        return merged

    def moments(self, expert: int) -> Float[Tensor, "cols cols"]:
        """The second moments of an expert's inputs; the plan sees to it that a method which reads them has them."""
        assert self.inputs is not None, f"{self.site}: no inputs"
        return self.inputs(expert)

    def thresholds(self, density: float) -> Float[Tensor, " expert"]:
        """Each expert's magnitude at and above which int(density * size) + 1 of its values are."""
        return magnitudes_above([self], density)

    def uniform(self, seed: int, expert: int, start: int, count: int) -> Float[Tensor, "count cols"]:
        """Uniform numbers in [0, 1) for some rows, keyed by (seed, expert's name, site, row)."""
        name = f"{seed}\0{self.experts[expert]}\0{self.site}".encode()
        key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
        streams = (np.random.Philox(key=key, counter=[0, row, 0, 0]) for row in range(start, start + count))
        rows = [np.random.Generator(stream).random(self.shape[1], dtype=np.float32) for stream in streams]
        return torch.from_numpy(np.stack(rows))


def stack_of(site: str, experts: tuple[str, ...], matrices: Float[Tensor, "expert rows cols"], **more: object) -> Stack:
    """A stack of matrices in memory."""
    rows, cols = matrices.shape[1:]
    ranks = tuple(min(rows, cols) for _ in experts)
    about = {"ranks": ranks, "rounding": rounding_of(matrices.flatten(1).norm(dim=1)), **more}
    return Stack(
        site=site,
        experts=experts,
        shape=(rows, cols),
        read=lambda start, stop: matrices[:, start:stop],
        **about,  # type: ignore[arg-type]
    )


def rounding_of(norms: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """How far the values of matrices of these norms may be off after products and rotations."""
    return ROUNDING * torch.finfo(norms.dtype).eps * norms


def magnitudes_above(stacks: list[Stack], density: float) -> Float[Tensor, " expert"]:
    """Each expert's threshold over all the stacks together: it keeps int(density * size) + 1 values, and ties.

    As TIES trims (Yadav et al. 2023, released code). Exact by a radix selection: every pass over the blocks fixes 16
    more bits of the threshold, so memory is one block and a table of counts.
    """
    size = sum(stack.shape[0] * stack.shape[1] for stack in stacks)
    num_experts = len(stacks[0].experts)
    wanted = max(size - int(size * density), 1)  # the wanted-th smallest magnitude, from 1
    left = torch.full((num_experts,), wanted, dtype=torch.int64)
    prefix = torch.zeros(num_experts, dtype=torch.int64)
    dtype = next(stacks[0].blocks())[1].dtype
    width = 8 * dtype.itemsize
    for shift in range(width - 16, -1, -16):
        counts = torch.zeros(num_experts, DIGITS, dtype=torch.int64)
        for stack in stacks:
            for _, block in stack.blocks():
                _count_digits(block, prefix, shift, width, counts)
        below = counts.cumsum(1)
        digit = (below < left[:, None]).sum(1)
        left -= torch.where(digit > 0, below.gather(1, (digit - 1).clamp(min=0)[:, None])[:, 0], 0)
        prefix = (prefix << 16) | digit
    return prefix.to(WHOLE[dtype]).view(dtype)


def _count_digits(block: Tensor, prefix: Tensor, shift: int, width: int, counts: Tensor) -> None:
    """Add to `counts` the next 16 bits of all magnitudes that begin with their expert's prefix."""
    bits = block.abs().contiguous().view(WHOLE[block.dtype])
    for expert, of_expert in enumerate(bits.flatten(1)):
        if shift < width - 16:
            of_expert = of_expert[(of_expert >> (shift + 16)) == prefix[expert]]
        counts[expert] += torch.bincount((of_expert >> shift) & (DIGITS - 1), minlength=DIGITS)
