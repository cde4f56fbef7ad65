"""Which backbone a name or folder is, and how it is opened: open_clip's, a dual encoder of transformers, or a LLaVA."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from moa.backbones.clip import ClipBackbone, is_clip, load_clip
from moa.backbones.families import FAMILIES
from moa.backbones.llava import Backbone, load_backbone
from moa.backbones.loading import load_weights, read_any_config
from moa.backbones.open_clip import OpenClipBackbone, is_open_clip, load_open_clip

AnyBackbone = Backbone | ClipBackbone


def class_of(name: str) -> type[AnyBackbone]:
    """The class of a base, by its name and config alone."""
    if is_open_clip(name):
        return OpenClipBackbone
    return ClipBackbone if is_clip(name) else Backbone


def open_backbone(
    name: str,
    dtype: torch.dtype = torch.float32,
    quantization: str | None = None,
    image_processor: Mapping[str, Any] | None = None,
) -> AnyBackbone:
    """The frozen base model that a name means; ValueError for settings without effect on it."""
    kind = class_of(name)
    if not kind.compares:
        return load_backbone(name, dtype, quantization, image_processor)
    if image_processor is not None:
        raise ValueError("model.image_processor: has no effect on a CLIP, which crops as it learned")
    if quantization is not None:
        raise ValueError(f"model.quantization: {quantization} is for language models; a CLIP is small")
    return load_open_clip(name, dtype) if kind is OpenClipBackbone else load_clip(name, dtype)


def open_decoder(name: str) -> nn.Module:
    """What turns `input_ids` into hidden states: the decoder of a text model, or that inside a VLM."""
    kind = read_any_config(name).model_type
    if kind in FAMILIES:
        model = load_weights(AutoModelForImageTextToText, name, dtype="auto")
        return model.get_submodule(FAMILIES[kind].language).eval()
    return load_weights(AutoModelForCausalLM, name, dtype="auto").base_model.eval()
