"""Where the figures of all benchmarks go: results/bench_<name>.json, with the machine that they were taken on."""

import json
import subprocess
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import torch

from moa.files.atomic import write_file

ROOT = Path(__file__).parent.parent


def machine(device: str = "cpu") -> dict[str, str | int]:
    """What ran a benchmark, and when."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT
    )
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "date": date.today().isoformat(),
    }


def write_results(name: str, figures: Mapping[str, object]) -> Path:
    """Put figures into results/bench_<name>.json, from where README and charts take them."""
    path = ROOT / "results" / f"bench_{name}.json"
    write_file(path, json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))
    return path
