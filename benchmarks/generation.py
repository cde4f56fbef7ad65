"""Decoding speed of the routed mixture, against the same mixture merged into the weights.

    python benchmarks/generation.py [--size small|large] [--device cpu|cuda] [--dtype fp32|bf16]

Greedy decoding of a batch with the KV cache; the routed model also looks at its evidence and
decides gates first, each sample its own. The last line is JSON; ratios are ours over theirs.
"""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.bench_model import (
    DTYPES,
    SIZES,
    Size,
    make_backbone,
    make_batch,
    make_mixture,
    make_parser,
    race,
    ratio,
    where,
)
from data.batch import Batch
from moa.backbones.llava import Backbone
from moa.model import MixtureModel


@torch.no_grad()
def merge(model: MixtureModel, backbone: Backbone, gates: Tensor) -> None:
    """Add the experts with these gates [expert] to the weights of another copy of the backbone."""
    for name, site in model.bank.sites.items():
        weight = backbone.model.get_submodule(name).weight
        for gate, (expert, scaling) in zip(gates, site.scalings.items(), strict=True):
            weight += (gate * scaling * site.lora_B[expert] @ site.lora_A[expert]).to(weight.dtype)


@torch.no_grad()
def decode(backbone: Backbone, batch: Batch, **options) -> Tensor:
    """Greedy tokens of a plain model, from the same pieces as the routed one."""
    return backbone.generate(batch, backbone.features(batch), **options)


def contenders(
    num_experts: int, rank: int, size: Size, device: str, dtype: torch.dtype, new_tokens: int
) -> dict[str, Callable[[], Tensor]]:
    batch = make_batch(size, device, generate=True)
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
    }
    routed = make_mixture(make_backbone(size, device, dtype), num_experts, rank, device).eval()
    merged = make_backbone(size, device, dtype)
    gates = routed.compute_gates(batch).gates
    assert gates is not None  # they are decided per sample
    merge(routed, merged, gates.mean((0, 1)))
    return {
        "merged": lambda: decode(merged, batch, **options),
        "routed": lambda: routed.generate(batch, **options),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    parser = make_parser(__doc__, experts=[4], rounds=6)
    parser.add_argument("--new-tokens", type=int, default=32)
    arguments = parser.parse_args()
    size, device, dtype = SIZES[arguments.size], arguments.device, DTYPES[arguments.dtype]
    print(f"{size}, {device}, {arguments.dtype}, {torch.get_num_threads()} threads")

    ratios = {}
    for count in arguments.experts:
        runs = contenders(count, arguments.rank, size, device, dtype, arguments.new_tokens)
        seconds = race(runs, arguments.rounds, device)
        speed = {n: size.batch * arguments.new_tokens / min(s) for n, s in seconds.items()}
        ratios[count] = ratio(seconds, "merged", "routed")
        shown = "   ".join(f"{name} {value:8.1f} tokens/s" for name, value in speed.items())
        print(f"{count} experts: {shown}   routed over merged {ratios[count]:.3f}")
    figures = {
        "tokens_vs_merged": min(ratios.values()),
        "tokens_vs_merged_by_experts": ratios,
        **where(arguments),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
