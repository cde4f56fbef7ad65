"""Where the figures of all benchmarks go: results/bench_<name>.json, with the machine that they were taken on."""

import json
import multiprocessing
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

from moa.files.atomic import write_file

ROOT = Path(__file__).parent.parent


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
