"""One safetensors file written tensor by tensor; the library's own writer wants all of them in memory at once.

The format: the header's length in 8 bytes, the header as JSON with every tensor's dtype, shape and place, the data.
"""

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from moa.files.checkpoint_files import FLOATS, BaseFiles

NAMES = {dtype: name for name, dtype in FLOATS.items()}
ALIGNMENT = 8  # of the data, as readers that map the file expect


def write_shard(
    path: Path,
    source: BaseFiles,
    keys: Sequence[str],
    tensors: Iterable[tuple[str, Iterable[Tensor]]],
    cast: torch.dtype | None = None,
    origin: Callable[[str], tuple[Path, str]] | None = None,
) -> int:
    """Write `tensors`, which come in the order of `keys`, each in blocks of its rows; returns their bytes.

    `cast` is the dtype of floating tensors; None: each its own. `origin` gives the file and key of a tensor like it.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in keys:
        file_of, own = origin(key) if origin else (source.folder / source.files[key], key)
        with safe_open(file_of, framework="pt") as handle:
            entry = handle.get_slice(own)
            name, shape = entry.get_dtype(), entry.get_shape()
            like = FLOATS.get(name) or handle.get_tensor(own).dtype
            width = like.itemsize
        if cast is not None and name in FLOATS:
            name, width = NAMES[cast], cast.itemsize
        start, end = end, end + width * torch.Size(shape).numel()
        header[key] = {"dtype": name, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, (found, blocks) in zip(keys, tensors, strict=True):
            if key != found:
                raise AssertionError(f"{found} came where {key} was due")
            for block in blocks:
                file.write(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if file.tell() != 8 + len(text) + end:
            raise AssertionError(f"{path}: the tensors are not those of the header")
    return end
