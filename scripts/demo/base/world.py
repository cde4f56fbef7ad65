"""The pretraining scenes as the model sees them: pixels, what each patch shows, OCR words."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaProcessor

from data.ocr import OcrCache, content_hash
from data.world.concepts import CATEGORY, GROUNDS
from data.world.scenes import SIZE, Scene, render_scene
from scripts.demo.base.model import IMAGE_SIZE, PATCH
from scripts.demo.base.steps import track

LABELS = ("sign", *GROUNDS, *CATEGORY)  # what a patch can be called


def patch_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """What covers most of each patch: [patches] its label, [patches, 4] its box in parts of the side.

    The ground has no box: its patches hold NaN.
    """
    owner = np.zeros((SIZE, SIZE), dtype=np.int64)
    covers = [(scene.ground, (np.nan,) * 4)]
    if scene.sign:
        covers.append(("sign", scene.sign.box))
    covers += [(thing.name, thing.box) for thing in scene.things]
    for number, (_, box) in enumerate(covers[1:], start=1):
        x0, y0, x1, y1 = map(int, box)
        owner[y0:y1, x0:x1] = number
    side = IMAGE_SIZE // PATCH
    cells = owner.reshape(side, SIZE // side, side, SIZE // side).transpose(0, 2, 1, 3)
    counts = np.apply_along_axis(np.bincount, 1, cells.reshape(side * side, -1), None, len(covers))
    most = counts.argmax(1)
    labels = np.array([LABELS.index(name) for name, _ in covers])
    boxes = np.array([box for _, box in covers], dtype=np.float32) / SIZE
    return labels[most], boxes[most]


@dataclass(frozen=True, kw_only=True)
class World:
    """The pretraining scenes as the model sees them."""

    scenes: list[Scene]
    pixel_values: Tensor  # [scenes, 3, height, width] float16
    labels: Tensor  # [scenes, patches]
    boxes: Tensor  # [scenes, patches, 4] in parts of the side; NaN on the ground
    hashes: list[str]  # of the images, as the OCR cache knows them


def draw_world(processor: LlavaProcessor, num_scenes: int, seed: int) -> World:
    scenes, pixels, covers, hashes = [], [], [], []
    for start in track(range(0, num_scenes, 100), "draw"):
        drawn = [render_scene("pretrain", i, seed) for i in range(start, start + 100)]
        images = [image for image, _ in drawn]
        batch = processor.image_processor(images=images, return_tensors="pt")
        pixels.append(batch["pixel_values"].half())
        hashes += [content_hash(image) for image in images]
        scenes += [scene for _, scene in drawn]
        covers += [patch_labels(scene) for _, scene in drawn]
    labels, boxes = (torch.from_numpy(np.stack(part)) for part in zip(*covers, strict=True))
    return World(scenes=scenes, pixel_values=torch.cat(pixels), labels=labels, boxes=boxes, hashes=hashes)


def read_words(world: World, cache_file: Path) -> list[str | None]:
    """What the OCR engine read in each scene; None where it did not look."""
    read = OcrCache(cache_file).table
    return [" ".join(w.text for w in read[key]) if key in read else None for key in world.hashes]
