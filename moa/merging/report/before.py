"""What of the experts themselves makes their merge poor, measured before it: their lengths and directions.

Experts of unequal length: the longest decides every sum (DisTaC, 2508.01148). Updates along one direction add up to
more than any expert does, or undo each other. Experts that read the same inputs, as those of one frozen A do, all
answer each other's samples (LoRI, 2504.07448, draws each A anew).
"""

import itertools
from collections.abc import Iterator, Sequence

import torch

from moa.merging.adapters import Expert, all_sites, factors_of
from moa.merging.core import inner_product

LENGTHS = 2.0  # of the longest and the shortest
ALIKE = 0.5  # cosine of two updates, and common share of what they read


def warnings_before(experts: Sequence[Expert]) -> Iterator[str]:
    """One line for each finding above its limit, with the numbers."""
    count = len(experts)
    gram, common, sites = (
        torch.zeros(count, count).double(),
        torch.zeros(count, count).double(),
        torch.zeros(count, count),
    )
    for site in all_sites(experts):
        factors = factors_of(experts, site)
        frames = [torch.linalg.qr(pair[0].T).Q if pair else None for pair in factors]
        for i, (own, reads) in enumerate(zip(factors, frames, strict=True)):
            for j in range(i, count):
                other, also = factors[j], frames[j]
                if own is None or other is None or reads is None or also is None:
                    continue
                gram[i, j] += inner_product(own, other)
                common[i, j] += (reads.T @ also).square().sum() / min(reads.shape[1], also.shape[1])
                sites[i, j] += 1
    names, lengths = [expert.name for expert in experts], gram.diagonal().sqrt()
    live = lengths[lengths > 0]
    if len(live) and (ratio := float(live.max() / live.min())) > LENGTHS:
        each = ", ".join(f"{name} {float(length):.2g}" for name, length in zip(names, lengths, strict=True))
        yield f"warning: the longest update is {ratio:.1f} times the shortest ({each}), and decides a sum"
    for i, j in itertools.combinations(range(count), 2):
        cosine = float(gram[i, j] / (lengths[i] * lengths[j]).clamp(min=torch.finfo(gram.dtype).tiny))
        pair = f"warning: {names[i]} and {names[j]}"
        if abs(cosine) > ALIKE:
            effect = "a sum goes too far along what they share" if cosine > 0 else "a sum undoes what they do"
            yield f"{pair} have cosine {cosine:.2f}: {effect}"
        if sites[i, j] and (share := float(common[i, j] / sites[i, j])) > ALIKE:
            yield f"{pair} read the same inputs (common share {share:.2f}), so each answers the other's samples"
