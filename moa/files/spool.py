"""Tensors set aside in an unnamed file and handed back as maps of it: what a merge has done takes no memory."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, as torch allocates


@contextmanager
def open_spool(folder: str | Path, dtype: torch.dtype) -> Iterator[Callable[[Tensor], Tensor]]:
    """Inside, a function that puts a tensor, as `dtype`, into an unnamed file where `folder` is; maps outlive it."""
    nearest = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.is_dir())
    with tempfile.TemporaryFile(dir=nearest) as file:
        yield partial(_keep, file, dtype)


def _keep(file: IO[bytes], dtype: torch.dtype, tensor: Tensor) -> Tensor:
    stored = tensor.to(dtype).contiguous()
    start = file.seek(0, 2)
    start += file.write(b"\0" * (-start % ALIGNMENT))
    file.write(stored.reshape(-1).view(torch.uint8).numpy().data)
    file.flush()
    # Copy on write: a reader's change would stay its own.
    mapped = np.memmap(file, np.uint8, "c", start, (stored.nbytes,))
    return torch.from_numpy(mapped).view(dtype).view(stored.shape)
