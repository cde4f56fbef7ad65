"""A base's processor as a config wants it, and how its boxes are written.

LLaVA-1.5 was trained on images padded to a square, and its files on the hub ask for a centre crop:
{do_pad: true} brings the padding back. Boxes follow, since data/geometry.py reads the same settings.
"""

import ctypes
import re
import threading
import warnings
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import transformers
from transformers import AutoProcessor

from data.boxes import CODECS
from data.chat import ChatEncoder, check_parts, message
from data.checks import RefusedError, refusals
from moa.backbones.families import Family
from moa.backbones.loading import faults_of

KEY = "model.image_processor"
LOCATION = re.compile(r"<loc\d{4}>")
TEMPLATE_SECONDS = 5.0  # to write one question and answer, which takes a thousandth of it
PROBE = [message("user", "?", [{"type": "image"}]), message("assistant", "a")]
NOT_SETTINGS = ("data_format", "input_data_format", "device", "return_tensors", "disable_grouping")


def open_processor(name: str, settings: Mapping[str, Any] | None = None) -> Any:
    """The processor of a folder or hub name, with other `settings` of its image processor."""
    with faults_of(name, "processor"):
        processor = AutoProcessor.from_pretrained(name)
    check_processor(processor, name)
    if settings:
        processor.image_processor = adjusted(processor.image_processor, settings)
    return processor


def check_processor(processor: Any, name: str) -> None:
    """ValueError for a processor that lacks a part, or whose template cannot write a question and answer. A missing pad
    token is replaced by the end token, with a note: padding is masked, whatever it is."""
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
        warnings.warn(f"model: {name} has no pad token; {tokenizer.eos_token} pads", stacklevel=2)
    try:
        check_parts(processor)
        with refusals():
            within(TEMPLATE_SECONDS, lambda: ChatEncoder(processor).dialogue(PROBE))
    except RefusedError as error:
        rule = "its chat template fails on a question and its answer; repair chat_template.jinja"
        raise ValueError(f"model: {name}: {rule}: {error}") from error
    except ValueError as error:
        raise ValueError(f"model: {name}: {error}") from error


def within(seconds: float, call: Callable[[], Any]) -> None:
    """Make a call in a thread that is stopped when its time is over; ValueError then."""
    failure: list[Exception] = []

    def run() -> None:
        try:
            call()
        except SystemExit:  # stopped
            return
        except Exception as error:  # raised again below, in the thread that waits
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        stop = ctypes.py_object(SystemExit)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), stop)
        raise ValueError(f"not done after {seconds:g} seconds")
    if failure:
        raise failure[0]


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
            raise ValueError(f"{KEY}.{name}: {kind.__name__} has no such setting; {hint}choices: {', '.join(known)}")
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
