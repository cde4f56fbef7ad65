"""Tensors set aside in an unnamed file and handed back as maps of it: what a merge has done takes no memory."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, as torch allocates


@dataclass(frozen=True)
class Spool:
    """A file that only grows, until it is closed; its maps outlive it."""

    file: IO[bytes]
    dtype: torch.dtype  # of what is kept: rounded once, to what will be stored

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor in the spool's dtype, on the disk."""
        stored = tensor.to(self.dtype).contiguous()
        start = self.file.seek(0, 2)
        start += self.file.write(b"\0" * (-start % ALIGNMENT))
        self.file.write(stored.reshape(-1).view(torch.uint8).numpy().data)
        self.file.flush()
        # Copy on write: a reader's change would stay its own.
        mapped = np.memmap(self.file, np.uint8, "c", start, (stored.nbytes,))
        return torch.from_numpy(mapped).view(self.dtype).view(stored.shape)


@contextmanager
def open_spool(folder: str | Path, dtype: torch.dtype) -> Iterator[Spool]:
    """A spool on the disk where `folder` is, or will be; it has no name there and leaves nothing behind."""
    nearest = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.is_dir())
    with tempfile.TemporaryFile(dir=nearest) as file:
        yield Spool(file, dtype)
