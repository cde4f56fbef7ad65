"""Bases in 4 or 8 bits by bitsandbytes: experts stay in full precision around the quantised layers.

bitsandbytes' Linear4bit and Linear8bitLt are nn.Linear, so that the bank wraps them as any other.
"""

from importlib.util import find_spec
from typing import Any

import torch

QUANTIZATIONS = ("4bit", "8bit")


def quantization_config(name: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of from_pretrained for a base in 4 bits (NF4, as QLoRA) or 8 bits; none for None.

    `dtype` is that of the products. Raises ValueError where the machine has no CUDA device or no bitsandbytes.
    """
    if name is None:
        return {}
    if name not in QUANTIZATIONS:
        raise ValueError(f"model.quantization: {name!r}; choices: null, {', '.join(QUANTIZATIONS)}")
    missing = [] if torch.cuda.is_available() else ["a CUDA device"]
    missing += [] if find_spec("bitsandbytes") else ["the package bitsandbytes"]
    if missing:
        raise ValueError(
            f"model.quantization: {name} needs {' and '.join(missing)}, which this machine has not; choices here: null"
        )
    from transformers import BitsAndBytesConfig

    four: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    four |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    config = BitsAndBytesConfig(**({"load_in_8bit": True} if name == "8bit" else four))
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}
