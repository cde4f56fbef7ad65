"""The arithmetic of federation on tensors: server optimisers, control variates, robust means, exact sums of LoRA.

Averaging the factors of clients is not averaging their updates. With weights p_k that sum to 1

    sum_k p_k B_k A_k  =  B A  +  sum_k p_k (B_k - B)(A_k - A),     A = sum_k p_k A_k,  B = sum_k p_k B_k

and the second term, the covariance, is 0 where one factor is common to all: that is FFA-LoRA, RoLoRA and FedSA. `svd`,
`carry` and `stack` keep it. A pair of factors is (A [rank, in], B [out, rank]); every client has the same scaling.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moa.cli.ranges import Range
from moa.merging.core import Factors, LowRank, compress, inner_product, to_core
from moa.merging.methods.method import Method
from moa.merging.methods.stack import stack_of
from moa.merging.methods.table import check_options, find_method

State = dict[str, Tensor]
Number = float | int
READ_DEPTH = ("lines",)
SCAFFOLD = "scaffold"


# Server optimisers: the change of the mean client -> the step of the server, and the state of the piece.


def momentum(delta: Tensor, state: State, *, lr: Number = 1.0, beta: Number = 0.9) -> tuple[Tensor, State]:
    """FedAvgM (Hsu et al. 2019, arXiv 1909.06335): m = beta m + delta; the step is lr m."""
    m = beta * state.get("m", torch.zeros_like(delta)) + delta
    return lr * m, {"m": m}


def adam(
    delta: Tensor, state: State, *, lr: Number = 1e-3, beta1: Number = 0.9, beta2: Number = 0.99, tau: Number = 1e-3
) -> tuple[Tensor, State]:
    """FedAdam (Reddi et al. 2021, arXiv 2003.00295, algorithm 2): v = beta2 v + (1 - beta2) delta^2."""
    v = state.get("v", torch.full_like(delta, tau**2))
    return _adaptive(delta, state, beta2 * v + (1 - beta2) * delta.square(), lr, beta1, tau)


def yogi(
    delta: Tensor, state: State, *, lr: Number = 1e-3, beta1: Number = 0.9, beta2: Number = 0.99, tau: Number = 1e-3
) -> tuple[Tensor, State]:
    """FedYogi (the same): v = v - (1 - beta2) delta^2 sign(v - delta^2)."""
    v, square = state.get("v", torch.full_like(delta, tau**2)), delta.square()
    return _adaptive(delta, state, v - (1 - beta2) * square * (v - square).sign(), lr, beta1, tau)


def adagrad(
    delta: Tensor, state: State, *, lr: Number = 1e-3, beta1: Number = 0.9, tau: Number = 1e-3
) -> tuple[Tensor, State]:
    """FedAdagrad (the same): v = v + delta^2."""
    return _adaptive(delta, state, state.get("v", torch.full_like(delta, tau**2)) + delta.square(), lr, beta1, tau)


def _adaptive(delta: Tensor, state: State, v: Tensor, lr: Number, beta1: Number, tau: Number) -> tuple[Tensor, State]:
    """m = beta1 m + (1 - beta1) delta; the step is lr m / (sqrt(v) + tau), without bias correction."""
    m = beta1 * state.get("m", torch.zeros_like(delta)) + (1 - beta1) * delta
    return lr * m / (v.sqrt() + tau), {"m": m, "v": v}


def scaffold(delta: Tensor, state: State, *, clients: Number) -> tuple[Tensor, State]:
    """SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378, equation 5): the mean itself, and the control variate
    c + change / clients; `change` of the state is the sum of c_k' - c_k over the round's, `clients` are all.

    A client steps by -rate (c - c_k) after each step of its optimiser (equation 3).
    """
    return delta, {"c": state.get("c", torch.zeros_like(delta)) + state["change"] / clients}


def next_variate(
    start: Tensor, end: Tensor, server: Tensor | float | int, client: Tensor | float | int, lr_sum: Number
) -> Tensor:
    """The client's next control variate: c_k - c + (start - end) / (sum of its learning rates) (equation 4, II).

    The mean of its gradients, as the optimiser makes steps of them: with SGD the paper's.
    """
    return client - server + (start - end) / lr_sum


SERVERS: dict[str, Callable[..., tuple[Tensor, State]]] = {
    "momentum": momentum,
    "adam": adam,
    "yogi": yogi,
    "adagrad": adagrad,
    SCAFFOLD: scaffold,
}


# One client's update bounded, and means that a few wrong clients do not move far.


def shrink(norm: float, largest: Number) -> float:
    """What a change of this norm is multiplied by, so that it is no longer than `largest`."""
    return min(1.0, largest / norm) if norm > 0 else 1.0


def outliers(norms: Float[Tensor, " client"], most: Number) -> list[int]:
    """The clients whose norm is more than `most` deviations above the median, of logarithms, and twice the median.

    A deviation is 1.4826 median distances to the median, that of a normal distribution, which less than half of the
    clients cannot move (Hampel 1974, doi 10.2307/2285666). Norms of 0 are left out; of two clients none is far.
    """
    logs = norms[norms > 0].double().log()
    if len(logs) < 3:
        return []
    middle = logs.quantile(0.5)
    far = max(most * 1.4826 * float((logs - middle).abs().quantile(0.5)), math.log(2))
    return [place for place, own in enumerate(norms.tolist()) if own > 0 and math.log(own) - float(middle) > far]


def median(values: Float[Tensor, "client size"], weights: Float[Tensor, " client"]) -> Float[Tensor, " size"]:
    """Of each number (Yin et al. 2018, arXiv 1803.01498, definition 1); the mean of the middle two of an even count."""
    order, middle = values.sort(dim=0).values, (len(values) - 1) / 2
    return (order[int(middle)] + order[-1 - int(middle)]) / 2


def trimmed_mean(
    values: Float[Tensor, "client size"], weights: Float[Tensor, " client"], *, share: Number = 0.1
) -> Float[Tensor, " size"]:
    """The mean of each number without its `share` largest and smallest (Yin et al. 2018, definition 2)."""
    check_values({"share": share})
    cut = int(share * len(values))
    return values.sort(dim=0).values[cut : len(values) - cut].mean(dim=0)


def krum(
    values: Float[Tensor, "client size"], weights: Float[Tensor, " client"], *, wrong: Number = 1, chosen: Number = 1
) -> Float[Tensor, " size"]:
    """The mean of the `chosen` clients nearest to their neighbours (Blanchard et al. 2017, arXiv 1703.02757).

    A client's score is the sum of its squared distances to the count - wrong - 2 nearest others; up to `wrong` clients
    may send anything. One chosen client is Krum, more is multi-Krum.
    """
    count, wrong, chosen = len(values), int(wrong), int(chosen)
    if count < 2 * wrong + 3:
        raise ValueError(f"options.wrong: krum needs 2 wrong + 3 clients, got {count} for wrong={wrong}")
    if not 1 <= chosen <= count - wrong:
        raise ValueError(f"options.chosen: must be in 1..{count - wrong}, got {chosen}")
    apart = distances(values).square().fill_diagonal_(torch.inf)
    scores = apart.sort(dim=1).values[:, : count - wrong - 2].sum(dim=1)
    return values[scores.argsort(stable=True)[:chosen]].mean(dim=0)


def geometric_median(
    values: Float[Tensor, "client size"], weights: Float[Tensor, " client"], *, steps: Number = 100
) -> Float[Tensor, " size"]:
    """The point of least weighted distance, by Weiszfeld's steps (RFA, Pillutla et al. 2022, arXiv 1912.13445)."""
    shares = weights / weights.sum()
    point = shares @ values
    floor = 1e-6 * float((values - point).norm(dim=1).max())
    for _ in range(int(steps) if floor > 0 else 0):
        pull = shares / (values - point).norm(dim=1).clamp(min=floor)
        point = (pull / pull.sum()) @ values
    return point


def distances(values: Float[Tensor, "client size"]) -> Float[Tensor, "client client"]:
    return torch.stack([(values - own).norm(dim=1) for own in values])


# A rule takes (the values of a role, a row a client; weights); of these `UNWEIGHTED` read no weights.
ROBUST: dict[str, Callable[..., Tensor]] = {
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
    "geometric_median": geometric_median,
}
BY_NUMBER = ("median", "trimmed_mean")  # of each number apart
UNWEIGHTED = ("sum", "median", "trimmed_mean", "krum")


# What the options of rules and server optimisers may be, with any number of clients.
RANGES = {
    **dict.fromkeys(("lr", "tau", "ratio"), Range(above=0)),
    **dict.fromkeys(("beta", "beta1", "beta2"), Range(0, below=1)),
    "share": Range(0, below=0.5),
    "wrong": Range(0),
    **dict.fromkeys(("chosen", "steps", "clients"), Range(1)),
}
WHOLE = ("wrong", "chosen", "steps", "clients")


def check_values(options: Mapping[str, Any]) -> None:
    """ValueError for a value that an option cannot have."""
    for key, value in options.items():
        whole, rule = key in WHOLE, "a whole number" if key in WHOLE else "a number"
        number = isinstance(value, int | float) and not isinstance(value, bool)
        broken = RANGES[key].broken_by(value) if number else ""
        if broken is not None or (whole and not float(value).is_integer()):
            raise ValueError(f"options.{key}: must be {rule}{f', {broken}' if broken else ''}, got {value!r}")


def least_clients(rule: str, options: Mapping[str, Any]) -> int:
    """With fewer in a round a rule moves nothing."""
    wrong, chosen = int(options.get("wrong", 1)), int(options.get("chosen", 1))
    return max(2 * wrong + 3, wrong + chosen) if rule == "krum" else 1


def nearest_weights(
    apart: Float[Tensor, "client client"], *, own: Number = 0.5, nearest: Number = 3
) -> Float[Tensor, "client client"]:
    """Row k: how much client k takes of each client, after Pilot's adaptive transfer (arXiv 2501.13985).

    `own` of its own, the rest of the `nearest` others as 1 / distance; all of its own where there is no other. As
    published, a number of samples and 1 / distance are normalised together, and the neighbours get nearly nothing.
    """
    count = len(apart)
    others = min(int(nearest), count - 1)
    if others == 0:
        return torch.eye(count, dtype=apart.dtype)
    near = apart.clone().fill_diagonal_(torch.inf)
    found = near.topk(others, dim=1, largest=False)
    pull = 1 / found.values.clamp(min=1e-12 * float(apart.max()) or 1.0)
    rest = (1 - own) * pull / pull.sum(dim=1, keepdim=True)
    return (own * torch.eye(count, dtype=apart.dtype)).scatter_add(1, found.indices, rest)


# LoRA: a pair of factors for each client.


def moving_factors(how: str, round_: int) -> str:
    """The factors that clients train in a round, counted from 1, for a mean of factors to be exact.

    freeze_a   B in every round, A stays as all clients drew it (FFA-LoRA, arXiv 2403.12313)
    alternate  B in odd rounds, A in even ones (RoLoRA, arXiv 2502.01755)
    both       A and B: the mean of factors leaves the covariance out
    """
    table = {"freeze_a": "B", "alternate": "B" if round_ % 2 else "A", "both": "AB"}
    if how not in table:
        raise ValueError(f"factors: must be one of {list(table)}, got {how!r}")
    return table[how]


def shares_of(weights: Sequence[Number]) -> list[float]:
    total = sum(weights)
    return [weight / total for weight in weights]


def mean_factors(pairs: Sequence[Factors], weights: Sequence[Number]) -> Factors:
    """A and B averaged apart, as FedAvg does."""
    shares = shares_of(weights)
    a = sum((p * a for p, (a, _) in zip(shares, pairs, strict=True)), start=torch.zeros(()))
    b = sum((p * b for p, (_, b) in zip(shares, pairs, strict=True)), start=torch.zeros(()))
    return torch.as_tensor(a), torch.as_tensor(b)


def stack(pairs: Sequence[Factors], weights: Sequence[Number]) -> Factors:
    """The mean update exactly, at the sum of the ranks: all A, and all p_k B (FLoRA, arXiv 2409.05976)."""
    shares = shares_of(weights)
    b = torch.cat([p * b for p, (_, b) in zip(shares, pairs, strict=True)], dim=1)
    return torch.cat([a for a, _ in pairs]), b


def covariance(pairs: Sequence[Factors], weights: Sequence[Number]) -> Factors:
    """What the mean of factors leaves out of the mean update, as factors: sum_k p_k (B_k - B)(A_k - A)."""
    mean_a, mean_b = mean_factors(pairs, weights)
    return stack([(a - mean_a, b - mean_b) for a, b in pairs], weights)


def covariance_norms(pairs: Sequence[Factors], weights: Sequence[Number]) -> tuple[float, float]:
    """The squared norms of the covariance and of the mean update."""
    left_out, whole = covariance(pairs, weights), stack(pairs, weights)
    return float(inner_product(left_out, left_out).clamp(min=0)), float(inner_product(whole, whole).clamp(min=0))


def svd(pairs: Sequence[Factors], weights: Sequence[Number], rank: int) -> LowRank:
    """The best approximation of the mean update at a rank, of any factoring and ranks (FlexLoRA, arXiv 2402.11505)."""
    return fit([(a, p * b) for p, (a, b) in zip(shares_of(weights), pairs, strict=True)], rank)


def fit(pairs: Sequence[Factors], rank: int | str) -> LowRank:
    """The best approximation of the sum of updates at a rank."""
    updates = to_core(pairs, canonical=False)
    return compress(updates, updates.cores.sum(0), rank, sum(len(a) for a, _ in pairs))


def carry(
    pairs: Sequence[Factors], weights: Sequence[Number], carried: Factors, *, ratio: Number = 1
) -> tuple[Factors, LowRank]:
    """The mean factors, and the frozen always-on expert `carried` with the covariance added (FedEx-LoRA, 2410.09432).

    FedEx adds it to the base; here the base never changes. The expert keeps its rank, and what that cuts off is `lost`
    of the result. `ratio` is the scaling of the clients' expert over that of `carried`.
    """
    a, b = covariance(pairs, weights)
    return mean_factors(pairs, weights), fit([carried, (a, ratio * b)], len(carried[0]))


def fold(pairs: Sequence[Factors], weights: Sequence[Number], carried: Factors, *, ratio: Number = 1) -> LowRank:
    """The frozen always-on expert `carried` with the whole mean update added, at its rank (FLoRA, arXiv 2409.05976)."""
    a, b = stack(pairs, weights)
    return fit([carried, (ratio * a, b)], len(carried[0]))


def padded(low: LowRank, like: Factors) -> Factors:
    """The factors of a result in the shapes of `like`, whose A stays where B is 0: a rank of zeros never learns."""
    a, b = like[0].to(low.lora_a.dtype).clone(), torch.zeros_like(like[1], dtype=low.lora_b.dtype)
    values = low.singular_values
    live = int((values > torch.finfo(values.dtype).eps * len(values) * values.max()).sum())
    a[:live], b[:, :live] = low.lora_a[:live], low.lora_b[:, :live]
    return a, b


def merge(
    pairs: Sequence[Factors],
    weights: Sequence[Number],
    rank: int | str,
    *,
    method: str,
    options: Mapping[str, Any] | None = None,
    site: str = "",
    depth: float | None = None,
    start: Factors | None = None,
) -> LowRank:
    """`start` and the clients' changes from it, merged by a method of `moa.merging` in core space; None: 0.

    One round is a merge after training; more are rounds of train and merge (METIS, Im et al. 2026, arXiv 2606.16501).
    Weights are the shares of their sum, times the number of clients for a method that adds updates up with weight 1.
    `depth` is the site's place among the layers, 0 to 1.
    """
    row, own_options = check_merge(method, options or {}, depth)
    scale = len(pairs) if row.weights == "ones" else 1
    since = start if start is not None and bool(start[1].any()) else None
    updates = to_core(pairs, canonical=not row.is_sum, since=since)
    names = tuple(f"client {number}" for number in range(len(pairs)))
    stacked = stack_of(site=site, experts=names, matrices=updates.cores, depth=depth or 0.0)
    own = torch.tensor([scale * p for p in shares_of(weights)], dtype=updates.cores.dtype)
    merged = row.function(stacked, own, **own_options)
    if since is None:
        return compress(updates, merged, rank, sum(len(a) for a, _ in pairs))
    change = compress(updates, merged, "sum", max(merged.shape))
    return fit([since, (change.lora_a, change.lora_b)], rank)


def check_merge(method: str, options: Mapping[str, Any], depth: float | None = None) -> tuple[Method, dict[str, Any]]:
    """A method of one site's updates in core space, and all its options; ValueError for another."""
    row, own = find_method(method, "core"), check_options(method, options)
    if row.reads_inputs or own.get("scope") == "model" or (method in READ_DEPTH and depth is None):
        raise ValueError(f"rule: merge:{method} reads more than the clients' updates of one site")
    return row, own
