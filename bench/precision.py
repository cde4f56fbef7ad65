"""What bf16, recomputed layers and kept concatenations bring, each against the same without.

    python -m bench.precision [--size small|slice7b|...] [--experts 8] [--device cpu|cuda]

Training steps of ours and of PEFT LoRA of the same total rank: fp32, bf16 (frozen weights in bf16,
autocast, experts and router in fp32, as train.precision=bf16 has it), and with gradient
checkpointing. Then one decoding step of all expert layers, with the factors' concatenation kept and
made anew. Writes results/bench_precision_<size>.json.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bench.bench_model import (
    SIZES,
    make_parser,
    race,
    ratio,
    saved_bytes,
    where,
)
from bench.contenders import CONTENDERS, Setting, ours
from bench.record import write_results
from moa.model import MixtureModel


def variants(setting: Setting) -> dict[str, Setting]:
    return {
        "fp32": setting,
        "bf16": replace(setting, dtype=torch.bfloat16),
        "checkpointed": replace(setting, checkpointing=True),
    }


def training(setting: Setting, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios of times, and of saved bytes, of what is compared."""
    runs = {
        f"{name} {variant}": CONTENDERS[name](own)
        for variant, own in variants(setting).items()
        for name in ("ours", "lora")
    }
    seconds = race({name: run.stepper() for name, run in runs.items()}, rounds, setting.device)
    saved = {n: saved_bytes(run.forward, run.model.parameters()) for n, run in runs.items()}
    pairs = [
        ("ours bf16", "ours fp32"),
        ("ours bf16", "lora bf16"),
        ("ours fp32", "lora fp32"),
        ("ours checkpointed", "ours fp32"),
        ("ours checkpointed", "lora checkpointed"),
    ]
    times = {f"{one} / {other}": ratio(seconds, one, other) for one, other in pairs}
    return times, {f"{one} / {other}": saved[one] / saved[other] for one, other in pairs}


@torch.no_grad()
def decoding(setting: Setting, rounds: int) -> dict[str, float]:
    """One token of each sample through all expert layers: kept factors over concatenated ones."""
    model = ours(setting).model
    assert isinstance(model, MixtureModel)
    bank, batch = model.bank, setting.size.batch
    dtype, device = setting.dtype, setting.device
    gates = torch.rand(batch, 1, setting.num_experts, device=device)
    tokens: dict[int, Tensor] = {
        site.base_layer.in_features: torch.randn(
            batch, 1, site.base_layer.in_features, dtype=dtype, device=device
        )
        for site in bank.sites.values()
    }
    bank.set_gates(gates)
    state = bank.context.state
    assert state is not None

    def step(keep: bool) -> Callable[[], None]:
        def run() -> None:
            if not keep:
                state.prepared.clear()
            for site in bank.sites.values():
                site(tokens[site.base_layer.in_features])

        return run

    def frozen() -> None:
        for site in bank.sites.values():
            site.base_layer(tokens[site.base_layer.in_features])

    seconds = race({"kept": step(True), "anew": step(False), "frozen": frozen}, rounds, device)
    pairs = [("kept", "anew"), ("kept", "frozen"), ("anew", "frozen")]
    return {f"{one} / {other}": ratio(seconds, one, other) for one, other in pairs}


def main() -> None:
    warnings.simplefilter("ignore")  # PEFT and transformers disagree on names
    arguments = make_parser(__doc__, experts=[8], rounds=6).parse_args()
    figures = {}
    for count in arguments.experts:
        setting = Setting(
            size=SIZES[arguments.size],
            num_experts=count,
            rank=arguments.rank,
            device=arguments.device,
            dtype=torch.float32,
        )
        times, saved = training(setting, arguments.rounds)
        tables = {"time": times, "saved": saved, "decoding": decoding(setting, arguments.rounds)}
        for title, rows in tables.items():
            for name, value in rows.items():
                print(f"{count} experts, {title:9s} {name:36s} {value:6.3f}")
        figures[count] = tables
    write_results(f"precision_{arguments.size}", {"where": where(arguments), "experts": figures})


if __name__ == "__main__":
    main()
