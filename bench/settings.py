"""What the speed benchmarks are set by: the model's size, its device and its types; and where all figures go:
results/bench_<name>.json, with the machine that they were taken on. Without torch, for their help."""

import json
import multiprocessing
import subprocess
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moa.cli.command import command
from moa.cli.ranges import Count
from moa.files.atomic import write_file

if TYPE_CHECKING:
    from torch import dtype

ROOT = Path(__file__).parent.parent
TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Size:
    width: int
    mlp: int
    layers: int
    heads: int
    vocab: int
    vision_width: int
    vision_layers: int = 2
    vision_heads: int
    image_tokens: int  # a square number
    prompt: int
    answer: int
    batch: int


SIZES = {
    "tiny": Size(width=128, mlp=352, layers=2, heads=4, vocab=512, vision_width=64, vision_heads=4,
                 image_tokens=16, prompt=32, answer=16, batch=4),
    "small": Size(width=512, mlp=1360, layers=4, heads=8, vocab=4096, vision_width=256,
                  vision_heads=8, image_tokens=64, prompt=48, answer=16, batch=8),
    "large": Size(width=2048, mlp=5456, layers=16, heads=16, vocab=32000, vision_width=1024,
                  vision_heads=16, image_tokens=256, prompt=96, answer=32, batch=16),
    # One decoder layer of LLaVA-1.5-7B, next to no vocabulary and tower, few tokens: what grows with
    # parameters rather than with tokens weighs more here than in a real batch.
    "slice7b": Size(width=4096, mlp=11008, layers=1, heads=32, vocab=512, vision_width=64,
                    vision_heads=4, image_tokens=64, prompt=24, answer=8, batch=2),
    # LLaVA-1.5-7B, and a share of its fine-tuning batch (128 on 8 devices) at a usual length.
    "llava7b": Size(width=4096, mlp=11008, layers=32, heads=32, vocab=32064, vision_width=1024,
                    vision_layers=24, vision_heads=16, image_tokens=576, prompt=96, answer=96,
                    batch=16),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all contenders of one comparison have in common."""

    size: Size
    num_experts: int
    rank: int  # of each expert
    device: str
    dtype: "dtype"
    targets: str = TARGETS
    checkpointing: bool = False  # recompute each layer in the backward pass


@dataclass(frozen=True, kw_only=True)
class Device:
    """The settings that every benchmark of the mixture has."""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["fp32", "bf16"] = "fp32"
    rank: Count = 4  # of each expert

    @cached_property
    def place(self) -> str:
        import torch

        found = "cuda" if torch.cuda.is_available() else "cpu"
        return found if self.device == "auto" else self.device

    def at(self, size: Size, num_experts: int) -> Setting:
        import torch

        dtype, device = getattr(torch, DTYPES[self.dtype]), self.place
        return Setting(size=size, num_experts=num_experts, rank=self.rank, device=device, dtype=dtype)

    def where(self, size: str) -> dict[str, str | int]:
        return machine(self.place) | {"size": size, "dtype": self.dtype, "rank": self.rank}


@dataclass(frozen=True, kw_only=True)
class Sized(Device):
    """The same, and how large the model is."""

    size: Literal["tiny", "small", "slice7b", "large", "llava7b"] = "small"
    experts: list[Count] = field(default_factory=lambda: [8])


def machine(device: str = "cpu") -> dict[str, str | int]:
    import torch

    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    chip = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    where: dict[str, str | int] = {"device": chip, "threads": torch.get_num_threads()}
    where |= {"torch": torch.__version__, "commit": commit}
    return where | {"date": date.today().isoformat()}


def write_results(name: str, figures: Mapping[str, object]) -> Path:
    """Put figures into results/bench_<name>.json, from where README and charts take them."""
    path = ROOT / "results" / f"bench_{name}.json"
    write_file(path, json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))
    return path


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a function in a fresh process, whose memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def process_kib(name: str) -> int:
    """VmRSS or VmHWM (the peak) of this process since it began; getrusage would count its parent's, too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition(f"{name}:")[2].split()[0])


def run_bench(settings: type, run: Callable[[Any, Any], None], about: str | None) -> None:
    """The command of a benchmark, without warnings: PEFT and transformers disagree on names."""
    warnings.simplefilter("ignore")
    command(settings, run, about)()
