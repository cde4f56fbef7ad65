"""Privacy of clients: noise on what they send in a round, what all rounds spend, what secure aggregation would allow.

DP-FedAvg of clients (McMahan et al. 2018, arXiv 1710.06963). A client's change, of all roles together, has at most the
norm C. Noise N(0, (z C)^2) is added to the sum of the changes, and the sum is divided by the expected number of
clients, which no client's data changes:

    value + (sum_k change_k min(1, C / |change|) + z C noise) / expected

So one client more or less moves the sum by C at most, and a round is a Gaussian mechanism of multiplier z. Each client
takes part by a draw of its own (Poisson), which the accountant counts on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moa.federated.role import STREAMED, Role

ORDERS = (*range(2, 64), 128, 256, 512)  # of Renyi divergences; whole numbers have an exact formula


@dataclass(frozen=True, kw_only=True)
class Privacy:
    clip: float
    noise: float  # over `clip`
    expected: Mapping[str, float]  # by piece that moves in this round: clients that it has on average, 1 for a sum
    rng: np.random.Generator

    def value(self, piece: str, start: Tensor, total: Tensor | None, clients: int) -> Tensor:
        """A piece after the round; `total` is the sum of the values of so many clients, None where there is none."""
        before = start.double()
        if piece not in self.expected:
            return before
        change = torch.zeros_like(before) if total is None else total - clients * before
        noise = torch.from_numpy(self.rng.standard_normal(tuple(start.shape)))
        return before + (change + self.clip * self.noise * noise) / self.expected[piece]


def spent(noise: float, participation: float, rounds: int, delta: float) -> float:
    """The epsilon of so many rounds, of one client more or less; ValueError without the package that computes it."""
    try:
        from dp_accounting import dp_event, rdp
    except ImportError:
        raise ValueError("privacy: needs the package dp-accounting (pip install moa[privacy])") from None
    event = dp_event.GaussianDpEvent(noise)
    if participation < 1:
        event = dp_event.PoissonSampledDpEvent(participation, event)
    accountant = rdp.RdpAccountant(orders=ORDERS)
    accountant.compose(event, rounds)
    return float(accountant.get_epsilon(delta))


def reads_single(role: Role) -> str | None:
    """Why a role could not run under secure aggregation, where a server sees sums alone; None if it could."""
    if role.rule not in STREAMED:
        return f"{role.rule} reads the values of each client"
    if role.scope == "per_client":
        return "its value is that of one client"
    return "the server clips each client's change" if role.clip is not None else None


def secure_line(roles: Sequence[Role], others: Sequence[str]) -> str:
    """Which roles could run under secure aggregation; `others` are settings that read single updates of all roles."""
    sent = [role for role in roles if not role.keep]
    reasons = {role.name: ", ".join([*filter(None, [reads_single(role)]), *others]) for role in sent}
    could = [name for name, reason in reasons.items() if not reason]
    not_so = [f"{name} ({reason})" for name, reason in reasons.items() if reason]
    parts = [f"for {', '.join(could)}"] * bool(could) + [f"not for {', '.join(not_so)}"] * bool(not_so)
    return f"secure aggregation, of which only sums reach a server, would do {'; '.join(parts) or 'without any role'}"
