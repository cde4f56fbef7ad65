"""A base's processor as a config wants it, and how its boxes are written.

LLaVA-1.5 was trained on pictures padded to a square, and its files on the hub ask for a centre crop:
{do_pad: true} brings the padding back. Boxes follow, since data/geometry.py reads the same settings.
"""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import transformers
from transformers import AutoProcessor

from data.boxes import CODECS
from moa.backbones.families import Family

KEY = "model.image_processor"
LOCATION = re.compile(r"<loc\d{4}>")
NOT_SETTINGS = ("data_format", "input_data_format", "device", "return_tensors", "disable_grouping")


def open_processor(name: str, settings: Mapping[str, Any] | None = None) -> Any:
    """The processor of a folder or hub name, with other `settings` of its image processor."""
    try:
        processor = AutoProcessor.from_pretrained(name)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model: {name} has no processor that can be read: {reason}") from error
    if settings:
        processor.image_processor = adjusted(processor.image_processor, settings)
    return processor


def adjusted(image_processor: Any, settings: Mapping[str, Any]) -> Any:
    """The image processor with other settings; ValueError for one that it does not have."""
    kind = type(image_processor)
    if settings.get("do_pad") and kind.__name__.startswith("CLIPImageProcessor"):
        # CLIP's own do_pad fills a batch up at the right and bottom; its twin pads to a square
        kind = getattr(transformers, kind.__name__.replace("CLIP", "Llava"))
    known = sorted({*kind.valid_kwargs.__annotations__} - {*NOT_SETTINGS})
    for name in settings:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"{KEY}.{name}: {kind.__name__} has no such setting; {hint}choices: "
                f"{', '.join(known)}"
            )
    try:
        return kind.from_dict({**image_processor.to_dict(), **settings})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{KEY}: {kind.__name__}: {str(error).splitlines()[0]}") from error


def box_convention(family: Family, tokenizer: Any) -> str | None:
    """The name in CODECS of how a base writes boxes: by location tokens where its vocabulary has
    just as many, else as its family was trained; None where nothing is known."""
    vocabulary = tokenizer.get_vocab()
    numbers = (int(token[4:8]) for token in vocabulary if LOCATION.fullmatch(token))
    last = max(numbers, default=None)
    named = (name for name, codec in CODECS.items() if codec.tokens and codec.units == last)
    return next(named, family.box_codec)
