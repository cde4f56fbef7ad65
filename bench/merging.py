"""Merging against PEFT's `svd`, against an argsort TIES, and against reading and writing alone.

    python -m bench.merging [--sites 224] [--layers 3] [--skip-peft]

One 4096 x 4096 site with four experts is merged by PEFT and by us; then a set of adapters as large as those of a
7B LLaVA (224 sites, rank 16, random factors written to a temporary folder) by `linear`, at a fixed rank, and by TIES
in core space, each in a process of its own, beside reading the same inputs and writing the same output and nothing
else. Then two sharded checkpoints of a base, with tensors of a 7B model's shapes. Ratios are
theirs over ours, seconds are wall time, `*_vs_io` are ours over reading and writing alone, and peaks are the whole
process's, those of `checkpoint_extra_gb` above what it held before it began. Writes results/bench_merging.json.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.record import machine, write_results
from moa.files.peft import WEIGHTS_FILE, save_expert, site_keys
from moa.files.spool import open_spool
from moa.merging.adapters import expert_from_folder
from moa.merging.checkpoints.full import merge_checkpoints
from moa.merging.core import compress, to_core
from moa.merging.export.export import export_adapter, stored_dtype
from moa.merging.merge import merge
from moa.merging.methods.stack import Stack, stack_of
from moa.merging.methods.table import METHODS

SIZE, NUM_EXPERTS = 4096, 4
DELTA_SCALE = 1e-4  # of an update's entries, as trained adapters have them
MERGES: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "rank": "sum"},
    "svd": {"method": "linear", "rank": 16},
    "ties_core": {"method": "ties", "rank": 16},
}


def cpu_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    result = function()
    return time.process_time() - began, result


def wall_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def random_factors(
    rank: int, count: int, rows: int = SIZE, columns: int = SIZE
) -> list[tuple[Tensor, Tensor]]:
    scale = (DELTA_SCALE / rank**0.5) ** 0.5
    return [
        (scale * torch.randn(rank, columns), scale * torch.randn(rows, rank)) for _ in range(count)
    ]


# One site against PEFT ------------------------------------------------------------------------------


def peft_svd(factors: list[tuple[Tensor, Tensor]], rank: int) -> tuple[float, Tensor]:
    """CPU-seconds of PEFT's merge, and the update that it makes."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(SIZE, SIZE, bias=False)

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["linear"])
    model: Any = get_peft_model(Layer(), config, adapter_name="e0")  # type: ignore[arg-type]
    for index, (a, b) in enumerate(factors):
        if index:
            model.add_adapter(f"e{index}", config)
        layer = model.base_model.model.linear
        layer.lora_A[f"e{index}"].weight.data, layer.lora_B[f"e{index}"].weight.data = a, b
    names, weights = [f"e{i}" for i in range(len(factors))], [1 / len(factors)] * len(factors)
    seconds, _ = cpu_seconds(
        lambda: model.add_weighted_adapter(
            names, weights, "merged", combination_type="svd", svd_rank=rank
        )
    )
    return seconds, layer.get_delta_weight("merged").detach()


def our_svd(factors: list[tuple[Tensor, Tensor]], rank: int) -> tuple[float, Tensor]:
    def run() -> tuple[Tensor, Tensor]:
        # in double precision and without canonical axes, as scripts.merge merges a sum
        doubles = [(a.double(), b.double()) for a, b in factors]
        updates = to_core(doubles, canonical=False)
        low = compress(updates, updates.cores.mean(0), rank, rank * len(factors))
        return low.lora_a, low.lora_b

    run()  # warm
    rounds = 20 if rank < 64 else 3
    seconds, results = cpu_seconds(lambda: [run() for _ in range(rounds)])
    lora_a, lora_b = results[-1]
    return seconds / rounds, lora_b @ lora_a


def against_peft(figures: dict[str, Any]) -> None:
    """On one thread each: threads that wait for work would count as CPU-seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for rank in (16, 128):
        factors = random_factors(rank, NUM_EXPERTS)
        theirs, their_update = peft_svd(factors, rank)
        ours, update = our_svd(factors, rank)
        figures[f"svd_r{rank}_vs_peft"] = theirs / ours
        error = float((update - their_update).abs().max())
        figures["svd_error"] = max(error, figures.get("svd_error", 0.0))
        print(
            f"svd, rank {rank}: PEFT {theirs:.1f} CPU-s, ours {ours:.4f}, largest difference {error:.1e}"
        )
    torch.set_num_threads(threads)


# Dense TIES -----------------------------------------------------------------------------------------


def argsort_ties(updates: Tensor, density: float) -> Tensor:
    """TIES as it is usually written: sort every update whole (mean of what agrees)."""
    kept = torch.zeros_like(updates)
    for own, update in zip(kept, updates, strict=True):
        flat = update.flatten()
        order = flat.abs().argsort(descending=True)[: int(density * flat.numel()) + 1]
        own.view(-1)[order] = flat[order]
    sign = kept.sum(0).sign()
    agrees = (kept.sign() == sign) & (kept != 0)
    return torch.where(agrees, kept, 0.0).sum(0) / agrees.sum(0).clamp(min=1)


def dense_ties(figures: dict[str, Any]) -> None:
    factors = random_factors(16, NUM_EXPERTS)
    names = tuple(f"e{i}" for i in range(NUM_EXPERTS))
    stack = Stack(
        site="q",
        experts=names,
        ranks=(16,) * NUM_EXPERTS,
        shape=(SIZE, SIZE),
        read=lambda start, stop: torch.stack([b[start:stop] @ a for a, b in factors]),
    )
    ours, merged = wall_seconds(lambda: METHODS["ties"].function(stack, torch.ones(NUM_EXPERTS)))
    theirs, expected = wall_seconds(lambda: argsort_ties(stack.whole(), 0.2))
    different = float((merged != expected).float().mean())
    figures["ties_dense_vs_argsort"] = theirs / ours
    print(
        f"dense TIES: argsort {theirs:.2f} s, ours {ours:.2f} s, {different:.1e} of the entries differ"
    )


def remerge(figures: dict[str, Any]) -> None:
    """Merging again from the cached core of one site, as a search over weights does."""
    count = 8
    updates = to_core([(a.double(), b.double()) for a, b in random_factors(16, count)])
    names, weights = tuple(f"e{i}" for i in range(count)), torch.rand(count, dtype=torch.float64)
    stack = stack_of(site="q", experts=names, matrices=updates.cores)
    slowest = 0.0
    for name in ("linear", "ties", "dare_ties", "tsv_m", "iso_c", "wudi"):
        function = METHODS[name].function
        function(stack, weights)
        seconds, _ = wall_seconds(lambda f=function: [f(stack, weights) for _ in range(5)])  # type: ignore[misc]
        slowest = max(slowest, seconds / 5)
        print(f"re-merging one site, {name}: {seconds / 5 * 1e3:.1f} ms")
    figures["remerge_ms"] = slowest * 1e3


# Adapters of a 7B model -----------------------------------------------------------------------------


def write_adapters(folder: Path, num_sites: int) -> list[Path]:
    """Random adapters shaped like those of a 7B LLaVA: four square sites and three wide ones in seven."""
    shapes = {}
    for index in range(num_sites):
        layer, part = divmod(index, 7)
        wide = [(SIZE, SIZE)] * 4 + [(11008, SIZE), (11008, SIZE), (SIZE, 11008)]
        shapes[f"model.language_model.layers.{layer}.site_{part}"] = wide[part]
    paths = []
    for expert in range(NUM_EXPERTS):
        tensors: dict[str, Tensor] = {}
        for site, (rows, columns) in shapes.items():
            (pair,) = random_factors(16, 1, rows, columns)
            tensors.update(zip(site_keys(site), (t.bfloat16() for t in pair), strict=True))
        config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": list(shapes)}
        save_expert(folder / f"e{expert}", tensors, config)
        paths.append(folder / f"e{expert}")
    return paths


def merge_adapters(paths: list[Path], out: Path, settings: dict[str, Any]) -> tuple[float, float]:
    """Wall seconds of a merge from files to a file, and the process's peak memory in GB."""
    experts = [expert_from_folder(path) for path in paths]
    dtype = torch.float32  # factors in 16 bits carry less

    def run() -> None:
        with open_spool(out.parent, stored_dtype(experts)) as spool:
            export_adapter(out, merge(experts, dtype=dtype, keep=spool.keep, **settings), experts)

    seconds, _ = wall_seconds(run)
    return seconds, peak_gb()


def peak_gb() -> float:
    """Of this process since it began; getrusage would count its parent's, too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def io_seconds(inputs: Sequence[Path], outputs: Sequence[Path]) -> float:
    """Reading all inputs and writing the outputs to the disk, and nothing else."""

    def run() -> None:
        for path in inputs:
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass
        for path in outputs:
            copy = path.with_name("copy")
            shutil.copyfile(path, copy)
            with copy.open("rb") as file:
                os.fsync(file.fileno())
            copy.unlink()

    return wall_seconds(run)[0]


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a function in a fresh process, whose peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def large_sets(figures: dict[str, Any], num_sites: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_adapters(folder, num_sites)
        files = [path / WEIGHTS_FILE for path in paths]
        peak = 0.0
        for label, settings in MERGES.items():
            out = folder / label
            seconds, memory = in_own_process(merge_adapters, paths, out, settings)
            io = io_seconds(files, [out / WEIGHTS_FILE])
            peak = max(peak, memory)
            figures[f"llava7b_{label}_s"] = seconds
            figures[f"llava7b_{label}_vs_io"] = seconds / io
            print(
                f"{num_sites} sites, {label}: {seconds:.2f} s, reading and writing alone {io:.2f} s, "
                f"peak {memory:.2f} GB"
            )
        figures["llava7b_peak_gb"] = peak


# Whole checkpoints ----------------------------------------------------------------------------------


def write_checkpoints(folder: Path, num_layers: int) -> dict[str, Path]:
    """A base and two models in bfloat16 shards of a layer each, shaped like a 7B model's."""
    wide = [(SIZE, SIZE)] * 4 + [(11008, SIZE), (11008, SIZE), (SIZE, 11008)]
    layers = [
        {f"model.layers.{i}.part_{j}.weight": shape for j, shape in enumerate(wide)}
        for i in range(num_layers)
    ]
    shards = [{"model.embed_tokens.weight": (32000, SIZE)}, *layers]
    for name in ("base", "a", "b"):
        (folder / name).mkdir()
        where = {}
        for number, shapes in enumerate(shards):
            file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            tensors = {key: 0.02 * torch.randn(s).bfloat16() for key, s in shapes.items()}
            save_file(tensors, folder / name / file, metadata={"format": "pt"})
            where.update(dict.fromkeys(shapes, file))
        index = json.dumps({"metadata": {}, "weight_map": where})
        (folder / name / "model.safetensors.index.json").write_text(index)
        (folder / name / "config.json").write_text("{}")
    return {name: folder / name for name in ("base", "a", "b")}


def merge_models(paths: dict[str, Path], out: Path, method: str) -> tuple[float, float]:
    """Wall seconds, and peak memory above the process's own in GB."""
    models = {name: path for name, path in paths.items() if name != "base"}
    before = peak_gb()
    seconds, _ = wall_seconds(lambda: merge_checkpoints(out, models, paths["base"], method=method))
    return seconds, peak_gb() - before


def checkpoints(figures: dict[str, Any], num_layers: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = in_own_process(write_checkpoints, folder, num_layers)
        inputs = [file for path in paths.values() for file in path.glob("*.safetensors")]
        largest = (
            32000 * SIZE * (3 * 2 + 2 + 4) / 1e9
        )  # inputs and output in 16 bits, the sum in 32
        for method in ("linear", "ties"):
            out = folder / method
            seconds, memory = in_own_process(merge_models, paths, out, method)
            io = io_seconds(inputs, sorted(out.glob("*.safetensors")))
            shutil.rmtree(out)
            figures[f"checkpoint_{method}_vs_io"] = seconds / io
            figures[f"checkpoint_{method}_extra_gb"] = memory
            print(
                f"two checkpoints of {num_layers} layers, {method}: {seconds:.1f} s, reading and writing alone "
                f"{io:.1f} s, peak {memory:.2f} GB more than before; the largest tensor needs {largest:.2f} GB"
            )


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--sites", type=int, default=224, help="of the large set; 224 is a 7B LLaVA"
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=3,
        help="of the checkpoints: 0.4 GB each in three models and a result",
    )
    parser.add_argument("--skip-peft", action="store_true", help="its SVDs take some CPU-minutes")
    args = parser.parse_args()
    torch.manual_seed(0)
    figures: dict[str, Any] = {}
    remerge(figures)
    dense_ties(figures)
    large_sets(figures, args.sites)
    checkpoints(figures, args.layers)
    if not args.skip_peft:
        against_peft(figures)
    write_results("merging", {"where": machine(), **figures})


if __name__ == "__main__":
    main()
