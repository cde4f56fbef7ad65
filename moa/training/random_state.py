"""Random states of all processes as tensors: no pickle, one file.

Training draws from torch's streams alone: data order is computed, not drawn.
"""

import torch
from accelerate import Accelerator
from torch import Tensor


def seed_stage(seed: int, stage: int, process: int) -> None:
    """Each stage begins with streams of its own, whatever the stages before have drawn."""
    torch.manual_seed((seed * 1000 + stage) * 10_000 + process)


def rng_tensors(accelerator: Accelerator) -> dict[str, Tensor]:
    """The states of every process, one row each; every process must call it."""
    states = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    rows = {name: state.to(accelerator.device)[None] for name, state in states.items()}
    return {name: accelerator.gather(row).cpu() for name, row in rows.items()}


def restore_rng(tensors: dict[str, Tensor], accelerator: Accelerator) -> None:
    """Take up the saved stream; another number of processes cannot, and keeps the stage's seed."""
    if tensors["cpu"].shape[0] != accelerator.num_processes:
        return
    # clones: torch reads a state as if it began its storage, and crashes on the row of a matrix
    states = {name: rows[accelerator.process_index].clone() for name, rows in tensors.items()}
    torch.set_rng_state(states["cpu"])
    if accelerator.device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], accelerator.device)
