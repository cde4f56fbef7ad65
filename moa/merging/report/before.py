"""What of the experts themselves makes their merge poor, measured before it: their lengths and directions.

Experts of unequal length: the longest decides every sum (DisTaC, 2508.01148). Updates along one direction add up to
more than any expert does, or undo each other. Experts that read the same inputs, as those of one frozen A do, all
answer each other's samples (LoRI, 2504.07448, draws each A anew).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch

from moa.merging.adapters import Expert, all_sites, factors_of
from moa.merging.core import inner_product

LENGTHS = 2.0  # of the longest and the shortest
ALIKE = 0.5  # cosine of two updates, and common share of what they read
ROUNDING = 1e-6  # of weights


def warnings_before(experts: Sequence[Expert], added: Mapping[str, float]) -> Iterator[str]:
    """One line for each finding above its limit, with the numbers of the worst pair.

    `added` are the largest weights of experts that are plainly added up: where two of them are 1 or less together, as
    in a mean, a common direction is as long as it was.
    """
    count = len(experts)
    gram, common, sites = (torch.zeros(count, count, dtype=torch.float64) for _ in range(3))
    for site in all_sites(experts):
        own = {i: (pair, torch.linalg.qr(pair[0].T).Q) for i, pair in enumerate(factors_of(experts, site)) if pair}
        for i, j in itertools.combinations_with_replacement(own, 2):
            (one, reads), (other, also) = own[i], own[j]
            gram[i, j] += inner_product(one, other)
            common[i, j] += (reads.T @ also).square().sum() / min(reads.shape[1], also.shape[1])
            sites[i, j] += 1
    names, lengths = [expert.name for expert in experts], gram.diagonal().sqrt()
    live = lengths[lengths > 0]
    if len(live) and (ratio := float(live.max() / live.min())) > LENGTHS:
        each = ", ".join(f"{name} {float(length):.2g}" for name, length in zip(names, lengths, strict=True))
        yield f"warning: the longest update is {ratio:.1f} times the shortest ({each}), and decides a sum"
    cosines = gram / (lengths[:, None] * lengths).clamp(min=torch.finfo(gram.dtype).tiny)
    shares = common / sites.clamp(min=1)
    alike, against, same = dict[str, float](), dict[str, float](), dict[str, float]()
    for i, j in itertools.combinations(range(count), 2):
        pair, cosine, share = f"{names[i]} and {names[j]}", float(cosines[i, j]), float(shares[i, j])
        if cosine > ALIKE and added.get(names[i], 0.0) + added.get(names[j], 0.0) > 1 + ROUNDING:
            alike[pair] = cosine
        if cosine < -ALIKE:
            against[pair] = cosine
        if share > ALIKE and abs(cosine) <= ALIKE:  # updates that are alike read alike
            same[pair] = share
    yield from told(alike, "have cosine", "a sum goes too far along what they share")
    yield from told(against, "have cosine", "a sum undoes what they do")
    yield from told(same, "read the same inputs, with a common share of", "each answers the other's samples")


def told(pairs: Mapping[str, float], what: str, effect: str) -> Iterator[str]:
    """A line with the pair of the largest value, and the number of the others."""
    if pairs:
        worst = max(pairs, key=lambda pair: abs(pairs[pair]))
        others = f" (and {len(pairs) - 1} other pairs above {ALIKE})" if pairs.keys() - {worst} else ""
        yield f"warning: {worst} {what} {pairs[worst]:.2f}{others}: {effect}"
