"""Merging against PEFT's `svd`, against an argsort TIES, and against reading and writing alone.

    python -m bench.merging [sites=224] [layers=3] [peft=false]

One 4096 x 4096 site with four experts is merged by PEFT and by us. Then a set of adapters as large as those of a 7B
LLaVA (224 sites, rank 16, random factors) is merged by `linear`, at a fixed rank, and by TIES in core space, each in a
process of its own, beside reading the same inputs and writing the same output. Then two sharded checkpoints of a base,
with tensors of a 7B model's shapes. Ratios are theirs over ours, seconds are wall time, `*_vs_io` are ours over reading
and writing alone, and peaks are the whole process's, those of `checkpoint_extra_gb` above what it held before it began.
Writes results/bench_merging.json.
"""

from dataclasses import dataclass

from rich.console import Console

from bench.settings import machine, run_bench, write_results
from moa.cli.ranges import Count


@dataclass(frozen=True, kw_only=True)
class Settings:
    sites: Count = 224  # of the large set; 224 is a 7B LLaVA
    layers: Count = 3  # of the checkpoints: 0.4 GB each in three models and a result
    peft: bool = True  # its SVDs take some CPU-minutes


def run(settings: Settings, console: Console) -> None:
    import torch

    from bench.merges import against_peft, checkpoints, dense_ties, large_sets, remerge

    torch.manual_seed(0)
    found = {**remerge(), **dense_ties(), **large_sets(settings.sites)}
    found |= checkpoints(settings.layers)
    if settings.peft:
        found |= against_peft()
    write_results("merging", {"where": machine(), **found})


if __name__ == "__main__":
    run_bench(Settings, run, __doc__)
