"""An expert's factors as the tensors and settings of a plain PEFT adapter, and back."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moa.experts.lora import ExpertLinear
from moa.files.peft import site_keys


def scaling_of(rank: int, alpha: float | int, use_rslora: bool) -> float:
    """The factor before B A: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def expert_state(sites: Mapping[str, ExpertLinear], name: str) -> dict[str, Float[Tensor, "_ _"]]:
    """The factors of one expert by PEFT key, sharing memory with the parameters."""
    state: dict[str, Tensor] = {}
    for site_name, site in sites.items():
        if name in site.scalings:
            factors = site.lora_A[name].detach(), site.lora_B[name].detach()
            state |= dict(zip(site_keys(site_name), factors, strict=True))
    return state


@torch.no_grad()
def overwrite(
    own: Mapping[str, Float[Tensor, "_ _"]], tensors: Mapping[str, Float[Tensor, "_ _"]], name: str
) -> None:
    """Copy tensors into an expert's own; ValueError unless keys and shapes are the same."""
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise ValueError(
            f"expert {name}: {len(missing)} keys missing {missing[:2]}, {len(extra)} keys unknown "
            f"{extra[:2]}"
        )
    for key, tensor in tensors.items():
        if tensor.shape != own[key].shape:
            shapes = f"{list(tensor.shape)}, expected {list(own[key].shape)}"
            raise ValueError(f"expert {name}: {key} is {shapes}")
    check_finite(name, tensors)
    for key, tensor in tensors.items():
        own[key].copy_(tensor)


def pair_up(
    name: str,
    tensors: Mapping[str, Float[Tensor, "_ _"]],
    sites: Mapping[str, ExpertLinear],
) -> dict[str, tuple[Float[Tensor, "_ _"], Float[Tensor, "_ _"]]]:
    """Site -> (A, B) of an adapter, in the order of the sites.

    Raises ValueError for a tensor that no site consumes, for shapes of another base, and for values
    that are not finite.
    """
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


def check_finite(name: str, tensors: Mapping[str, Float[Tensor, "_ _"]]) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"expert {name}: {key} has NaN or infinite values")


def peft_config(
    sites: Mapping[str, ExpertLinear], name: str, rank: int, alpha: float | int, use_rslora: bool
) -> dict[str, Any]:
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
