"""The tiny CLIP itself: tokenizer, processor, first weights, and its training on coloured drawings."""

import json
import sys
import time
from dataclasses import asdict
from typing import IO, Any

import numpy as np
import torch
from rich.progress import track
from tokenizers import processors
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)

from data.world.drawings import CATEGORIES, SIZE, TEMPLATES, draw, drawing_rng, names
from moa.contrastive import not_negatives, softmax_loss
from scripts.demo.base.model import byte_level

PATCH, WIDTH, CONTEXT = 12, 160, 32
WORDINGS = ("{}", "a drawing of {}", "a picture of {}")
LARGEST_SCALE = 4.6052  # log 100, as in CLIP


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the names; every text is `<s> ... </s>`.

    The end token is not number 2: transformers reads that number as an old mistake, and pools at
    the largest token instead.
    """
    texts = [wording.format(name) for name in names() for wording in WORDINGS]
    texts += [TEMPLATES["kinds"].format(kind) for kind in CATEGORIES]
    special = ["<pad>", "<s>", "<unk>", "</s>"]
    tokenizer = byte_level(texts, blank=True, vocab_size=900, special_tokens=special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", model_max_length=CONTEXT,
    )  # fmt: skip


def build_model(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    text = dict(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=CONTEXT, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = dict(
        hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=4,
        num_attention_heads=4, image_size=SIZE, patch_size=PATCH,
    )  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def build_processor(tokenizer: PreTrainedTokenizerFast) -> CLIPProcessor:
    size = {"height": SIZE, "width": SIZE}
    image_processor = CLIPImageProcessor(size=size, do_center_crop=False)
    return CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


def read_batch(processor: Any, step: int, size: int, seed: int) -> tuple[Any, Tensor]:
    """The processor's tensors of `size` new drawings, and which name each one has."""
    rng = drawing_rng("order", step, seed)
    chosen = rng.permutation(len(names()))[:size]
    images = [
        draw(names()[number], "color", drawing_rng("pretrain", step * size + row, seed))
        for row, number in enumerate(chosen)
    ]
    texts = [WORDINGS[rng.integers(len(WORDINGS))].format(names()[number]) for number in chosen]
    batch = processor(images=images, text=texts, padding=True, return_tensors="pt")
    return batch, torch.from_numpy(chosen)


def train(model: CLIPModel, processor: Any, args: Any, log: IO[str]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.08)
    began, mean = time.time(), {"loss": np.nan, "right": np.nan}
    for step in track(range(args.stop or args.steps), "pretrain", disable=not sys.stderr.isatty()):
        batch, chosen = read_batch(processor, step, args.batch, args.seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            out = model(**batch)
        logits = model.logit_scale.exp() * out.image_embeds.float() @ out.text_embeds.float().T
        own = torch.arange(len(chosen))
        ignored = not_negatives(chosen, own, own)
        loss = softmax_loss(logits, logits.T, own, ignored).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=LARGEST_SCALE)
        right = (logits.argmax(1) == own).float().mean().item()
        for key, value in (("loss", loss.item()), ("right", right)):
            mean[key] = value if step == 0 else 0.98 * mean[key] + 0.02 * value
        if step % 50 == 0 or step == (args.stop or args.steps) - 1:
            row = {"step": step, "seconds": round(time.time() - began)}
            log.write(json.dumps(row | {k: round(v, 4) for k, v in mean.items()}) + "\n")


def recipe_of(model: CLIPModel, args: Any) -> dict[str, Any]:
    recipe = {name: value for name, value in asdict(args).items() if name != "out"}
    recipe |= {"parameters": sum(p.numel() for p in model.parameters()), "names": len(names())}
    minutes = round(time.process_time() / 60, 1)
    return recipe | {"threads": torch.get_num_threads(), "cpu_minutes": minutes}
