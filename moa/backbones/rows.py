"""Which sample each row of the vision tower belongs to.

A tower sees images, tiles, or the patches of all images in one row. Where all rows become equally many image tokens, a
sample has as many rows as its share of them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from moa.backbones.families import Family


def image_rows(
    counts: Int[Tensor, " batch"],
    inputs: Mapping[str, Tensor],
    image_index: Int[Tensor, " images"],
    config: Any,
    family: Family,
) -> dict[str, Int[Tensor, " _"]]:
    """By stream ("image", and "merged" where rows are patches), the sample of each row.

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
