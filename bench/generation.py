"""Decoding speed of the routed mixture over batch sizes, against the same mixture merged, and PEFT with many adapters.

    python -m bench.generation [--size small|large] [--device cpu|cuda] [--dtype fp32|bf16]
        [--batches 1 2 4 8 16 32] [--experts 4 8] [--new-tokens 32]

merged    one gate for all samples, in the weights: what the same model costs without a mixture
routed    each sample has its own gates of all experts, decided once from its prompt
peft      `generate(adapter_names=...)`: as many adapters of the same rank, one of them for each sample
static    the first two with `cache_implementation="static"`, which is not compiled here

Greedy decoding of prompts with an image each, in turns; the routed model also looks at its evidence and decides.
Figures are tokens/s over the merged model's, medians over the rounds. Writes results/bench_generation.json.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from bench.bench_model import (
    DTYPES,
    SIZES,
    TARGETS,
    Size,
    make_backbone,
    make_batch,
    make_mixture,
    make_parser,
    race,
    ratio,
    where,
)
from bench.record import write_results
from data.batch import Batch
from moa.backbones.llava import Backbone
from moa.model import MixtureModel

Run = Callable[[Batch], Tensor]
STATIC: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}


@torch.no_grad()
def merge(model: MixtureModel, backbone: Backbone, gates: Tensor) -> None:
    """Add the experts with these gates [expert] to the weights of another copy of the backbone."""
    for name, site in model.bank.sites.items():
        weight = backbone.model.get_submodule(name).weight
        for gate, (expert, scaling) in zip(gates, site.scalings.items(), strict=True):
            weight += (gate * scaling * site.lora_B[expert] @ site.lora_A[expert]).to(weight.dtype)


@torch.no_grad()
def decode(backbone: Backbone, batch: Batch, **options: Any) -> Tensor:
    """Greedy tokens of a plain model, from the same pieces as the routed one."""
    return backbone.generate(batch, backbone.features(batch), **options)


def peft_run(backbone: Backbone, num_experts: int, rank: int, options: dict[str, Any]) -> Run:
    """PEFT's own way to serve several adapters in one batch, the samples taking turns."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False)
    model: Any = get_peft_model(backbone.model, config, adapter_name="0")
    for i in range(1, num_experts):
        model.add_adapter(str(i), config)
    model = model.eval().to(backbone.dtype)

    @torch.no_grad()
    def run(batch: Batch) -> Tensor:
        names = [str(i % num_experts) for i in range(len(batch))]
        return model.generate(**backbone.inputs_of(batch), adapter_names=names, **options)

    return run


def contenders(
    num_experts: int, rank: int, size: Size, device: str, dtype: torch.dtype, new_tokens: int
) -> dict[str, Run]:
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
    }
    routed = make_mixture(make_backbone(size, device, dtype), num_experts, rank, device).eval()
    merged = make_backbone(size, device, dtype)
    gates = routed.compute_gates(make_batch(size, device, generate=True)).gates
    assert gates is not None  # they are decided per sample
    merge(routed, merged, gates.mean((0, 1)))
    return {
        "merged": lambda batch: decode(merged, batch, **options),
        "routed": lambda batch: routed.generate(batch, **options),
        "peft": peft_run(make_backbone(size, device, dtype), num_experts, rank, options),
        "merged static": lambda batch: decode(merged, batch, **options, **STATIC),
        "routed static": lambda batch: routed.generate(batch, **options, **STATIC),
    }


def measure(runs: dict[str, Run], batch: Batch, rounds: int, device: str) -> dict[str, float]:
    """Tokens/s of each over those of the merged model."""
    seconds = race({n: partial(run, batch) for n, run in runs.items()}, rounds, device)
    return {name: ratio(seconds, "merged", name) for name in runs}


def main() -> None:
    warnings.simplefilter("ignore")
    parser = make_parser(__doc__, experts=[4, 8], rounds=5)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    arguments = parser.parse_args()
    size, device, dtype = SIZES[arguments.size], arguments.device, DTYPES[arguments.dtype]
    print(f"{size}, {device}, {arguments.dtype}, {torch.get_num_threads()} threads")

    over_merged: dict[int, dict[int, dict[str, float]]] = {}
    for count in arguments.experts:
        runs = contenders(count, arguments.rank, size, device, dtype, arguments.new_tokens)
        for number in arguments.batches:
            batch = make_batch(replace(size, batch=number), device, generate=True)
            found = measure(runs, batch, arguments.rounds, device)
            over_merged.setdefault(count, {})[number] = found
            shown = "   ".join(f"{name} {value:.3f}" for name, value in found.items())
            print(f"{count} experts, batch {number:2d}, tokens/s over merged: {shown}", flush=True)
    figures = {
        "tokens_vs_merged": min(
            f["routed"] for each in over_merged.values() for f in each.values()
        ),
        "tokens_over_merged": over_merged,  # experts -> batch -> contender
        "new_tokens": arguments.new_tokens,
        "rank": arguments.rank,
        "where": where(arguments),
    }
    write_results("generation", figures)


if __name__ == "__main__":
    main()
