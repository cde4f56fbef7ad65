"""Tiny random dual encoders of the real classes, saved as folders, and pairs for them.

clip, siglip: transformers; open_clip: its own class, folder layout and tokenizer. Without a download.
"""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from data.pairs import PairCollator
from data.sample import Sample
from moa.backbones.clip import ClipBackbone
from moa.backbones.opening import open_backbone
from moa.clip_model import ClipMixture
from moa.experts.bank import ExpertBank
from moa.routing.router import Router
from tests.support.tiny import random_image

KINDS = ("clip", "siglip", "open_clip")
TARGETS = {
    "clip": [r"(vision|text)_model\.encoder\.layers\.\d\.(self_attn|mlp)\..*"],
    "siglip": [r"(vision|text)_model\.encoder\.layers\.\d\.(self_attn|mlp)\..*"],
    "open_clip": [r"(visual\.)?transformer\.resblocks\.\d\.(attn|mlp)\..*"],
}
NAMES = ("cat", "small dog", "bus", "a red fire engine")
EXPERTS = ("photos", "drawings", "maps")
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 14, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def tiny_tokenizer(kind: str, end: int) -> PreTrainedTokenizerFast:
    """`<s> text </s>` for CLIP, `text </s>` padded with `</s>` for SigLIP; </s> has the id `end`."""
    specials = ["<pad>", "<s>", "<unk>", "</s>"]
    if end == 2:
        specials[2:] = ["</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(NAMES, trainer)
    begin = "<s> " if kind == "clip" else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin}$A </s>", special_tokens=[("<s>", 1), ("</s>", end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>" if kind == "clip" else "</s>",
    )


def save_tiny(kind: str, folder: Path, end: int = 3) -> Path:
    """A random model and its processor in a folder, as users have them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save = save_open_clip if kind == "open_clip" else save_transformers
        save(kind, folder, end)
    return folder


def save_transformers(kind: str, folder: Path, end: int) -> None:
    tokenizer = tiny_tokenizer(kind, end)
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 32,
            "bos_token_id": 1, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    vision = {**tower, "hidden_size": 32, "image_size": 24, "patch_size": 12}
    size = {"height": 24, "width": 24}
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
        pictures = CLIPImageProcessor(size=size, do_center_crop=False)
        processor = CLIPProcessor(image_processor=pictures, tokenizer=tokenizer)
    else:
        vision["hidden_size"] = 16  # SigLIP has no projection of pictures
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        pictures = SiglipImageProcessor(size=size)
        processor = SiglipProcessor(image_processor=pictures, tokenizer=tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_open_clip(kind: str, folder: Path, end: int) -> None:
    parts = {key: dict(value) for key, value in OPEN_CLIP.items() if key != "embed_dim"}
    model = open_clip.CLIP(
        embed_dim=OPEN_CLIP["embed_dim"],
        vision_cfg=open_clip.CLIPVisionCfg(**parts["vision_cfg"]),
        text_cfg=open_clip.CLIPTextCfg(**parts["text_cfg"]),
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": OPEN_CLIP, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def pair(number: int, **changes) -> Sample:
    """A picture with one of four names, of one of three experts; classes 0, 1, 2 ... in turn."""
    fields = {
        "id": f"{number}",
        "image_id": f"picture {number}",
        "image": random_image(number),
        "question": "a photo of a {}",
        "answers": (NAMES[number % 4],),
        "choices": NAMES,
        "task": ("find", "name")[number % 2],
        "source": "pets",
        "expert": EXPERTS[number % 3],
    }
    return Sample(**fields | changes)


def collator_of(backbone: ClipBackbone, **changes) -> PairCollator:
    return PairCollator(
        processor=backbone.processor,
        tasks=["find", "name"],
        experts=list(EXPERTS),
        context_length=backbone.processor.context_length,
        **changes,
    )


def mixture_of(folder: Path, kind: str, *, std: float = 0.0, targets=None, **changes) -> ClipMixture:
    """A mixture of three experts with a learned router; `std` gives them and it values."""
    backbone = open_backbone(str(folder))
    bank = ExpertBank.attach(backbone.model, targets or TARGETS[kind], stream_of=backbone.stream_of)
    for name in EXPERTS:
        bank.add(name, rank=2, alpha=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        router = Router(
            experts=3,
            sites=len(bank.sites),
            dims=backbone.dims,
            num_tasks=2,
            hidden=8,
            evidence=("image", "text", "task"),
        )
        if std:
            for parameter in (*bank.parameters(), *router.parameters()):
                parameter.data.normal_(std=std)
    return ClipMixture(backbone, bank, router, **changes).eval()
