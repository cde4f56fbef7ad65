"""LoRA as a kind of expert: a fresh start, a state, and a plain PEFT folder's tensors and settings."""

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moa.experts.lora import ExpertLinear
from moa.files.peft import site_keys
from moa.files.peft_config import site_scaling

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
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Put an expert that changes no output yet at all these sites; returns what it was made with.

    A is uniform in ±1/sqrt(in) as in PEFT, drawn from (seed, name, site), whatever the device and order. B is zero.
    """
    if rank < 1:
        raise ValueError(f"experts.{name}.rank must be 1 or more, got {rank}")
    for site_name, site in sites.items():
        largest = max(site.base_layer.in_features, site.base_layer.out_features)
        if rank > largest:
            rule = f"{rank} is more than {largest}, the larger side of {site_name}"
            raise ValueError(f"experts.{name}.rank: {rule}")
    for site_name, site in sites.items():
        a = uniform((rank, site.base_layer.in_features), f"{seed}/{name}/{site_name}")
        b = torch.zeros(site.base_layer.out_features, rank)
        place(site, name, a, b, scaling_of(rank, alpha, use_rslora), dtype)
    return {"rank": rank, "alpha": alpha, "use_rslora": use_rslora}


def load(
    sites: Sites,
    name: str,
    tensors: Factors,
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Put the expert of a plain PEFT adapter, as `moa.files.peft` reads it, at the sites that it names.

    Returns what it was made with. Raises ValueError for keys without a site, other shapes, and infinite values.
    """
    for site_name, (a, b) in pair_up(name, tensors, sites).items():
        place(sites[site_name], name, a, b, site_scaling(config, site_name), dtype)
    alpha, use_rslora = config.get("lora_alpha", 8), bool(config.get("use_rslora", False))
    return {"rank": config["r"], "alpha": alpha, "use_rslora": use_rslora}


def place(site: ExpertLinear, name: str, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> None:
    device = site.base_layer.weight.device
    own_a, own_b = (f.to(device=device, dtype=dtype, copy=True) for f in (a, b))
    site.add(name, nn.Parameter(own_a), nn.Parameter(own_b), scaling)


def uniform(shape: tuple[int, int], seed: str) -> Tensor:
    generator = torch.Generator().manual_seed(hashed(seed))
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])


def hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def state(sites: Sites, name: str) -> dict[str, Float[Tensor, "_ _"]]:
    """The factors of one expert by PEFT key, sharing memory with the parameters."""
    found: dict[str, Tensor] = {}
    for site_name, site in sites.items():
        if name in site.scalings:
            factors = (parameter.detach() for parameter in site.own(name))
            found |= dict(zip(site_keys(site_name), factors, strict=True))
    return found


@torch.no_grad()
def overwrite(own: Factors, tensors: Factors, name: str) -> None:
    """Copy tensors into an expert's own; ValueError unless keys and shapes are the same."""
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        lacking = f"{len(missing)} keys missing {missing[:2]}"
        raise ValueError(f"expert {name}: {lacking}, {len(extra)} keys unknown {extra[:2]}")
    for key, tensor in tensors.items():
        if tensor.shape != own[key].shape:
            shapes = f"{list(tensor.shape)}, expected {list(own[key].shape)}"
            raise ValueError(f"expert {name}: {key} is {shapes}")
    check_finite(name, tensors)
    for key, tensor in tensors.items():
        own[key].copy_(tensor)


def pair_up(name: str, tensors: Factors, sites: Sites) -> dict[str, tuple[Tensor, Tensor]]:
    """Site -> (A, B) of an adapter, in the order of the sites; see `load`."""
    left, pairs = dict(tensors), {}
    for site_name, site in sites.items():
        key_a, key_b = site_keys(site_name)
        if key_a not in left or key_b not in left:
            continue
        a, b = pairs[site_name] = left.pop(key_a), left.pop(key_b)
        found, base = (b.shape[0], a.shape[1]), site.base_layer
        if found != (base.out_features, base.in_features):
            raise ValueError(
                f"expert {name}: made for another base: {site_name} is [out, in] {list(found)} in "
                f"the adapter, {[base.out_features, base.in_features]} in the model"
            )
    if left or not pairs:
        raise ValueError(
            f"expert {name}: {len(left)} tensors belong to no site of this model, first "
            f"{sorted(left)[:1]}; sites: {', '.join(list(sites)[:3])}, ..."
        )
    check_finite(name, tensors)
    return pairs


def check_finite(name: str, tensors: Factors) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"expert {name}: {key} has NaN or infinite values")


def peft_config(sites: Sites, name: str, *, rank: int, alpha: float | int, use_rslora: bool) -> dict[str, Any]:
    """adapter_config.json of an expert: full paths, and patterns only where sites differ."""
    own = {site_name: site for site_name, site in sites.items() if name in site.scalings}
    ranks, alphas = {}, {}
    for site_name, site in own.items():
        pattern, site_rank = f"^{re.escape(site_name)}", site.ranks[name]
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
