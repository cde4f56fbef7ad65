"""What bf16, recomputed layers and kept concatenations bring, each against the same without.

    python -m bench.precision [size=small|slice7b|...] [experts=[8]] [device=cpu|cuda]

Training steps of ours and of PEFT LoRA of the same total rank: fp32, bf16 (frozen weights in bf16, autocast, experts
and router in fp32, as train.precision=bf16 has it), and with gradient checkpointing. Then one decoding step of all
expert layers, with the factors' concatenation kept and made anew. Writes results/bench_precision_<size>.json.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rich.console import Console

from bench.settings import SIZES, Setting, Sized, run_bench, write_results
from moa.cli.ranges import Count

TRAINING = (
    ("ours bf16", "ours fp32"), ("ours bf16", "lora bf16"), ("ours fp32", "lora fp32"),
    ("ours checkpointed", "ours fp32"), ("ours checkpointed", "lora checkpointed"),
)  # fmt: skip
DECODING = (("kept", "anew"), ("kept", "frozen"), ("anew", "frozen"))


@dataclass(frozen=True, kw_only=True)
class Settings(Sized):
    rounds: Count = 6  # turns of each contender

    def __post_init__(self) -> None:
        if self.dtype != "fp32":
            raise ValueError("dtype: fp32 and bf16 are both measured; leave it out")


def training(setting: Setting, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios of times, and of saved bytes, of what is compared."""
    import torch

    from bench.bench_model import race, ratios, saved_bytes
    from bench.contenders import CONTENDERS

    changed = replace(setting, dtype=torch.bfloat16), replace(setting, checkpointing=True)
    variants = dict(zip(("fp32", "bf16", "checkpointed"), (setting, *changed), strict=True))
    pairs = [(name, variant) for variant in variants for name in ("ours", "lora")]
    runs = {f"{name} {v}": CONTENDERS[name](variants[v]) for name, v in pairs}
    seconds = race({name: run.stepper() for name, run in runs.items()}, rounds, setting.device)
    saved = {n: saved_bytes(run.forward, run.model.parameters()) for n, run in runs.items()}
    shares = {f"{one} / {other}": saved[one] / saved[other] for one, other in TRAINING}
    return ratios(seconds, TRAINING), shares


def decoding(setting: Setting, rounds: int) -> dict[str, float]:
    """One token of each sample through all expert layers: kept factors over concatenated ones."""
    import torch

    from bench.bench_model import race, ratios
    from bench.contenders import ours

    model: Any = ours(setting).model
    bank, batch = model.bank, setting.size.batch
    make: dict[str, Any] = {"dtype": setting.dtype, "device": setting.device}
    bank.set_gates(torch.rand(batch, 1, setting.num_experts, device=setting.device))
    sites = [(site, site.base_layer) for site in bank.sites.values()]
    widths = [base.in_features for _, base in sites]
    tokens = {width: torch.randn(batch, 1, width, **make) for width in widths}
    state = bank.context.state

    def step(keep: bool) -> None:
        if not keep:
            state.prepared.clear()
        for site, base in sites:
            site(tokens[base.in_features])

    def frozen() -> None:
        for _, base in sites:
            base(tokens[base.in_features])

    runs = {"kept": partial(step, True), "anew": partial(step, False), "frozen": partial(frozen)}
    with torch.no_grad():
        return ratios(race(runs, rounds, setting.device), DECODING)


def run(settings: Settings, console: Console) -> None:
    found = {}
    for count in settings.experts:
        setting = settings.at(SIZES[settings.size], count)
        times, saved = training(setting, settings.rounds)
        tables = {"time": times, "saved": saved, "decoding": decoding(setting, settings.rounds)}
        for title, rows in tables.items():
            for name, value in rows.items():
                print(f"{count} experts, {title:9s} {name:36s} {value:6.3f}")
        found[count] = tables
    write_results(f"precision_{settings.size}", {"where": settings.where(settings.size), "experts": found})


if __name__ == "__main__":
    run_bench(Settings, run, __doc__)
