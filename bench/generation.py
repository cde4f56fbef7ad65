"""Decoding speed of the routed mixture over batch sizes, against the same mixture merged, and PEFT with many adapters.

    python -m bench.generation [size=small|large] [device=cpu|cuda] [dtype=fp32|bf16]
        [batches=[1,2,4,8,16,32]] [experts=[4,8]] [new_tokens=32]

merged    one gate for all samples, in the weights: what the same model costs without a mixture
routed    each sample has its own gates of all experts, decided once from its prompt
peft      `generate(adapter_names=...)`: as many adapters of the same rank, one of them for each sample
static    the first two with `cache_implementation="static"`, which is not compiled here

Greedy decoding of prompts with an image each, in turns; the routed model also looks at its evidence and decides.
The numbers are tokens/s over the merged model's, medians over the rounds. Writes results/bench_generation.json.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from rich.console import Console

from bench.settings import SIZES, TARGETS, Setting, Sized, run_bench, write_results
from moa.cli.ranges import Count

Run = Callable[[Any], object]
STATIC: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}


def merge(model: Any, backbone: Any, gates: Any) -> None:
    """Add the experts with these gates [expert] to the weights of another copy of the backbone."""
    for name, site in model.bank.sites.items():
        weight = backbone.model.get_submodule(name).weight
        for gate, (expert, scaling) in zip(gates, site.scalings.items(), strict=True):
            weight += (gate * scaling * site.lora_B[expert] @ site.lora_A[expert]).to(weight.dtype)


def peft_run(backbone: Any, num_experts: int, rank: int, options: dict[str, Any]) -> Run:
    """PEFT's own way to serve several adapters in one batch, the samples taking turns."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False)
    model: Any = get_peft_model(backbone.model, config, adapter_name="0")
    for i in range(1, num_experts):
        model.add_adapter(str(i), config)
    model = model.eval().to(backbone.dtype)

    def run(batch: Any) -> object:
        names = [str(i % num_experts) for i in range(len(batch))]
        return model.generate(**backbone.inputs_of(batch), adapter_names=names, **options)

    return run


def contenders(setting: Setting, new_tokens: int) -> dict[str, Run]:
    from bench.bench_model import make_backbone, make_batch, make_mixture

    options: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    place = setting.size, setting.device, setting.dtype
    count, rank = setting.num_experts, setting.rank
    routed = make_mixture(make_backbone(*place), count, rank, setting.device).eval()
    merged = make_backbone(*place)
    gates = routed.compute_gates(make_batch(setting.size, setting.device, generate=True)).gates
    assert gates is not None  # they are decided per sample
    merge(routed, merged, gates.mean((0, 1)))

    def decode(batch: Any, **more: Any) -> object:  # of the same pieces as the routed one
        return merged.generate(batch, merged.features(batch), **options, **more)

    return {
        "merged": decode,
        "routed": lambda batch: routed.answering().generate(batch, **options),
        "peft": peft_run(make_backbone(*place), count, rank, options),
        "merged static": lambda batch: decode(batch, **STATIC),
        "routed static": lambda batch: routed.answering().generate(batch, **options, **STATIC),
    }


@dataclass(frozen=True, kw_only=True)
class Settings(Sized):
    experts: list[Count] = field(default_factory=lambda: [4, 8])
    batches: list[Count] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    new_tokens: Count = 32
    rounds: Count = 5  # turns of each contender


def run(settings: Settings, console: Console) -> None:
    import torch

    size, place, threads = SIZES[settings.size], settings.place, torch.get_num_threads()
    print(f"{size}, {place}, {settings.dtype}, {threads} threads")
    with torch.no_grad():
        over_merged = {count: measure(settings, count) for count in settings.experts}
    routed = [found["routed"] for each in over_merged.values() for found in each.values()]
    # experts -> batch -> contender
    results = {"tokens_vs_merged": min(routed), "tokens_over_merged": over_merged}
    results |= {"new_tokens": settings.new_tokens, "rank": settings.rank}
    write_results("generation", results | {"where": settings.where(settings.size)})


def measure(settings: Settings, num_experts: int) -> dict[int, dict[str, float]]:
    """Batch -> contender -> tokens/s over the merged model's."""
    from bench.bench_model import make_batch, race, ratio

    size, table = SIZES[settings.size], {}
    runs = contenders(settings.at(size, num_experts), settings.new_tokens)
    for number in settings.batches:
        batch = make_batch(replace(size, batch=number), settings.place, generate=True)
        turns = {name: partial(decoder, batch) for name, decoder in runs.items()}
        seconds = race(turns, settings.rounds, settings.place)
        table[number] = {name: ratio(seconds, "merged", name) for name in runs}
        shown = "   ".join(f"{name} {value:.3f}" for name, value in table[number].items())
        print(f"{num_experts} experts, batch {number:2d}, tokens/s over merged: {shown}", flush=True)
    return table


if __name__ == "__main__":
    run_bench(Settings, run, __doc__)
