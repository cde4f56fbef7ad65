"""Pretrain the demo's base: a tiny real LLaVA, from nothing, on scenes of the `pretrain` split.

    python -m scripts.demo.pretrain_base out=assets/demo_base ocr=OCR.parquet

1. a CLIP vision tower learns to name what lies under each of its patches, and where that begins and ends;
2. its features of every scene are computed once;
3. projector and Llama learn a generic mixture of every task on these features. Beside it the projected patches are
   taught to look like the words that name them, attention starts out looking for tokens like its own, and two heads
   are taught to look from a name, two more from the answer that places it, to the patches that show it. Without that
   a decoder this small takes very long to find the things that a question names, or to copy a word.

Several questions about one image share a row: each sees the image and itself, nothing else.
The OCR words come from `python -m scripts.ocr scenes=[pretrain:6000] out=OCR.parquet`.
"""

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from moa.cli.command import command
from moa.cli.ranges import Count, FilePath, NotNegative, Seed, Share
from moa.cli.settings import check
from moa.files.atomic import atomic_folder, write_file


@dataclass(frozen=True, kw_only=True)
class Settings:
    out: FilePath  # folder for model, processor and card
    ocr: FilePath  # OCR cache of the pretraining scenes
    scenes: Count = 20_000
    tower_steps: Count = 1500  # of 64 scenes
    steps: Count = 2500  # of 32 scenes
    questions: Count = 6  # about each scene of a step
    seed: Seed = 0
    device: str = "auto"  # cuda where there is one
    bf16: bool = True
    align: NotNegative = 0.5  # weight of patches like words
    point: NotNegative = 0.4  # weight of names that find patches
    read_share: Share = 0.35  # of rows with the word of a sign
    mixture: dict[str, float] = field(default_factory=dict)  # task -> weight, over MIXTURE
    start: FilePath | None = None  # base to continue from, with its tower as it is
    layers: Count | None = None  # so many of the language model's in `start`, the first ones; null: all

    def __post_init__(self) -> None:
        check(self.layers is None or self.start is not None, "layers", "are of start, which is null")


def first_model(args: Settings) -> tuple[Any, Any]:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from scripts.demo.base.model import build_model, build_processor, build_tokenizer, cut_layers
    from scripts.demo.base.questions import corpus

    if args.start:
        model: Any = LlavaForConditionalGeneration.from_pretrained(args.start, dtype="float32")
        if args.layers is not None:
            cut_layers(model, args.layers)
        return model.to(args.device), AutoProcessor.from_pretrained(args.start)
    tokenizer = build_tokenizer(corpus(args.seed))
    model = build_model(tokenizer)
    return model.to(args.device), build_processor(tokenizer)


def run(args: Settings, console: Console) -> None:
    import torch

    from scripts.demo.base.language import answer_questions
    from scripts.demo.base.questions import MIXTURE, Packer
    from scripts.demo.base.tower import encode_scenes, name_patches
    from scripts.demo.base.world import draw_world, read_words

    if args.device == "auto":
        args = replace(args, device="cuda" if torch.cuda.is_available() else "cpu")
    began = time.time()
    torch.manual_seed(args.seed)
    MIXTURE.update(args.mixture)
    model, processor = first_model(args)
    tokenizer = processor.tokenizer
    total = sum(p.numel() for p in model.parameters())
    print(f"{total:,} parameters, {len(tokenizer)} tokens", flush=True)
    world = draw_world(processor, args.scenes, args.seed)
    tower = model.model.vision_tower
    card: dict[str, Any] = {"parameters": total, "seed": args.seed, "scenes": args.scenes}
    if not args.start:
        card["foreground_patches_right"] = round(name_patches(tower, world, args), 3)
        model.save_pretrained(args.out)
        processor.save_pretrained(args.out)
    features = encode_scenes(tower, world, args.device)
    words = read_words(world, Path(args.ocr))
    print(f"{len(words)} scenes, {sum(w is not None for w in words)} read", flush=True)
    answer_questions(model, Packer(tokenizer), world, words, features, args)
    names = ("tower_steps", "steps", "questions", "align", "point", "read_share", "start", "layers", "bf16")
    card |= {name: getattr(args, name) for name in names}
    card |= {"mixture": MIXTURE, "minutes": round((time.time() - began) / 60, 1)}
    with atomic_folder(args.out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_file(folder / "recipe.json", json.dumps(card, indent=2) + "\n")
    print(json.dumps(card))


if __name__ == "__main__":
    command(Settings, run, __doc__)()
