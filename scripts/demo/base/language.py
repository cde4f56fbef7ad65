"""Projector and language model learn to answer, on the tower's features computed beforehand."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.world.questions import TASKS
from scripts.demo.base.model import NUM_PATCHES
from scripts.demo.base.questions import Packer, block_mask, pad
from scripts.demo.base.steps import steps
from scripts.demo.base.world import LABELS, World

POINTING, POINTING_HEADS = {"names": 1, "places": 2}, 2  # which tokens, in which layer


def alignment_loss(model: Any, images: Tensor, names: Tensor) -> Tensor:
    """Cross-entropy of projected patches, read as hidden states, with the first token of their names."""
    logits = model.lm_head(model.model.language_model.norm(images.float()))
    return F.cross_entropy(logits.flatten(0, 1), names.flatten())


def pointing_loss(attention: Tensor, named: Tensor, shown: Tensor) -> Tensor:
    """-log of the attention paid to the patches that show what is named, or to the first token where none does.

    attention [batch, heads, text, prefix], named [batch, text] labels or -1, shown [batch, patches] labels.
    """
    row, place = (named >= 0).nonzero(as_tuple=True)
    target = shown[row] == named[row, place][:, None]
    target = torch.cat([~target.any(1, keepdim=True), target], 1)
    paid = attention[row, :, place]  # [names, heads, prefix]
    return -(paid * target[:, None]).sum(-1).clamp(min=1e-6).log().mean()


def answer_questions(model: Any, packer: Packer, world: World, words: list[str | None], features: Tensor, args) -> None:
    """Stage 3: projector and language model on cached features, answers only."""
    model.set_attn_implementation("eager")  # shows its attention, and is no slower on a CPU
    language, projector = model.model.language_model, model.model.multi_modal_projector
    parameters = [*language.parameters(), *projector.parameters()]
    rng = np.random.default_rng(args.seed)
    names = torch.tensor([packer.encode(f" {name}")[0] for name in LABELS], device=args.device)
    read = torch.tensor([i for i, found in enumerate(words) if found])
    begin = torch.tensor([[packer.tokenizer.bos_token_id]], device=args.device)
    number = 0
    for chosen, take in steps(parameters, args.steps, len(world.scenes), 32, 1.5e-3, args, "language"):
        few = int(args.read_share * len(chosen))  # scenes with words are rare, and copying is hard
        chosen[:few] = read[torch.from_numpy(rng.integers(len(read), size=few))]
        rows = [packer.row(world.scenes[i], words[i], rng, args.questions) for i in chosen.tolist()]
        ids, labels = pad(rows, "ids", 0, torch.long), pad(rows, "labels", -100, torch.long)
        segments = pad(rows, "segments", -2, torch.long)
        positions = pad(rows, "positions", 0, torch.long)
        weights, tasks = pad(rows, "weights", 0.0, torch.float), pad(rows, "tasks", -1, torch.long)
        embed = language.get_input_embeddings()
        prefix = NUM_PATCHES + 1
        before = torch.arange(prefix).expand(len(rows), -1)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            images = projector(features[chosen].to(args.device).float())
            start = embed(begin.expand(len(rows), 1)).to(images.dtype)
            text = embed(ids.to(args.device)).to(images.dtype)
            out = language(
                inputs_embeds=torch.cat([start, images, text], 1),
                attention_mask=block_mask(segments.to(args.device), prefix),
                position_ids=torch.cat([before, positions + prefix], 1).to(args.device),
                use_cache=False,
                output_attentions=True,
            )
            hidden = out.last_hidden_state[:, prefix:]
            supervised = labels[:, 1:] != -100
            logits = model.lm_head(hidden[:, :-1][supervised.to(args.device)])
        target = labels[:, 1:][supervised].to(args.device)
        weight = weights[:, 1:][supervised].to(args.device)
        losses = F.cross_entropy(logits.float(), target, reduction="none")
        answered = (losses * weight).sum() / weight.sum()
        aligned = alignment_loss(model, images, names[world.labels[chosen].to(args.device)])
        looks = [
            pointing_loss(
                out.attentions[min(layer, len(out.attentions) - 1)][:, :POINTING_HEADS, prefix:, :prefix].float(),
                pad(rows, tokens, -1, torch.long).to(args.device),
                world.labels[chosen].to(args.device),
            )
            for tokens, layer in POINTING.items()
        ]
        pointed = torch.stack(looks).sum()
        loss = answered + args.align * aligned + args.point * pointed
        asked = tasks[:, 1:][supervised]
        shown = {"align": aligned.item(), "point": pointed.item(), "answers": answered.item()}
        take(loss, **shown, **{
            task: losses[asked == i].mean().item() for i, task in enumerate(TASKS)
        })  # fmt: skip
        if (number := number + 1) % 200 == 0:
            model.save_pretrained(args.out)
