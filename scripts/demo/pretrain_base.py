"""Pretrain the demo's base: a tiny real LLaVA, from nothing, on scenes of the `pretrain` split.

    python -m scripts.demo.pretrain_base --out assets/demo_base --ocr OCR.parquet

1. a CLIP vision tower learns to name what lies under each of its patches, and where that begins and ends;
2. its features of every scene are computed once;
3. projector and Llama learn a generic mixture of every task on these features. Beside it the projected patches are
   taught to look like the words that name them, attention starts out looking for tokens like its own, and two heads
   are taught to look from a name, two more from the answer that places it, to the patches that show it. Without that
   a decoder this small takes very long to find the things that a question names, or to copy a word.

Several questions about one image share a row: each sees the image and itself, nothing else.
The OCR words come from `python -m scripts.ocr scenes=[pretrain:6000] out=OCR.parquet`.
"""

import argparse
import json
import time
from typing import Any

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from moa.cli.command import path_argument
from moa.files.atomic import atomic_folder, write_file
from scripts.demo.base.language import answer_questions
from scripts.demo.base.model import build_model, build_processor, build_tokenizer
from scripts.demo.base.questions import MIXTURE, Packer, corpus
from scripts.demo.base.tower import encode_scenes, name_patches
from scripts.demo.base.world import draw_world, read_words


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=path_argument, required=True, help="folder for model, processor and card"
    )
    parser.add_argument(
        "--ocr", type=path_argument, required=True, help="OCR cache of the pretraining scenes"
    )
    parser.add_argument("--scenes", type=int, default=20_000)
    parser.add_argument("--tower-steps", type=int, default=1500, help="of 64 scenes")
    parser.add_argument("--steps", type=int, default=2500, help="of 32 scenes")
    parser.add_argument("--questions", type=int, default=6, help="about each scene of a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--align", type=float, default=0.5, help="weight of patches like words")
    parser.add_argument(
        "--point", type=float, default=0.4, help="weight of names that find patches"
    )
    parser.add_argument("--read-share", type=float, default=0.35, help="of rows with a sign's word")
    parser.add_argument(
        "--mixture", nargs="*", default=[], metavar="TASK=WEIGHT", help=str(MIXTURE)
    )
    parser.add_argument(
        "--start", type=path_argument, help="base to go on from, its tower as it is"
    )
    return parser.parse_args()


def begin_or_go_on(args: argparse.Namespace) -> tuple[LlavaForConditionalGeneration, Any]:
    if args.start:
        model = LlavaForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32)
        return model.to(args.device), AutoProcessor.from_pretrained(args.start)
    tokenizer = build_tokenizer(corpus(args.seed))
    return build_model(tokenizer).to(args.device), build_processor(tokenizer)


def main() -> None:
    args = arguments()
    began = time.time()
    torch.manual_seed(args.seed)
    MIXTURE.update({task: float(weight) for task, weight in (m.split("=") for m in args.mixture)})
    model, processor = begin_or_go_on(args)
    tokenizer = processor.tokenizer
    total = sum(p.numel() for p in model.parameters())
    print(f"{total:,} parameters, {len(tokenizer)} tokens", flush=True)
    world = draw_world(processor, args.scenes, args.seed)
    tower = model.model.vision_tower
    card = {"parameters": total, "seed": args.seed, "scenes": args.scenes}
    if not args.start:
        card["foreground_patches_right"] = round(name_patches(tower, world, args), 3)
        model.save_pretrained(args.out)
        processor.save_pretrained(args.out)
    features = encode_scenes(tower, world, args.device)
    words = read_words(world, args.ocr)
    print(f"{len(words)} scenes, {sum(w is not None for w in words)} read", flush=True)
    answer_questions(model, Packer(tokenizer), world, words, features, args)
    card |= {
        name: getattr(args, name) for name in ("tower_steps", "steps", "questions", "align", "point", "read_share")
    }  # fmt: skip
    card |= {"start": str(args.start) if args.start else None, "mixture": MIXTURE, "bf16": args.bf16,
             "minutes": round((time.time() - began) / 60, 1)}  # fmt: skip
    with atomic_folder(args.out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_file(folder / "recipe.json", json.dumps(card, indent=2) + "\n")
    print(json.dumps(card))


if __name__ == "__main__":
    main()
