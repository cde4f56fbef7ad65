"""Pretrain the demo's CLIP: a tiny real one, from nothing, on coloured drawings with their names.

    python -m scripts.demo.pretrain_clip out=assets/clip_base

Every step sees other drawings of `batch` different names, and learns CLIP's loss by
`moa.contrastive`. It meets one style, one drawing an image, and no word for a category: line
drawings, flat ones, negatives, categories and pairs are what the experts of configs/clip_demo.yaml add.
"""

import json
from dataclasses import dataclass

from rich.console import Console

from moa.cli.command import command
from moa.cli.ranges import Count, FilePath, Positive, Seed
from moa.files.atomic import atomic_folder, write_file


@dataclass(frozen=True, kw_only=True)
class Settings:
    out: FilePath  # folder for model and processor
    steps: Count = 1800  # of the schedule
    stop: Count | None = None  # leave the schedule after so many steps
    batch: Count = 128  # different names in a step
    lr: Positive = 1e-3
    seed: Seed = 0
    bf16: bool = True


def run(args: Settings, console: Console) -> None:
    import torch

    from scripts.demo.base import clip

    torch.manual_seed(args.seed)
    tokenizer = clip.build_tokenizer()
    model, processor = clip.build_model(tokenizer), clip.build_processor(tokenizer)
    with atomic_folder(args.out) as folder:
        processor.save_pretrained(folder)
        with (folder / "pretraining_log.jsonl").open("w", buffering=1) as log:
            clip.train(model.train(), processor, args, log)
        model.save_pretrained(folder)
        write_file(folder / "recipe.json", json.dumps(clip.recipe_of(model, args), indent=2) + "\n")


if __name__ == "__main__":
    command(Settings, run, __doc__)()
