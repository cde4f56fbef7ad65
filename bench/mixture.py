"""Training speed and activation memory of the mixture, against what else one could run.

    python -m bench.mixture [--size tiny|small|slice7b|large|llava7b] [--rank 8]
        [--device cpu|cuda] [--dtype fp32|bf16] [--checkpointing]

One expert layer, and one whole training step (router, forward, backward, AdamW), each beside its
contenders (bench.contenders). Ratios are ours over theirs, the median over rounds in which
they took turns. `of peak` is the frozen model's arithmetic per second over that of one large matrix
product. Writes results/bench_mixture_<size>[_<dtype>][_checkpointed].json.
"""

import argparse
import warnings
from collections.abc import Callable, Mapping
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bench.bench_model import (
    DTYPES,
    SIZES,
    Size,
    flops_of,
    make_parser,
    peak_bytes,
    product_rate,
    race,
    ratio,
    saved_bytes,
    where,
)
from bench.contenders import CONTENDERS, LoopLinear, Setting
from bench.record import write_results
from moa.experts.bank import ExpertBank

SLOW = ("loop", "xlora", "per-sample")  # their time grows with the number of experts
NOT_CHECKPOINTED = ("xlora", "per-sample")  # hooks that are gone when layers are recomputed


def peft_layer(base: nn.Linear, rank: int) -> nn.Module:
    """One LoRA of the given rank as PEFT computes it, without dropout."""
    config = LoraConfig(r=rank, target_modules=["site"])
    model = get_peft_model(nn.ModuleDict({"site": base}), config)  # type: ignore[arg-type]
    return model.get_submodule("base_model.model.site")


def layer_figures(
    num_experts: int, rank: int, size: Size, device: str, dtype: torch.dtype, rounds: int
) -> tuple[dict[str, dict[str, float]], float]:
    """Milliseconds and saved MiB of one linear layer, forward and backward; its ratio to LoRA."""
    torch.manual_seed(0)
    width = size.width
    base = nn.Linear(width, width).requires_grad_(False).to(device, dtype)
    holder = nn.ModuleDict({"site": base})
    bank = ExpertBank.attach(holder, ["site"])
    for i in range(num_experts):
        bank.add(f"expert{i}", rank=rank, alpha=rank)
    plain = nn.Linear(width, width).requires_grad_(False).to(dtype)
    lora = peft_layer(plain, rank * num_experts)
    loop = LoopLinear(base, num_experts, rank)
    layers = {
        "frozen": base,
        "lora": lora.to(device),
        "ours": holder["site"],
        "loop": loop.to(device),
    }
    tokens = size.image_tokens + size.prompt + size.answer
    x = torch.randn(size.batch, tokens, width, device=device, dtype=dtype, requires_grad=True)
    gates = torch.rand(size.batch, 1, num_experts, device=device, requires_grad=True)
    loop.gates = gates
    grad = torch.randn(size.batch, tokens, width, device=device, dtype=dtype)

    def run(name: str) -> Tensor:
        bank.set_gates(gates)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return layers[name](x).to(dtype)

    def step(name: str) -> Callable[[], None]:
        return lambda: run(name).backward(grad)

    seconds = race({name: step(name) for name in layers}, rounds, device)
    owned = [p for layer in layers.values() for p in layer.parameters()]
    memory = {name: saved_bytes(partial(run, name), owned) for name in layers}
    figures = {n: {"ms": min(seconds[n]) * 1e3, "MiB": memory[n] / 2**20} for n in layers}
    return figures, ratio(seconds, "ours", "lora")


def step_figures(
    names: list[str], setting: Setting, rounds: int, peak: float
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Milliseconds and MiB of each contender's step, and the ratios of ours to the others'."""
    runs = {name: CONTENDERS[name](setting) for name in names}
    steps = {name: run.stepper() for name, run in runs.items()}
    seconds = race(steps, rounds, setting.device)
    work = flops_of(steps["frozen"])
    figures = {}
    for name, run in runs.items():
        best = min(seconds[name])
        figures[name] = {"ms": best * 1e3, "of peak": work / best / peak}
        if setting.device == "cuda":
            figures[name]["peak MiB"] = peak_bytes(steps[name]) / 2**20
        else:
            figures[name]["MiB"] = saved_bytes(run.forward, run.model.parameters()) / 2**20
    return figures, {name: ratio(seconds, "ours", name) for name in names if name != "ours"}


def print_rows(label: str, figures: Mapping[str, Mapping[str, float]]) -> None:
    for name, values in figures.items():
        row = "".join(f"{unit} {value:9.2f}   " for unit, value in values.items())
        print(f"{label + ', ' + name:34s}{row}", flush=True)


def chosen(arguments: argparse.Namespace, num_experts: int) -> list[str]:
    """The contenders that run: slow ones for few experts, some not with recomputed layers."""
    left_out = set(NOT_CHECKPOINTED) if arguments.checkpointing else set()
    left_out |= set(SLOW) if num_experts > arguments.slow_experts else set()
    return [name for name in arguments.contenders if name not in left_out]


def main() -> None:
    warnings.simplefilter("ignore")  # PEFT and transformers disagree on names
    parser = make_parser(__doc__, experts=[2, 4, 8, 16, 32, 64], rounds=8)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument(
        "--slow-experts",
        type=int,
        default=4,
        help=f"{', '.join(SLOW)} run for up to so many experts",
    )
    parser.add_argument("--checkpointing", action="store_true", help="recompute each layer")
    arguments = parser.parse_args()
    arguments.contenders += [n for n in ("frozen", "ours") if n not in arguments.contenders]
    size, device, dtype = SIZES[arguments.size], arguments.device, DTYPES[arguments.dtype]
    print(f"{size}, {device}, {arguments.dtype}, {torch.get_num_threads()} threads")

    peak = product_rate(device, dtype)
    layer, step = {}, {}
    layer_ratio, step_ratio = {}, {}
    for count in arguments.experts:
        layer[count], layer_ratio[count] = layer_figures(
            count, arguments.rank, size, device, dtype, arguments.rounds
        )
        print_rows(f"layer, {count} experts", layer[count])
        setting = Setting(
            size=size,
            num_experts=count,
            rank=arguments.rank,
            device=device,
            dtype=dtype,
            checkpointing=arguments.checkpointing,
        )
        names = chosen(arguments, count)
        step[count], step_ratio[count] = step_figures(names, setting, arguments.rounds, peak)
        print_rows(f"step, {count} experts", step[count])
        print_rows(f"{count} experts, ours over", {"theirs": step_ratio[count]})
    parts = [arguments.size, *([arguments.dtype] if arguments.dtype != "fp32" else [])]
    parts += ["checkpointed"] if arguments.checkpointing else []
    write_results(
        "_".join(["mixture", *parts]),
        {
            "where": where(arguments),
            "layer_ours_over_lora": layer_ratio,
            "step_ours_over": step_ratio,
            "layer": layer,
            "step": step,
        },
    )


if __name__ == "__main__":
    main()
