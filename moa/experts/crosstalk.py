"""How strongly experts answer to each other's inputs: what decides how well they merge.

    P = mean over sites and ordered pairs j != k of  E |dW_j x_k|^2 / E |dW_k x_k|^2

x_k are the inputs of a site on the samples of expert k, with the gates that they have. At 1 another expert changes a
sample's outputs as much as its own does; a sum of experts with small P does what each of them does. No out-sized tensor
is needed, as |dW_j x|^2 = u^T (B_j^T B_j) u with u = A_j x. Orthogonal weights say little: the inputs decide.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moa.experts.lora_product import FactorsA, FactorsB
from moa.packing import Owners, Tokens

Tables = Float[Tensor, "site owner expert"]
Counted = Bool[Tensor, " expert"]  # False for always-on experts, which are meant to answer all


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What the sites of a forward are to measure, and what they found: energies [*lead, expert] by site.

    `penalties` are losses of moa/experts/penalties.py, which every site computes, of the `routed` experts where they
    are about pairs; `tasks` are those of each stream's rows or tokens.
    """

    sites: frozenset[str]
    gradient: bool  # to the factors, for a penalty
    found: dict[str, Tensor] = field(default_factory=dict)
    penalties: tuple[str, ...] = ()
    routed: frozenset[str] = frozenset()
    tasks: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, list[Tensor]] = field(default_factory=dict)  # penalty -> of each site that has it

    def tasks_at(self, stream: str, x: Float[Tensor, "*lead in"]) -> Int[Tensor, " token"]:
        own = self.tasks[stream]
        return own.reshape(*own.shape, *[1] * (x.dim() - 1 - own.dim())).expand(x.shape[:-1]).flatten()


def output_energies(
    x: Float[Tensor, "*lead in"], factors_a: FactorsA, factors_b: FactorsB, scalings: Sequence[float]
) -> Float[Tensor, "*lead expert"]:
    """|scaling_j B_j A_j x|^2 of every token and expert, in float32; x gets no gradient."""
    a = torch.cat(tuple(factors_a)).to(x.dtype)
    hidden = F.linear(x.detach(), a).float().split([len(factor) for factor in factors_a], -1)
    with torch.autocast(x.device.type, enabled=False):
        grams = [scaling**2 * b.float().T @ b.float() for b, scaling in zip(factors_b, scalings, strict=True)]
        return torch.stack([((u @ gram) * u).sum(-1) for u, gram in zip(hidden, grams, strict=True)], -1)


def energy_tables(
    energies: Mapping[str, Float[Tensor, "*_ expert"]],
    streams: Mapping[str, str],
    token_samples: Tokens,
    owners: Owners,
    expert_ids: Int[Tensor, " batch"],
) -> Tables:
    """Sums of each site's energies over the tokens of each expert's samples.

    `token_samples` names the sample of each token of the text stream, -1 at padding; `owners` that of each row of the
    other streams, -1 for none. Samples of no known expert count for nothing.
    """
    members: dict[tuple[str, torch.Size], Tensor] = {}
    tables = []
    for site, found in energies.items():
        found = found if found.dim() == 3 else found[:, None]
        key = streams[site], found.shape
        if key not in members:
            samples = token_samples if key[0] == "text" else owners[key[0]][:, None].expand(found.shape[:2])
            ids = torch.where(samples >= 0, expert_ids[samples.clamp(min=0)], -1).flatten()
            count = found.shape[-1]  # the null expert's id is behind the last one's
            members[key] = F.one_hot(ids + 1, count + 2)[:, 1:-1].to(found.dtype)
        tables.append(members[key].T @ found.flatten(0, 1))
    return torch.stack(tables)


def ratios(tables: Tables, counted: Counted) -> tuple[Tables, Bool[Tensor, "site owner expert"]]:
    """E |dW_j x_k|^2 / E |dW_k x_k|^2 at [site, k, j], and where there is such a pair. The denominator gets no
    gradient: an expert is not to grow. A k without samples or without any effect has no pair."""
    own = tables.detach().diagonal(dim1=1, dim2=2)[..., None]
    others = ~torch.eye(len(counted), dtype=torch.bool, device=tables.device)
    pairs = (own > 0) & others & counted & counted[:, None]
    return tables / own.where(own > 0, 1.0), pairs


def crosstalk(tables: Tables, counted: Counted) -> Float[Tensor, ""]:
    """P, the mean over sites and pairs; 0, and still connected to the factors, without a pair."""
    found, pairs = ratios(tables, counted)
    return found.where(pairs, 0.0).sum() / pairs.sum().clamp(min=1)


def crosstalk_by_pair(tables: Tables, counted: Counted, names: Sequence[str]) -> dict[str, float]:
    """`crosstalk`, P, and `crosstalk/<j>/<k>`, expert j on the samples of k, its mean over sites; empty without one."""
    found, pairs = ratios(tables, counted)
    number = pairs.sum(0)
    means = (found.where(pairs, 0.0).sum(0) / number.clamp(min=1)).tolist()
    values = {
        f"crosstalk/{other}/{own}": means[k][j]
        for k, own in enumerate(names)
        for j, other in enumerate(names)
        if number[k, j]
    }
    return {"crosstalk": float(crosstalk(tables, counted)), **values} if values else {}
