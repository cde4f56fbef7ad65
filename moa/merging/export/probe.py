"""The probe: one small batch of prompts, and what a model answers: the same for every comparison of an export."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from data.sources import make_collator, open_ocr, open_sources
from moa.checkpoint import load_model
from moa.config import RunConfig
from moa.contrastive import compared
from moa.experts.bank import ExpertBank
from moa.files.peft import site_keys
from moa.merging.adapters import Expert

QUESTIONS = ("What is this?", "What is on the left?", "Describe the picture.", "How many are there?")


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Of a model on the probe. A CLIP's `logits` are the features of each image and then of its text, and its `tokens`
    the text that is nearest to each image."""

    logits: Float[Tensor, "batch seq vocab"]
    tokens: Int[Tensor, "batch new"]  # greedy


def probe_inputs(processor: Any, images: Sequence[Image.Image], questions: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of one batch of prompts, an image in each, padded on the left for generation."""
    prompts = []
    for question in questions:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        message = [{"role": "user", "content": content}]
        if processor.chat_template is None:
            prompts.append(processor.image_token + question)
        else:
            prompts.append(processor.apply_chat_template(message, add_generation_prompt=True))
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    batch = processor(images=[[image] for image in images], text=prompts, **options)
    for name in ("labels", "num_crops"):  # given unasked; a model takes them for an answer, or not
        batch.pop(name, None)
    return {name: torch.as_tensor(batch[name]).contiguous() for name in batch}


def probe_of_run(
    step: Path, config: RunConfig, count: int, new_tokens: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], Outputs | None] | None:
    """Prompts of the run's own data, one source after the other, their owners, and its routed answers."""
    sources = config.eval.sources or config.data.validation or config.data.sources
    data = list(open_sources(sources.values(), config.data, open_ocr(config.data)).values())
    if not data:
        return None
    model, _, _ = load_model(step)
    samples = [data[i % len(data)][i // len(data) % len(data[i % len(data)])] for i in range(count)]
    options = {"for_generation": True, "allow_unknown_tasks": True}
    batch = make_collator(config, model.backbone.intake, **options)(samples)
    with torch.no_grad():
        logits, tokens = model.float().eval().probe(batch, **greedy(new_tokens))
    return model.backbone.inputs_of(batch), model.backbone.owners(batch), Outputs(logits=logits, tokens=tokens)


def probe_of_noise(backbone: Any, count: int) -> dict[str, Tensor]:
    """Inputs that any model accepts, where there is no data: noise, and plain questions."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 96, 128, 3), np.uint8)
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(count)]
    images = [Image.fromarray(pixels) for pixels in noise]
    if backbone.compares:
        return backbone.probe(images, questions)
    return probe_inputs(backbone.processor, images, questions)


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Mapping[str, Tensor], new_tokens: int) -> Outputs:
    """Of a plain transformers or PEFT model."""
    found = model.eval()(**inputs)
    if not hasattr(model, "generate"):
        logits, tokens = compared(found.image_embeds, found.text_embeds)
        return Outputs(logits=logits, tokens=tokens)
    tokens = model.generate(**inputs, **greedy(new_tokens))  # type: ignore[operator]
    return Outputs(logits=found.logits.float(), tokens=tokens[:, -new_tokens:])


def live_outputs(
    model: nn.Module,
    experts: Sequence[Expert],
    gates: Mapping[str, Float[Tensor, " expert"]],
    inputs: Mapping[str, Tensor],
    new_tokens: int,
    stream_of: Callable[[str], str] = lambda site: "text",
    owners: Mapping[str, Tensor] | None = None,
) -> Outputs:
    """The mixture of the experts in a bank around the model, with these gates at each site.

    `owners` are those of `Backbone.owners`; by default an image for each prompt. The model is left as it was.
    """
    bank = ExpertBank.attach(model, list(gates), stream_of=stream_of)
    try:
        for expert in experts:
            config = {**expert.config, "lora_alpha": float(expert.config.get("lora_alpha", 8))}
            pairs = ((site_keys(site), expert.read(site)) for site in expert.ranks)
            tensors = {k: v for keys, both in pairs for k, v in zip(keys, both, strict=True)}
            bank.import_expert(expert.name, tensors, config)
        batch = inputs["input_ids"].shape[0]
        table = torch.stack([gates[site] for site in bank.sites]).float()
        owners = {"image": torch.arange(batch)} if owners is None else owners
        bank.set_gates(table.expand(batch, -1, -1), owners, expand=True)
        return outputs_of(model, inputs, new_tokens)
    finally:
        bank.detach(model)


def greedy(new_tokens: int) -> dict[str, Any]:
    """Settings of generation for exactly so many greedy tokens, an early end suppressed."""
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    return {"do_sample": False, "num_beams": 1, **length}
