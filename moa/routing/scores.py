"""How a router compares features with each expert's row of weights: a row per score.

    linear      w_e x (+ b_e)
    cosine      t cos(w_e, x), with the temperature t = the root mean square of the rows' lengths, at most 100: the
                cosine router of GMoE (arXiv 2206.04046, eq. 8) and DG-MoA, whose learned t is a number of its own
    ln_cosine   LN(w_e) LN(x) / sqrt(width), layer norms without parameters: PHATGOOSE (arXiv 2402.05859, section 3.2)
    arrow       |w_e x|, where w_e is no parameter but computed from the expert: moa/experts/token_routers.py
    attention   w_e x, where x is a token's query and w_e the key of what the expert answers to this token:
                AdapterFusion (arXiv 2005.00247, section 3.2)

The last layer of a sample's router and the token routers of the sites read this table, and so does the config.
"""

from collections.abc import Callable

from jaxtyping import Float

from moa.routing.late import F, Tensor, torch

Features = Float[Tensor, "*lead width"]
Weight = Float[Tensor, "expert width"]
Logits = Float[Tensor, "*lead expert"]
MOST = 100.0  # of a temperature


def linear(features: Features, weight: Weight) -> Logits:
    return F.linear(features, weight)


def cosine(features: Features, weight: Weight) -> Logits:
    temperature = weight.square().sum(-1).mean().sqrt().clamp(max=MOST)
    return temperature * F.linear(F.normalize(features, dim=-1, eps=1e-6), F.normalize(weight, dim=-1, eps=1e-6))


def ln_cosine(features: Features, weight: Weight) -> Logits:
    width = weight.shape[-1:]
    return F.linear(F.layer_norm(features, width), F.layer_norm(weight, width)) / width[0] ** 0.5


def arrow(features: Features, weight: Weight) -> Logits:
    return linear(features, weight).abs()


def attention(features: Features, weight: Float[Tensor, "*#lead expert width"]) -> Logits:
    return torch.einsum("...w,...ew->...e", features, weight)


ARROW, ATTENTION = "arrow", "attention"
SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": linear,
    "cosine": cosine,
    "ln_cosine": ln_cosine,
    ARROW: arrow,
    ATTENTION: attention,
}
