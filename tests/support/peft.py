"""A PEFT folder read whole, and an export reloaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForImageTextToText

from moa.files.peft import fit_to_base, read_header, read_tensors
from moa.merging.export.verify import outputs_of


def read_expert(
    path: str | Path, *, base_shapes: Mapping[str, tuple[int, int]] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by PEFT key, as stored, and config; `base_shapes` refuses an adapter of another base."""
    header = read_header(path)
    if base_shapes is not None:
        header = fit_to_base(header, base_shapes)
    return read_tensors(header), header.config


def outputs_here(inputs, *, model, adapter=None, new_tokens):
    """In place of `fresh_outputs`: reloaded in this process, as a fresh one costs seconds of imports."""
    loaded, info = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    if adapter:
        loaded = PeftModel.from_pretrained(loaded, adapter)
    return outputs_of(loaded.eval(), inputs, new_tokens), {"consumed": None}
