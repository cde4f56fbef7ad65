"""LoRA as a kind of expert: a fresh start, a state, and a plain PEFT folder's tensors and settings."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moa.experts.lora import ExpertLinear
from moa.experts.starts import STARTS, Starts
from moa.files.peft import site_keys
from moa.files.peft_config import ADAPTER, site_scaling

Sites = Mapping[str, ExpertLinear]
Factors = Mapping[str, Float[Tensor, "_ _"]]  # by PEFT key


def scaling_of(rank: int, alpha: float | int, use_rslora: bool) -> float:
    """The factor before B A: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def fresh(
    sites: Sites,
    name: str,
    *,
    rank: int,
    alpha: float | int,
    use_rslora: bool = False,
    seed: int = 0,
    starts: Starts | None = None,
) -> dict[str, Any]:
    """Put an expert that changes no output yet at all these sites; returns what it was made with.

    `starts` has its start, see `moa.experts.starts`; the default is PEFT's, drawn from (seed, name, site), whatever
    the device and order.
    """
    if rank < 1:
        raise ValueError(f"experts.{name}.rank must be 1 or more, got {rank}")
    for site_name, site in sites.items():
        if rank > (largest := max(site.shape)):
            raise ValueError(f"experts.{name}.rank: {rank} is more than {largest}, the larger side of {site_name}")
    starts = starts or Starts({name: "lora"}, {name: rank}, seed)
    for site_name, site in sites.items():
        scaling = scaling_of(rank, alpha, use_rslora)
        a, b = starts.pair(name, site_name, site.shape, scaling, site.weight)
        place(site, name, (a, b, a, -b) if STARTS[starts.inits[name]].held else (a, b), scaling)
    return {"rank": rank, "alpha": alpha, "use_rslora": use_rslora}


def load(sites: Sites, name: str, tensors: Factors, config: Mapping[str, Any], *, held: bool = False) -> dict[str, Any]:
    """Put the expert of a plain PEFT adapter, as `moa.files.peft` reads it, at the sites that it names.

    With `held` the second half of its ranks is its start, see `state`. Returns what it was made with. Raises
    ValueError for keys without a site, other shapes, and infinite values.
    """
    for site_name, (a, b) in pair_up(name, tensors, sites).items():
        factors: Sequence[Tensor] = (a, b)
        if held:
            (a, start_a), (b, start_b) = a.chunk(2, 0), b.chunk(2, 1)
            factors = a, b, start_a, start_b
        place(sites[site_name], name, factors, site_scaling(config, site_name))
    rank, alpha, use_rslora = config["r"], config.get("lora_alpha", 8), bool(config.get("use_rslora", False))
    if held:
        rank, alpha = rank // 2, alpha * scaling_of(rank, 1.0, use_rslora) / scaling_of(rank // 2, 1.0, use_rslora)
    return {"rank": rank, "alpha": alpha, "use_rslora": use_rslora}


def place(site: ExpertLinear, name: str, factors: Sequence[Tensor], scaling: float) -> None:
    """Copies of A and B, and of those of a start behind them, which do not train."""
    copies = [factor.to(site.weight.device, torch.float32, copy=True).contiguous() for factor in factors]
    site.add(name, [nn.Parameter(factor, number < 2) for number, factor in enumerate(copies)], scaling)


def state(sites: Sites, name: str) -> dict[str, Tensor]:
    """The factors, or values and places, of one expert by PEFT key; those of a start that it holds are further ranks.

    So the file is the whole update of the base's weights, for plain PEFT too. Without a start the tensors share memory
    with the parameters.
    """
    found: dict[str, Tensor] = {}
    for site in sites.values():
        if name in site.scalings:
            factors = (factor.detach() for factor in site.whole(name))
            found |= dict(zip(site.keys, factors, strict=True))
    return found


@torch.no_grad()
def overwrite(sites: Sites, name: str, tensors: Factors) -> None:
    """Copy the tensors of a state into an expert; ValueError unless keys and shapes are the same."""
    own = state(sites, name)
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        counts = f"{len(missing)} keys missing {missing[:2]}, {len(extra)} keys unknown {extra[:2]}"
        raise ValueError(f"expert {name}: {counts}")
    for key, tensor in tensors.items():
        if tensor.shape != own[key].shape:
            raise ValueError(f"expert {name}: {key} is {list(tensor.shape)}, expected {list(own[key].shape)}")
    check_finite(name, tensors)
    for site in sites.values():
        if name in site.scalings:
            site.write(name, *(tensors[key] for key in site.keys))


def pair_up(name: str, tensors: Factors, sites: Sites) -> dict[str, tuple[Tensor, Tensor]]:
    """Site -> (A, B) of an adapter, in the order of the sites; see `load`."""
    left, pairs = dict(tensors), {}
    for site_name, site in sites.items():
        key_a, key_b = site_keys(site_name)
        if key_a not in left or key_b not in left:
            continue
        a, b = pairs[site_name] = left.pop(key_a), left.pop(key_b)
        found = b.shape[0], a.shape[1]
        if found != site.shape:
            raise ValueError(
                f"expert {name}: made for another base: {site_name} is [out, in] {list(found)} in "
                f"the adapter, {list(site.shape)} in the model"
            )
    if left or not pairs:
        raise ValueError(
            f"expert {name}: {len(left)} tensors belong to no site of this model, first "
            f"{sorted(left)[:1]}; sites: {', '.join(list(sites)[:3])}, ..."
        )
    check_finite(name, tensors)
    return pairs


def check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"expert {name}: {key} has NaN or infinite values")


def peft_config(sites: Sites, name: str, *, rank: int, alpha: float | int, use_rslora: bool) -> dict[str, Any]:
    """adapter_config.json of an expert: full paths, and patterns only where sites differ."""
    own = {site_name: site for site_name, site in sites.items() if name in site.scalings}
    if any(name in site.starts for site in own.values()):  # twice the ranks, the same scaling
        rank, alpha = 2 * rank, alpha * scaling_of(rank, 1.0, use_rslora) / scaling_of(2 * rank, 1.0, use_rslora)
    ranks, alphas = {}, {}
    for site_name, site in own.items():
        pattern, site_rank = f"^{re.escape(site_name)}", len(site.whole(name)[0])
        site_alpha = site.scalings[name] / scaling_of(site_rank, 1.0, use_rslora)
        if site_rank != rank:
            ranks[pattern] = site_rank
        if not math.isclose(site_alpha, alpha, rel_tol=1e-9):
            alphas[pattern] = site_alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "target_modules": list(own),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def adapter_config(sites: Sites, name: str, **settings: Any) -> dict[str, Any]:
    """adapter_config.json of a bottleneck adapter: as of a LoRA, under a type that PEFT does not load."""
    first = next(site for site in sites.values() if name in site.scalings)
    own = {"peft_type": ADAPTER, "kind": first.kind, "activation": first.activation}
    return peft_config(sites, name, **settings) | own
