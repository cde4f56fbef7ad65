"""Sparse experts of high rank at a linear layer: r (in + out) numbers of its weight, at places that stay (SHiRA,
arXiv 2406.13175).

    y = W x + sum_e gate_e S_e x        S_e [out, in], zero but at the expert's places

As many numbers as a LoRA of rank r has, and no bound on the rank. The places are random, others for each expert, so
that updates hardly meet where they are added up. The file is PEFT's of SHiRA: values and places of each layer. S_e x is
a product with a whole matrix, so that each expert costs a layer of its own in time, and for the gradient one matrix
[out, in] in memory.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moa.experts import lora_state
from moa.experts.lora import ExpertLinear
from moa.experts.lora_state import check_finite
from moa.experts.starts import Starts, seeded
from moa.files.peft import sparse_keys
from moa.files.peft_config import SPARSE


class SparseLinear(ExpertLinear):
    """A frozen linear layer and the sparse experts at its site; the one factor of each is its values."""

    kind = "sparse"
    factors = ("B",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ranks: dict[str, int] = {}  # r

    def forward(self, x: Float[Tensor, "*lead in"]) -> Float[Tensor, "*lead out"]:
        out = self.base_layer(x)
        state = self._state()
        if state is None:
            return out
        gates = self._gates(x, state)
        for expert in self._running(state):
            gate = gates[..., state.experts.index(expert), None].to(out.dtype)
            out = out + gate * F.linear(x.to(out.dtype), self.update(expert).to(out.dtype))
        return out

    def update(self, expert: str) -> Float[Tensor, "out in"]:
        values = self.factor("lora", "B", expert)
        return values.new_zeros(math.prod(self.shape)).scatter(0, self.places(expert), values).view(self.shape)

    def places(self, expert: str) -> Int[Tensor, " value"]:
        """Where its values are in the flat weight."""
        return self.get_buffer(f"places_{expert}")

    @property
    def keys(self) -> tuple[str, ...]:
        return sparse_keys(self.name)

    @property
    def ranks(self) -> dict[str, int]:
        return dict(self._ranks)

    def own(self, expert: str) -> list[nn.Parameter]:
        return [self.factor("lora", "B", expert)]

    def whole(self, expert: str) -> tuple[Tensor, ...]:
        """Values, and their rows and columns."""
        places, width = self.places(expert), self.shape[1]
        return self.own(expert)[0], torch.stack([places // width, places % width]).int()

    def write(self, expert: str, *factors: Tensor) -> None:
        self.own(expert)[0].copy_(factors[0])

    def add(self, expert: str, values: nn.Parameter, places: Tensor, rank: int) -> None:  # type: ignore[override]
        self.register_parameter(f"lora_B_{expert}", values)
        self.register_buffer(f"places_{expert}", places, persistent=False)
        self._ranks[expert], self.scalings[expert] = rank, 1.0

    def remove(self, expert: str) -> tuple[nn.Parameter, Tensor, int]:  # type: ignore[override]
        values, places = self.own(expert)[0], self.places(expert)
        delattr(self, f"lora_B_{expert}")
        delattr(self, f"places_{expert}")
        del self.scalings[expert]
        return values, places, self._ranks.pop(expert)


def fresh(
    sites: Mapping[str, SparseLinear], name: str, *, rank: int, seed: int = 0, starts: Starts | None = None
) -> dict[str, Any]:
    """Values of zero at all these sites, at places that are drawn from (seed, name, site)."""
    seed = starts.seed if starts else seed
    for site_name, site in sites.items():
        if rank * sum(site.shape) > (size := math.prod(site.shape)):
            rule = f"{rank} gives {rank * sum(site.shape)} values, and the weight of {site_name} has {size}"
            raise ValueError(f"experts.{name}.rank: {rule}")
        drawn = torch.randperm(size, generator=seeded(f"{seed}/{name}/{site_name}/places"))
        places = drawn[: rank * sum(site.shape)].sort().values.to(site.weight.device)
        site.add(name, nn.Parameter(torch.zeros(len(places), device=places.device)), places, rank)
    return {"rank": rank}


def load(
    sites: Mapping[str, SparseLinear],
    name: str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    held: bool = False,
) -> dict[str, Any]:
    """The expert of a PEFT folder of SHiRA; ValueError for keys without a site, and for one of other layers."""
    left, rank = dict(tensors), config["r"]
    check_finite(name, tensors)
    for site_name, site in sites.items():
        found = [left.pop(key, None) for key in site.keys]
        if (values := found[0]) is None or (where := found[1]) is None:
            continue
        (rows, columns), (out, width) = where.long(), site.shape
        inside = bool((where >= 0).all() and (rows < out).all() and (columns < width).all())
        places = rows * width + columns
        if not inside or len(values) != rank * (out + width) or len(places.unique()) < len(places):
            rule = (
                f"its {len(values)} values are not {rank} x {out + width} different places of the layer {[out, width]}"
            )
            raise ValueError(f"expert {name}: made for another base: {site_name}: {rule}")
        device = site.weight.device
        site.add(name, nn.Parameter(values.to(device, torch.float32, copy=True)), places.to(device), rank)
    if left:
        raise ValueError(f"expert {name}: {len(left)} tensors belong to no site of this model, first {min(left)}")
    return {"rank": rank}


def overwrite(sites: Mapping[str, SparseLinear], name: str, tensors: Mapping[str, Tensor]) -> None:
    """As of a LoRA; ValueError also for values at other places."""
    for key, own in lora_state.state(sites, name).items():
        if not own.is_floating_point() and key in tensors and not torch.equal(own, tensors[key].to(own)):
            raise ValueError(f"expert {name}: {key}: the values are at other places than those of the model")
    lora_state.overwrite(sites, name, tensors)


def peft_config(sites: Mapping[str, SparseLinear], name: str, *, rank: int) -> dict[str, Any]:
    """adapter_config.json, as of PEFT's ShiraConfig."""
    return {
        "peft_type": SPARSE,
        "task_type": "CAUSAL_LM",
        "r": rank,
        "mask_type": "random",
        "target_modules": [site_name for site_name, site in sites.items() if name in site.scalings],
        "inference_mode": True,
    }
