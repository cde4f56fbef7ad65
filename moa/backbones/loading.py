"""A base's files as transformers loads them, where whatever is wrong with them is one line.

transformers fills a weight that the files lack with random numbers, and logs a report that is easy to miss; here
that is an error. Weights are safetensors: no pickle is opened.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.utils import logging

from moa.cli.command import note

QUANTIZATIONS = ("4bit", "8bit")


def read_any_config(name: str) -> Any:
    """The config of a folder or hub name; ValueError for one that transformers cannot make sense of."""
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise ValueError(f"model: {name} is not a folder, and a name of the hub is ORG/MODEL")
    with faults_of(name, "config.json"):
        return AutoConfig.from_pretrained(name)


def load_weights(auto: Any, name: str, **options: Any) -> Any:
    """The model of a folder or hub name by a class of transformers, with every weight from its files.

    Raises ValueError, naming the weights, where some are missing or have another shape, and for files that
    are missing or damaged. Weights that no layer reads are named on stderr.
    """
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # of its report on what is checked here
    try:
        with faults_of(name, "weights"):
            options |= {"use_safetensors": True, "output_loading_info": True}
            # what has another shape is named below
            model, found = auto.from_pretrained(name, ignore_mismatched_sizes=True, **options)
    finally:
        logging.set_verbosity(level)
    check_loaded(name, found)
    return model


def check_loaded(name: str, found: dict[str, Any]) -> None:
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"model: {name} lacks {_several(missing)}: its model would run with random numbers there; "
            "get the whole checkpoint, or the config.json that fits these weights"
        )
    if mismatched := sorted(found["mismatched_keys"]):
        key, stored, wanted = mismatched[0]
        raise ValueError(
            f"model: {name} has {key} as {list(stored)}, and its config.json wants {list(wanted)}; "
            f"{len(mismatched)} weights have another shape, so that weights and config do not belong together"
        )
    if unread := sorted(found["unexpected_keys"]):
        note(f"warning: model: {name}: no layer reads {_several(unread)}")


def _several(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{len(keys)} weights, first {keys[0]}"


@contextmanager
def faults_of(name: str, part: str) -> Iterator[None]:
    """What a library raises inside (each its own kinds, for the same damaged file) is a ValueError of one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise ValueError(f"model: {name}: its {part} cannot be loaded: {kind}{reason[:300]}") from error


def quantization_config(name: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of from_pretrained for a base in 4 bits (NF4, as QLoRA) or 8 bits; none for None.

    bitsandbytes' layers are nn.Linear, so that the bank wraps them as any other, with experts in full precision.
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
    four: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    four |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    config = BitsAndBytesConfig(**({"load_in_8bit": True} if name == "8bit" else four))
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}
