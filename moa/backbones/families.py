"""The LLaVA family as one table: what differs between architectures, a row each.

A row names the parts, which arguments the text side wants, what a row of the vision tower
is, and how wide the tower's tokens are. All else is the same code (llava.py), and transformers' own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

# The first axis of the tower's layers: images or equal tiles of them ("images"), LLaVA-NeXT's tiles after padding is
# dropped ("tiles"), Idefics' slots [batch, slot] without the empty ones ("slots"), or the patches of all images in one
# long row ("patches", each `merge` of which are one row of the projector).
Rows = Literal["images", "tiles", "slots", "patches"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture. Paths are of modules in the conditional-generation model."""

    tower: str = "model.vision_tower"
    language: str = "model.language_model"
    projectors: tuple[str, ...] = ("model.multi_modal_projector",)  # the first is what tokens enter
    rows: Rows = "images"
    image_width: Callable[[Any], int]  # of the tokens that enter the projector, from the config
    # hidden states of the tower that are read; None: the last, after all layers
    feature_layers: Callable[[Any], int | Sequence[int] | None] = lambda config: None
    # argument that marks tokens by 1, and what it marks; the rest has 0
    token_types: tuple[str, Literal["image", "answer"]] | None = None
    first_position: int | None = 0  # of a prompt's tokens; None: the model counts in three axes
    softcap: bool = False  # final_logit_softcapping of the language model's config holds
    text_only: bool = True  # a prompt may come without an image
    several_images: bool = True  # a prompt may have more than one
    box_codec: str | None = None  # the convention of data/boxes.py that it was trained with


def hidden_size(config: Any) -> int:
    """Of the tower, once for each hidden state that is read."""
    layers = getattr(config, "vision_feature_layer", -1)
    count = 1 if isinstance(layers, int) else len(layers)
    return config.vision_config.hidden_size * count


def shuffled_size(config: Any) -> int:
    """InternVL puts neighbouring tokens side by side before it projects them."""
    return config.vision_config.hidden_size * int(1 / config.downsample_ratio) ** 2


LLAVA: dict[str, Any] = {"image_width": hidden_size, "feature_layers": lambda config: config.vision_feature_layer}
IDEFICS: dict[str, Any] = {
    "tower": "model.vision_model",
    "language": "model.text_model",
    "projectors": ("model.connector",),
    "rows": "slots",
    "image_width": hidden_size,
}
QWEN: dict[str, Any] = {
    "tower": "model.visual",
    "projectors": ("model.visual.merger",),
    "rows": "patches",
    "image_width": hidden_size,
    "token_types": ("mm_token_type_ids", "image"),
    "first_position": None,
}
FAMILIES: dict[str, Family] = {  # by model_type of config.json
    "llava": Family(**LLAVA, several_images=False, box_codec="llava"),
    "llava_next": Family(**LLAVA, rows="tiles", box_codec="llava"),
    "llava_onevision": Family(**LLAVA, rows="tiles"),
    "qwen2_vl": Family(**QWEN | {"image_width": lambda config: config.vision_config.embed_dim}, box_codec="qwen2_vl"),
    "qwen2_5_vl": Family(**QWEN, box_codec="qwen2_5_vl"),
    "qwen3_vl": Family(
        **QWEN | {"projectors": ("model.visual.merger", "model.visual.deepstack_merger_list")}, box_codec="qwen3_vl"
    ),
    "idefics3": Family(**IDEFICS),
    "smolvlm": Family(**IDEFICS),
    "paligemma": Family(
        image_width=hidden_size,
        token_types=("token_type_ids", "answer"),
        first_position=1,
        softcap=True,
        text_only=False,
        several_images=False,
        box_codec="paligemma",
    ),
    "internvl": Family(**LLAVA | {"image_width": shuffled_size}, box_codec="internvl"),
    "gemma3": Family(image_width=hidden_size, token_types=("token_type_ids", "image")),
}


def image_rows(
    counts: Int[Tensor, " batch"],
    inputs: Mapping[str, Tensor],
    image_index: Int[Tensor, " images"],
    config: Any,
    family: Family,
) -> dict[str, Int[Tensor, " _"]]:
    """By stream ("image", and "merged" where rows are patches), the sample of each row of the vision tower.

    Where all rows become equally many image tokens, a sample has as many rows as its share of them.
    `counts` are the prompts' image tokens, `inputs` the model's, `image_index` the sample of each image, empty for a
    blank one that is in no prompt. Raises ValueError where the image tokens are no whole number for each row.
    """
    pixels = inputs["pixel_values"]
    if family.rows == "slots":  # [batch, slot, ...]; those of zeros alone are left out
        return {"image": (pixels != 0).flatten(2).any(-1).nonzero()[:, 0]}
    if len(image_index) == 0:
        counts = torch.ones_like(counts[:1])  # the first sample takes the blank image
        image_index = torch.zeros_like(counts)
    if family.rows == "tiles":
        tiles = torch.tensor(_tiles(inputs, config), device=image_index.device)
        return {"image": image_index.repeat_interleave(tiles)}
    rows = pixels.shape[0]
    owners = {"image": _by_share(counts, rows)}
    if family.rows == "patches":
        merge = config.vision_config.spatial_merge_size**2
        owners["merged"] = _by_share(counts, rows // merge)
    return owners


def _by_share(counts: Tensor, rows: int) -> Tensor:
    total = int(counts.sum())
    if total == 0 or bool((counts * rows % total).any()):
        raise ValueError(
            f"input_ids have {total} image tokens for {rows} rows of pixel_values; was a prompt "
            "truncated, or an image left out?"
        )
    samples = torch.arange(len(counts), device=counts.device)
    return samples.repeat_interleave(counts * rows // total, output_size=rows)


def _tiles(inputs: Mapping[str, Tensor], config: Any) -> list[int]:
    """Of each image, as transformers counts them: the whole, and its grid."""
    sizes, numbers = inputs["image_sizes"], inputs.get("batch_num_images")
    cut = [True] * len(sizes)
    if numbers is not None:  # OneVision cuts an image where it is its sample's only one
        cut = [number == 1 for number in numbers.tolist() for _ in range(number)]
    side, grid = config.vision_config.image_size, config.image_grid_pinpoints
    return [
        image_size_to_num_patches(size, grid, side) if is_cut else 1 for size, is_cut in zip(sizes, cut, strict=True)
    ]
