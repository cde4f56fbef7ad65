"""What bench.merging measures: one site, adapters of a 7B model, whole checkpoints."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.settings import in_own_process, process_kib
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
LAYER = [(SIZE, SIZE)] * 4 + [(11008, SIZE), (11008, SIZE), (SIZE, 11008)]  # of a 7B LLaVA
MERGES: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "rank": "sum"},
    "svd": {"method": "linear", "rank": 16},
    "ties_core": {"method": "ties", "rank": 16},
}
Metrics = dict[str, float]
Factors = list[tuple[Tensor, Tensor]]  # A [rank, in] and B [out, rank] of each expert


def timed(function: Callable[[], Any], clock: Any = time.perf_counter) -> tuple[float, Any]:
    began = clock()
    result = function()
    return clock() - began, result


def random_factors(rank: int, count: int, rows: int = SIZE, columns: int = SIZE) -> Factors:
    def draw(*shape: int) -> Tensor:
        return (DELTA_SCALE / rank**0.5) ** 0.5 * torch.randn(shape)

    return [(draw(rank, columns), draw(rows, rank)) for _ in range(count)]


def peft_svd(factors: Factors, rank: int) -> tuple[float, Tensor]:
    """CPU-seconds of PEFT's merge, and the update that it makes."""

    layer = nn.ModuleDict({"linear": nn.Linear(SIZE, SIZE, bias=False)})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["linear"])
    model: Any = get_peft_model(layer, config, adapter_name="e0")  # type: ignore[arg-type]
    for index, (a, b) in enumerate(factors):
        if index:
            model.add_adapter(f"e{index}", config)
        linear = model.base_model.model.linear
        linear.lora_A[f"e{index}"].weight.data, linear.lora_B[f"e{index}"].weight.data = a, b
    names, weights = [f"e{i}" for i in range(len(factors))], [1 / len(factors)] * len(factors)
    add = partial(model.add_weighted_adapter, names, weights, "merged", svd_rank=rank)
    seconds, _ = timed(partial(add, combination_type="svd"), time.process_time)
    return seconds, linear.get_delta_weight("merged").detach()


def our_svd(factors: Factors, rank: int) -> tuple[float, Tensor]:
    def run() -> Tensor:
        # in double precision and without canonical axes, as scripts.merge merges a sum
        updates = to_core([(a.double(), b.double()) for a, b in factors], canonical=False)
        low = compress(updates, updates.cores.mean(0), rank, rank * len(factors))
        return low.lora_b @ low.lora_a

    run()  # warm
    rounds = 20 if rank < 64 else 3
    seconds, results = timed(lambda: [run() for _ in range(rounds)], time.process_time)
    return seconds / rounds, results[-1]


def against_peft() -> Metrics:
    """On one thread each: threads that wait for work would count as CPU-seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {"svd_error": 0.0}
    for rank in (16, 128):
        factors = random_factors(rank, NUM_EXPERTS)
        theirs, their_update = peft_svd(factors, rank)
        ours, update = our_svd(factors, rank)
        found[f"svd_r{rank}_vs_peft"] = theirs / ours
        found["svd_error"] = max(float((update - their_update).abs().max()), found["svd_error"])
        print(f"svd, rank {rank}: PEFT {theirs:.1f} CPU-s, ours {ours:.4f}")
    torch.set_num_threads(threads)
    return found


def argsort_ties(updates: Tensor, density: float) -> Tensor:
    """TIES as it is usually written: sort every update whole (mean of what agrees)."""
    kept = torch.zeros_like(updates)
    for own, update in zip(kept, updates, strict=True):
        flat = update.flatten()
        order = flat.abs().argsort(descending=True)[: int(density * flat.numel()) + 1]
        own.view(-1)[order] = flat[order]
    agrees = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
    return torch.where(agrees, kept, 0.0).sum(0) / agrees.sum(0).clamp(min=1)


def dense_ties() -> Metrics:
    factors = random_factors(16, NUM_EXPERTS)
    names, shape = tuple(f"e{i}" for i in range(NUM_EXPERTS)), (SIZE, SIZE)

    def read(start: int, stop: int) -> Tensor:
        return torch.stack([b[start:stop] @ a for a, b in factors])

    stack = Stack(site="q", experts=names, ranks=(16,) * NUM_EXPERTS, shape=shape, read=read)
    ours, merged = timed(lambda: METHODS["ties"].function(stack, torch.ones(NUM_EXPERTS)))
    theirs, expected = timed(lambda: argsort_ties(stack.whole(), 0.2))
    different = float((merged != expected).float().mean())
    print(f"dense TIES: argsort {theirs:.2f} s, ours {ours:.2f} s, {different:.1e} entries differ")
    return {"ties_dense_vs_argsort": theirs / ours}


def remerge() -> Metrics:
    """Merging again from the cached core of one site, as a search over weights does."""
    count = 8
    updates = to_core([(a.double(), b.double()) for a, b in random_factors(16, count)])
    names, weights = tuple(f"e{i}" for i in range(count)), torch.rand(count, dtype=torch.float64)
    stack = stack_of(site="q", experts=names, matrices=updates.cores)
    slowest = 0.0
    for name in ("linear", "ties", "dare_ties", "tsv_m", "iso_c", "wudi"):
        function = METHODS[name].function
        function(stack, weights)  # warm
        seconds, _ = timed(lambda f=function: [f(stack, weights) for _ in range(5)])  # type: ignore[misc]
        slowest = max(slowest, seconds / 5)
        print(f"re-merging one site, {name}: {seconds / 5 * 1e3:.1f} ms")
    return {"remerge_ms": slowest * 1e3}


def write_adapters(folder: Path, num_sites: int) -> list[Path]:
    """Random adapters shaped like those of a 7B LLaVA."""
    places = [divmod(index, len(LAYER)) for index in range(num_sites)]
    shapes = {f"model.language_model.layers.{i}.site_{part}": LAYER[part] for i, part in places}
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": list(shapes)}
    paths = [folder / f"e{expert}" for expert in range(NUM_EXPERTS)]
    for path in paths:
        tensors: dict[str, Tensor] = {}
        for site, shape in shapes.items():
            (pair,) = random_factors(16, 1, *shape)
            tensors.update(zip(site_keys(site), (t.bfloat16() for t in pair), strict=True))
        save_expert(path, tensors, config)
    return paths


def merge_adapters(paths: list[Path], out: Path, settings: dict[str, Any]) -> tuple[float, float]:
    """Wall seconds of a merge from files to a file, and the process's peak memory in GB."""
    experts = [expert_from_folder(path) for path in paths]
    dtype = torch.float32  # factors in 16 bits carry less

    def run() -> None:
        with open_spool(out.parent, stored_dtype(experts)) as keep:
            export_adapter(out, merge(experts, dtype=dtype, keep=keep, **settings), experts)

    return timed(run)[0], process_kib("VmHWM") * 1024 / 1e9


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

    return timed(run)[0]


def large_sets(num_sites: int) -> Metrics:
    found: Metrics = {"llava7b_peak_gb": 0.0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_adapters(folder, num_sites)
        for label, settings in MERGES.items():
            out = folder / label
            seconds, peak = in_own_process(merge_adapters, paths, out, settings)
            io = io_seconds([path / WEIGHTS_FILE for path in paths], [out / WEIGHTS_FILE])
            found |= {f"llava7b_{label}_s": seconds, f"llava7b_{label}_vs_io": seconds / io}
            found["llava7b_peak_gb"] = max(peak, found["llava7b_peak_gb"])
            print(f"{num_sites} sites, {label}: {seconds:.2f} s, io {io:.2f} s, peak {peak:.2f} GB")
    return found


def write_checkpoints(folder: Path, num_layers: int) -> dict[str, Path]:
    """A base and two models in bfloat16 shards of a layer each, shaped like a 7B model's."""
    shards = [{"model.embed_tokens.weight": (32000, SIZE)}]
    for i in range(num_layers):
        shards.append({f"model.layers.{i}.part_{j}.weight": s for j, s in enumerate(LAYER)})
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


def merge_models(paths: Mapping[str, Path], out: Path, method: str) -> tuple[float, float]:
    """Wall seconds, and peak memory above the process's own in GB."""
    models = {name: path for name, path in paths.items() if name != "base"}
    before = process_kib("VmHWM") * 1024 / 1e9
    seconds, _ = timed(lambda: merge_checkpoints(out, models, paths["base"], method=method))
    return seconds, process_kib("VmHWM") * 1024 / 1e9 - before


def checkpoints(num_layers: int) -> Metrics:
    largest = 32000 * SIZE * (3 * 2 + 2 + 4) / 1e9  # inputs and output in 16 bits, the sum in 32
    print(f"the largest tensor needs {largest:.2f} GB")
    found: Metrics = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = in_own_process(write_checkpoints, folder, num_layers)
        inputs = [file for path in paths.values() for file in path.glob("*.safetensors")]
        for method in ("linear", "ties"):
            out = folder / method
            seconds, extra = in_own_process(merge_models, paths, out, method)
            io = io_seconds(inputs, sorted(out.glob("*.safetensors")))
            shutil.rmtree(out)
            key = f"checkpoint_{method}"
            found |= {f"{key}_vs_io": seconds / io, f"{key}_extra_gb": extra}
            print(f"two checkpoints, {method}: {seconds:.1f} s, io {io:.1f} s, {extra:.2f} GB more")
    return found
