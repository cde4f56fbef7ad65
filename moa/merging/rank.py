"""The rank of a merge as a user writes it: a number, sum, or energy:0.99."""

from typing import Any

ENERGY_PREFIX = "energy:"


def parse_rank(rank: Any) -> int | str:
    """`rank` as the number, "sum" or "energy:x" that it means; ValueError with the choices."""
    text = str(rank).strip()
    if text.isdigit() and int(text) > 0:
        return int(text)
    if text.startswith(ENERGY_PREFIX):
        parse_energy(text)
    elif text != "sum":
        raise ValueError(f"rank: must be a positive number, 'sum' or 'energy:0.99', got {rank!r}")
    return text


def parse_energy(rank: str) -> float:
    """The share x of "energy:x"."""
    try:
        share = float(rank.removeprefix(ENERGY_PREFIX))
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"rank: the x of 'energy:x' must be in (0, 1], got {rank!r}")
    return share
