"""Sequences of unequal length as rows of a tensor: padded, or several samples in one row."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


def pad(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """`[rows, longest]` int64 and its bool mask; at least one column, so that no axis is empty."""
    longest = max(1, *map(len, rows))
    padded = np.full((len(rows), longest), value, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=bool)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), longest) if left else slice(len(row))
        padded[i, where], mask[i, where] = row, True
    return torch.from_numpy(padded), torch.from_numpy(mask)


def fill_rows(lengths: Sequence[int], capacity: int) -> list[range]:
    """Samples in their order in as few rows of `capacity` tokens as hold them, evenly filled.

    Evenly, because all rows are padded to the longest one: the smallest capacity is taken that
    needs no more rows.
    """
    few = len(fill_in_turn(lengths, capacity))
    possible = range(max(lengths), capacity)
    even = bisect_left(possible, True, key=lambda c: len(fill_in_turn(lengths, c)) <= few)
    return fill_in_turn(lengths, even + max(lengths))


def fill_in_turn(lengths: Sequence[int], capacity: int) -> list[range]:
    """Each sample in the row of the one before it while they fit; none is cut."""
    firsts, filled = [0], 0
    for number, length in enumerate(lengths):
        if filled and filled + length > capacity:
            firsts.append(number)
            filled = 0
        filled += length
    return [range(*pair) for pair in pairwise([*firsts, len(lengths)])]


def joined(sequences: Sequence[Sequence[int]], rows: Sequence[range]) -> list[list[int]]:
    """The sequences of each row, one behind the other."""
    return [[token for number in row for token in sequences[number]] for row in rows]
