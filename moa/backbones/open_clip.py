"""The models of open_clip, with their attention split into linear layers that experts can wrap.

open_clip:ViT-B-32:laion2b_s34b_b79k   an architecture, and its weights by tag or checkpoint file
open_clip:hf-hub:ORG/REPO              from the hub
open_clip:FOLDER                       a folder with open_clip_config.json, or that folder alone
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from moa.backbones.attention import pack_attention, split_attention
from moa.backbones.clip import ClipBackbone, check_end_of_text
from moa.backbones.clip_processor import of_open_clip
from moa.backbones.loading import faults_of
from moa.files.atomic import atomic_folder, write_file, write_json

PREFIX, CONFIG, WEIGHTS = "open_clip:", "open_clip_config.json", "open_clip_model.safetensors"
REPORT, TOLERANCE = "export_report.json", 1e-5  # of normalised features, in float32


@dataclass(frozen=True, kw_only=True)
class OpenClipBackbone(ClipBackbone):
    """open_clip's CLIP or CustomTextCLIP; `config` is what its folder's config file would hold."""

    config: dict[str, Any] = field(default_factory=dict)

    recomputes: ClassVar[bool] = False  # open_clip's own checkpointing has no place for the gates

    @property
    def embedding(self) -> Any:
        return text_tower(self.model).token_embedding

    def pooled_place(self, ids: Tensor) -> tuple[str, int | None]:
        text = text_tower(self.model)
        pooling = text.text_pool_type if text is self.model else text.pool_type
        return "the largest id", int(ids.argmax()) if pooling == "argmax" else None

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def _text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.encode_text(input_ids)

    def _image_tokens(self, pixels: Tensor) -> Tensor:
        return image_tokens(self.model, pixels)


def text_tower(model: Any) -> Any:
    """CustomTextCLIP keeps its text tower in a module, CLIP in itself."""
    return getattr(model, "text", model)


def image_tokens(model: Any, pixels: Tensor) -> Tensor:
    options = {"indices": 1, "intermediates_only": True, "output_fmt": "NLC"}
    return model.visual.forward_intermediates(pixels, **options)["image_intermediates"][-1]


def is_open_clip(name: str) -> bool:
    return name.startswith(PREFIX) or Path(name, CONFIG).is_file()


def load_open_clip(name: str, dtype: torch.dtype = torch.float32) -> OpenClipBackbone:
    """A frozen model in eval mode, never one with random weights; ValueError for a wrong name."""
    import open_clip  # here: it imports torchvision and timm, which only its users need

    architecture, pretrained = parse_name(name)
    with faults_of(name, "open_clip files"):
        # without patch dropout: the frozen base sees whole images, in training too
        options: dict[str, Any] = {"require_pretrained": True, "force_patch_dropout": 0.0}
        made = open_clip.create_model_and_transforms(architecture, pretrained, **options)
        model, transform, tokenizer = made[0], made[2], open_clip.get_tokenizer(architecture)
    preprocessing = dict(model.visual.preprocess_cfg)
    config = {"model_cfg": open_clip.get_model_config(architecture), "preprocess_cfg": preprocessing}
    split_attention(model)
    text = text_tower(model)
    if hasattr(text, "transformer"):  # it reads the dtype off a layer's weight, which a wrapped one does not have
        text.transformer.get_cast_dtype = lambda: text.token_embedding.weight.dtype
    model = model.eval().requires_grad_(False)
    processor = of_open_clip(tokenizer, transform, model)
    with torch.no_grad():
        tokens = image_tokens(model, torch.zeros(1, 3, *processor.image_processor.sides))
    widths = {"image": tokens.shape[-1], "text": text.token_embedding.weight.shape[1]}
    backbone = OpenClipBackbone(model=model.to(dtype), processor=processor, dims=widths, name=name, config=config)
    check_end_of_text(backbone)
    return backbone


def parse_name(name: str) -> tuple[str, str | None]:
    """What open_clip calls the architecture, and its weights."""
    plain = name.removeprefix(PREFIX)
    if Path(plain).is_dir():
        return f"local-dir:{plain}", None
    if plain.startswith("hf-hub:"):
        return plain, None
    architecture, _, pretrained = plain.partition(":")
    if not pretrained:
        raise ValueError(
            f"model: {name} names no weights and is not a folder; write open_clip:ARCHITECTURE:TAG or "
            "FILE, open_clip:hf-hub:ORG/REPO or open_clip:FOLDER"
        )
    return architecture, pretrained


def files_of_open_clip(name: str) -> tuple[list[Path], dict[str, Any]]:
    """The weight file that `load_open_clip` reads, and the architecture's config."""
    import open_clip
    from open_clip.factory import _find_checkpoint_in_dir
    from open_clip.pretrained import download_pretrained, download_pretrained_from_hf

    architecture, pretrained = parse_name(name)
    with faults_of(name, "open_clip files"):
        config = open_clip.get_model_config(architecture)
        if architecture.startswith("local-dir:"):
            file = _find_checkpoint_in_dir(Path(architecture.removeprefix("local-dir:")))
        elif pretrained is None:
            file = download_pretrained_from_hf(architecture.removeprefix("hf-hub:"))
        elif Path(pretrained).is_file():
            file = pretrained
        else:
            file = download_pretrained(open_clip.get_pretrained_cfg(architecture, pretrained))
    if not file or config is None:
        raise ValueError(f"model: {name} has no weights, or an architecture unknown to open_clip")
    return [Path(file)], dict(config)


def export_open_clip(
    out: str | Path,
    backbone: OpenClipBackbone,
    deltas: Mapping[str, Float[Tensor, "out in"]],
    report: Mapping[str, Any],
    card: str,
) -> dict[str, Any]:
    """The base plus an update of some of its (split) linear layers, as a folder that plain open_clip
    loads by `local-dir:`, under the keys it always had; returns the export's report.

    Raises ValueError, and writes nothing, where open_clip's own model of these files computes something else.
    """
    model = deepcopy(backbone.model)
    with torch.no_grad():
        for site, delta in deltas.items():
            weight = model.get_submodule(site).weight
            weight.copy_(weight.to(delta.dtype) + delta)
    expected = probe_features(model, backbone)
    pack_attention(model)
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    with atomic_folder(out) as folder:
        save_file(state, folder / WEIGHTS)
        write_json(folder / CONFIG, backbone.config)
        inner = backbone.processor.tokenizer.tokenizer
        if hasattr(inner, "save_pretrained"):
            inner.save_pretrained(folder)
        difference = reload_difference(folder, backbone, expected)
        full = {"kind": "open_clip", "keys_written": len(state), "sites_changed": len(deltas)}
        full |= {"max_abs_difference": difference, **report}
        write_file(folder / "README.md", card)
        write_json(folder / REPORT, full)
    return full


@torch.no_grad()
def probe_features(model: Any, backbone: OpenClipBackbone) -> Tensor:
    """Normalised features of two images of noise and two texts."""
    size = backbone.processor.image_processor.sides
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    ids, _ = backbone.processor.texts(["a cat", "two dogs"])
    found = model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True)
    return torch.cat(found)


def reload_difference(folder: Path, backbone: OpenClipBackbone, expected: Tensor) -> float:
    import open_clip

    plain = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
    difference = float((probe_features(plain, backbone) - expected).abs().max())
    if not difference < TOLERANCE:
        raise ValueError(f"{folder}: reloaded features differ by {difference:.2g}; nothing was written")
    return difference
