"""Backbones of the sizes that people train, as configs alone: no weights, no download.

The sizes are those of the published config.json files. LLaVA-1.5 is CLIP ViT-L/14 at 336 pixels
(openai/clip-vit-large-patch14-336) before Vicuna, which has the sizes of Llama 2: 7B, 13B and 70B of
Touvron et al. 2023 (arXiv:2307.09288). Nobody published a LLaVA-1.5 of 70B: it is the same recipe.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

from moa.backbones.clip import FAMILIES as CLIP_FAMILIES
from moa.backbones.families import FAMILIES
from moa.backbones.llava import Backbone
from moa.backbones.loading import faults_of, read_any_config
from moa.files.targets import is_target

CLIP_LARGE_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
# name -> width, width of the MLP, layers, heads, heads of keys and values
LLAMA_2 = {
    "llava-7b": (4096, 11008, 32, 32, 32),
    "llava-13b": (5120, 13824, 40, 40, 40),
    "llava-70b": (8192, 28672, 80, 64, 8),
}
PLANNED = ("images", "patches")  # towers whose work on an image follows from the config
VOCAB = 32064  # of llava-1.5-*-hf: Llama's 32,000, <image>, <pad>, rounded up


def named_shape(name: str) -> LlavaConfig:
    width, mlp, layers, heads, kv_heads = LLAMA_2[name]
    text = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        pad_token_id=32001,
    )
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP_LARGE_336),
        text_config=text,
        image_token_index=32000,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def find_shape(name: str) -> Any:
    """The config of a named size, of a folder with a config.json, or of a model of the hub."""
    if name in LLAMA_2:
        return named_shape(name)
    folder = Path(name)
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise ValueError(f"backbone: {name!r} is not a folder; choices: {', '.join(LLAMA_2)}, a folder")
    config = read_any_config(name)
    possible = [kind for kind, family in FAMILIES.items() if family.rows in PLANNED]
    if config.model_type not in possible:
        raise ValueError(
            f"backbone: {name} is a {config.model_type}; what an image costs is planned for: {', '.join(possible)}"
        )
    return config


def layer_shapes(name: str) -> dict[str, tuple[int, int]] | None:
    """Every linear layer of a base, as its model in memory spells it -> (out, in); from its config alone. None for an
    architecture that is not loaded here, where the class that adapters wrap is unknown."""
    config = read_any_config(name)
    if config.model_type not in (*FAMILIES, *CLIP_FAMILIES):
        return None
    auto = AutoModelForImageTextToText if config.model_type in FAMILIES else AutoModel
    with faults_of(name, "config.json"), torch.device("meta"):
        model = auto.from_config(config)
    layers = ((name, module) for name, module in model.named_modules() if is_target(module))
    return {name: (layer.out_features, layer.in_features) for name, layer in layers}


def random_backbone(config: Any, dtype: torch.dtype) -> Backbone:
    """A frozen backbone of a config without a processor; on fake tensors it has shapes alone."""
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return Backbone(model=model.eval().requires_grad_(False), processor=None)
