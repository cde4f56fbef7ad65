"""A PEFT folder read whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moa.files.peft import fit_to_base, read_header, read_tensors


def read_expert(
    path: str | Path, *, base_shapes: Mapping[str, tuple[int, int]] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by PEFT key, as stored, and config; `base_shapes` refuses an adapter of another base."""
    header = read_header(path)
    if base_shapes is not None:
        header = fit_to_base(header, base_shapes)
    return read_tensors(header), header.config
