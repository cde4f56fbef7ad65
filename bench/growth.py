"""What a training step costs as experts, rank, tokens and wrapped layers grow.

    python -m bench.growth [device=cpu|cuda] [dtype=fp32|bf16] [rounds=5]

Ours, PEFT LoRA of the same total rank, and a loop over experts, on one small LLaVA; each sweep
changes one number. Time is the step's median; memory is what is saved for the backward pass, and
the trained parameters with their AdamW moments. Ours and the loop include the router, whose cost is
fixed. Writes results/bench_growth.json and results/bench_growth.png.
"""

from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import track

from bench.report import line_panels
from bench.settings import Device, Setting, Size, run_bench, write_results
from moa.cli.ranges import Count

SIZE = Size(width=256, mlp=688, layers=4, heads=4, vocab=512, vision_width=64, vision_heads=4,
            image_tokens=16, prompt=96, answer=16, batch=4)  # fmt: skip
LAYER = r"model\.language_model\.layers\.\d+\."
SITES = {4: "self_attn.q_proj", 8: "self_attn.[qv]_proj", 16: r"self_attn.\w+_proj",
         28: r"(self_attn|mlp).\w+_proj"}  # fmt: skip
NAMES = {"ours": "ours", "lora": "LoRA of the total rank", "loop": "loop over experts"}
COSTS = {"ms": "step, ms", "saved": "saved activations, MiB", "trained": "weights and moments, MiB"}


@dataclass(frozen=True, kw_only=True)
class Settings(Device):
    num_experts: Count = 8  # where other numbers change
    rounds: Count = 5  # turns of each contender


def sweeps(base: Setting) -> dict[str, dict[int, Setting]]:
    """The name on the axis -> the number on it -> what is measured there."""
    fixed = base.size.image_tokens + base.size.answer
    return {
        "experts": {n: replace(base, num_experts=n) for n in (2, 4, 8, 16, 32, 64)},
        "rank of each expert": {r: replace(base, rank=r) for r in (1, 2, 4, 8, 16, 32)},
        "tokens of a sample": {
            t: replace(base, size=replace(base.size, prompt=t - fixed)) for t in (64, 128, 256, 512)
        },
        "wrapped layers": {n: replace(base, targets=LAYER + sites) for n, sites in SITES.items()},
    }


def measure(setting: Setting, rounds: int) -> dict[str, dict[str, float]]:
    from bench.bench_model import race, saved_bytes
    from bench.contenders import CONTENDERS

    runs = {name: CONTENDERS[name](setting) for name in NAMES}
    seconds = race({name: run.stepper() for name, run in runs.items()}, rounds, setting.device)
    saved = {n: saved_bytes(r.forward, r.model.parameters()) / 2**20 for n, r in runs.items()}
    found = {}
    for name, run in runs.items():
        trained = [p for p in run.model.parameters() if p.requires_grad]
        size = sum(3 * p.numel() * p.element_size() for p in trained)  # with AdamW's two moments of each
        found[name] = {"ms": median(seconds[name]) * 1e3, "saved": saved[name], "trained": size / 2**20}
    return found


def run(settings: Settings, console: Console) -> None:
    base = settings.at(SIZE, settings.num_experts)
    plan = [(axis, x, at) for axis, points in sweeps(base).items() for x, at in points.items()]
    found: dict[str, dict[int, dict[str, dict[str, float]]]] = {}
    for axis, x, setting in track(plan, "measuring"):
        found.setdefault(axis, {})[x] = measure(setting, settings.rounds)
    path = write_results("growth", {"where": settings.where("growth"), "growth": found})

    def series(points: dict[int, dict[str, dict[str, float]]], cost: str) -> dict[str, Any]:
        return {s: {x: v[name][cost] for x, v in points.items()} for name, s in NAMES.items()}

    line_panels(
        path.with_suffix(".png"),
        [[(axis, label, series(points, cost)) for axis, points in found.items()]
         for cost, label in COSTS.items()],
        title="What a training step costs as it grows",
        subtitle=f"{base.num_experts} experts of rank {base.rank}, 128 tokens, 28 linear layers of width "
        f"{SIZE.width} where not said otherwise; ours and the loop with the router",
    )  # fmt: skip


if __name__ == "__main__":
    run_bench(Settings, run, __doc__)
