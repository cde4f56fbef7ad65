"""What a training step costs as experts, rank, tokens and wrapped layers grow.

    python -m bench.growth [--device cpu|cuda] [--dtype fp32|bf16] [--rounds 5]

Ours, PEFT LoRA of the same total rank, and a loop over experts, on one small LLaVA; each sweep
changes one number. Time is the step's median; memory is what is saved for the backward pass, and
the trained parameters with their AdamW moments. Ours and the loop include the router, whose cost is
fixed. Writes results/bench_growth.json and results/bench_growth.png.
"""

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch
from rich.progress import track
from torch import nn

from bench.bench_model import DTYPES, Size, race, saved_bytes, where
from bench.charts import Panel, line_panels
from bench.contenders import CONTENDERS, Setting
from bench.record import write_results

SIZE = Size(width=256, mlp=688, layers=4, heads=4, vocab=512, vision_width=64, vision_heads=4,
            image_tokens=16, prompt=96, answer=16, batch=4)  # fmt: skip
LAYER = r"model\.language_model\.layers\.\d+\."
SITES = {4: "self_attn.q_proj", 8: "self_attn.[qv]_proj", 16: r"self_attn.\w+_proj",
         28: r"(self_attn|mlp).\w+_proj"}  # fmt: skip
NAMES = {"ours": "ours", "lora": "LoRA of the total rank", "loop": "loop over experts"}
FIGURES = {
    "ms": "step, ms",
    "saved": "saved activations, MiB",
    "trained": "weights and moments, MiB",
}


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


def trained_bytes(model: nn.Module) -> int:
    """Trained parameters with AdamW's two moments of each."""
    return sum(3 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def measure(setting: Setting, rounds: int) -> dict[str, dict[str, float]]:
    """Contender -> its figures."""
    runs = {name: CONTENDERS[name](setting) for name in NAMES}
    seconds = race({name: run.stepper() for name, run in runs.items()}, rounds, setting.device)
    return {
        name: {
            "ms": median(seconds[name]) * 1e3,
            "saved": saved_bytes(run.forward, run.model.parameters()) / 2**20,
            "trained": trained_bytes(run.model) / 2**20,
        }
        for name, run in runs.items()
    }


def panels(found: dict[str, dict[int, dict[str, dict[str, float]]]]) -> Sequence[Sequence[Panel]]:
    """A row a figure, a column a sweep."""
    return [
        [
            Panel(
                x=axis,
                y=label,
                series={
                    shown: {x: values[name][figure] for x, values in points.items()}
                    for name, shown in NAMES.items()
                },
            )
            for axis, points in found.items()
        ]
        for figure, label in FIGURES.items()
    ]


def main() -> None:
    warnings.simplefilter("ignore")  # PEFT and transformers disagree on names
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--experts", type=int, default=8, help="where other numbers change")
    parser.add_argument("--rank", type=int, default=4, help="of each expert, likewise")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.set_defaults(size="growth")
    arguments = parser.parse_args()
    base = Setting(
        size=SIZE,
        num_experts=arguments.experts,
        rank=arguments.rank,
        device=arguments.device,
        dtype=DTYPES[arguments.dtype],
    )
    plan = [
        (axis, x, setting) for axis, points in sweeps(base).items() for x, setting in points.items()
    ]
    found: dict[str, dict[int, dict[str, dict[str, float]]]] = {}
    for axis, x, setting in track(plan, "measuring"):
        found.setdefault(axis, {})[x] = measure(setting, arguments.rounds)
    path = write_results("growth", {"where": where(arguments), "growth": found})
    line_panels(
        path.with_suffix(".png"),
        panels(found),
        title="What a training step costs as it grows",
        subtitle=f"{base.num_experts} experts of rank {base.rank}, 128 tokens, 28 linear layers of width "
        f"{SIZE.width} where not said otherwise; ours and the loop with the router",
    )


if __name__ == "__main__":
    main()
