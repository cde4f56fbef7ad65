"""Training speed and activation memory of the mixture, against what else one could run.

    python -m bench.mixture [size=tiny|small|slice7b|large|llava7b] [rank=8]
        [device=cpu|cuda] [dtype=fp32|bf16] [checkpointing=true]

One expert layer (also with one A for all experts), and one whole training step (router, forward,
backward, AdamW), each beside its contenders (bench.contenders). Ratios are ours over theirs, the
median over rounds in which they took turns. `of peak` is the frozen model's arithmetic per second
over that of one large matrix product. Writes results/bench_mixture_<size>[_<dtype>][_checkpointed].json.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rich.console import Console

from bench.settings import SIZES, Setting, Sized, run_bench, write_results
from moa.cli.ranges import Count, CountOrZero

SLOW = ("loop", "xlora", "per-sample")  # their time grows with the number of experts
NOT_CHECKPOINTED = ("xlora", "per-sample")  # hooks that are gone when layers are recomputed
Table = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Settings(Sized):
    experts: list[Count] = field(default_factory=lambda: [2, 4, 8, 16, 32, 64])
    rounds: Count = 8  # turns of each contender
    contenders: list[str] | None = None  # null: all; frozen and ours always run
    slow_experts: CountOrZero = 4  # loop, xlora and per-sample run for up to so many experts
    checkpointing: bool = False  # recompute each layer in the backward pass

    def chosen(self, num_experts: int) -> list[str]:
        from bench.contenders import CONTENDERS

        names = [*CONTENDERS] if self.contenders is None else self.contenders
        if unknown := {*names} - {*CONTENDERS}:
            raise ValueError(f"contenders: no {unknown}; choices: {', '.join(CONTENDERS)}")
        left_out = {*(NOT_CHECKPOINTED if self.checkpointing else ())}
        left_out |= {*(SLOW if num_experts > self.slow_experts else ())}
        return [n for n in dict.fromkeys([*names, "frozen", "ours"]) if n not in left_out]


def measure_step(names: list[str], setting: Setting, rounds: int, peak: float) -> tuple[Table, dict[str, float]]:
    """Milliseconds and MiB of each contender's step, and the ratios of ours to the others'."""
    from bench.bench_model import flops_of, peak_bytes, race, ratio, saved_bytes
    from bench.contenders import CONTENDERS

    runs = {name: CONTENDERS[name](setting) for name in names}
    steps = {name: run.stepper() for name, run in runs.items()}
    seconds = race(steps, rounds, setting.device)
    work = flops_of(steps["frozen"])
    found = {}
    for name, run in runs.items():
        best = min(seconds[name])
        found[name] = {"ms": best * 1e3, "of peak": work / best / peak}
        if setting.device == "cuda":
            found[name]["peak MiB"] = peak_bytes(steps[name]) / 2**20
        else:
            found[name]["MiB"] = saved_bytes(run.forward, run.model.parameters()) / 2**20
    return found, {name: ratio(seconds, "ours", name) for name in names if name != "ours"}


def print_rows(label: str, table: Mapping[str, Mapping[str, float]]) -> None:
    for name, values in table.items():
        row = "".join(f"{unit} {value:9.2f}   " for unit, value in values.items())
        print(f"{label + ', ' + name:34s}{row}", flush=True)


def run(settings: Settings, console: Console) -> None:
    import torch

    from bench.bench_model import product_rate
    from bench.contenders import measure_layer

    size = SIZES[settings.size]
    print(f"{size}, {settings.place}, {settings.dtype}, {torch.get_num_threads()} threads")
    peak = product_rate(settings.place, settings.at(size, 1).dtype)
    layer, step, layer_ratio, step_ratio = {}, {}, {}, {}
    for count in settings.experts:
        setting = replace(settings.at(size, count), checkpointing=settings.checkpointing)
        layer[count], layer_ratio[count] = measure_layer(setting, settings.rounds)
        print_rows(f"layer, {count} experts", layer[count])
        step[count], step_ratio[count] = measure_step(settings.chosen(count), setting, settings.rounds, peak)
        print_rows(f"step, {count} experts", step[count])
        print_rows(f"{count} experts, ours over", {"theirs": step_ratio[count]})
    dtype = f"_{settings.dtype}" if settings.dtype != "fp32" else ""
    name = f"mixture_{settings.size}{dtype}{'_checkpointed' if settings.checkpointing else ''}"
    ratios = {"layer_ours_over_lora": layer_ratio, "step_ours_over": step_ratio}
    write_results(name, {"where": settings.where(settings.size), **ratios, "layer": layer, "step": step})


if __name__ == "__main__":
    run_bench(Settings, run, __doc__)
