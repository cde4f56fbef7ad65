"""Reload an export in a fresh process with plain PEFT or transformers, and compare it on a probe, a batch of prompts.

written   the base with the stored update added to its weights, rounded as stored; must agree
live      the bank with the merge's weights as gates: how far rank, dtype or method moved the result from it
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.sources import make_collator, open_ocr, open_sources
from moa.backbones.fingerprint import base_fingerprint
from moa.checkpoint import load_model, versions
from moa.config import RunConfig
from moa.contrastive import compared
from moa.experts.bank import ExpertBank
from moa.files.peft import site_keys
from moa.merging.adapters import Expert
from moa.merging.export.export import Verify, Written

# Largest logit difference for "the same", as a share of the largest logit: float32 rounding remains
# ten times below it at any depth, a lost scale or a missing site is far above.
TOLERANCE = 1e-4
Folder = str | Path
QUESTIONS = ("What is this?", "What is on the left?", "Describe the picture.", "How many are there?")

FRESH = """
import json, sys, warnings
job = json.loads(sys.argv[1])
import torch
torch.set_num_threads(job["threads"])
from safetensors.torch import load_file, save_file
import transformers
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    kind = transformers.AutoConfig.from_pretrained(job["model"]).model_type
    compares = kind in ("clip", "siglip")
    auto = transformers.AutoModel if compares else transformers.AutoModelForImageTextToText
    model, info = auto.from_pretrained(job["model"], dtype=torch.float32, output_loading_info=True)
    consumed = None
    if job["adapter"]:
        from peft import PeftModel, get_peft_model_state_dict
        model = PeftModel.from_pretrained(model, job["adapter"])
        stored = load_file(job["adapter"] + "/adapter_model.safetensors")
        loaded = get_peft_model_state_dict(model)
        consumed = sum(k in loaded and torch.equal(v.float(), loaded[k].float().cpu())
                       for k, v in stored.items())
problems = [str(w.message) for w in caught if "adapter keys" in str(w.message)]
problems += [f"{k}: {sorted(map(str, info[k]))[:3]}"
             for k in ("missing_keys", "mismatched_keys") if info.get(k)]
model = model.eval()
inputs = load_file(job["probe"])
new = job["new_tokens"]
with torch.no_grad():
    found = model(**inputs)
    if compares:
        logits = torch.stack([found.image_embeds, found.text_embeds], 1).float()
        tokens = (found.image_embeds @ found.text_embeds.T).argmax(1)[:, None]
    else:
        logits = found.logits.float()
        tokens = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=new,
                                min_new_tokens=new)[:, -new:]
save_file({"logits": logits.contiguous(), "tokens": tokens.contiguous()}, job["result"])
assert "moa" not in sys.modules
print("RESULT " + json.dumps({"problems": problems, "consumed": consumed}))
"""


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Of a model on the probe. A CLIP's `logits` are the features of each image and then of its text, and its `tokens`
    the text that is nearest to each image."""

    logits: Float[Tensor, "batch seq vocab"]
    tokens: Int[Tensor, "batch new"]  # greedy


def make_verify(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    experts: Sequence[Expert],
    base: str | Path,
    gates: Mapping[str, Float[Tensor, " expert"]] | None = None,
    exact: bool = False,
    routed: Outputs | None = None,
    stream_of: Callable[[str], str] = lambda site: "text",
    owners: Mapping[str, Tensor] | None = None,
    new_tokens: int = 8,
) -> Verify:
    """The check that an export runs on what it wrote; `model` is the base, and is used up.

    `gates` by site are those of the mixture that the merge equals, None where it is not a sum.
    `exact`: no rank was cut, so that files in float32 must agree with that mixture.
    `routed`: outputs of the model that still routes each sample, reported and not judged.
    """

    def verify(folder: Path, written: Written) -> dict[str, Any]:
        adapter = folder if written.is_adapter else None
        plain = live = outputs_of(model, inputs, new_tokens)
        mask = inputs.get("attention_mask")
        if mask is None or mask.shape != plain.logits.shape[:2]:  # features, not tokens
            mask = torch.ones(plain.logits.shape[:2], dtype=torch.long)
        if gates is not None:
            live = live_outputs(model, experts, gates, inputs, new_tokens, stream_of, owners)
        # From here on the model is the base with the update: the bank is gone, the weights are changed.
        add_written(model, written, bool(experts[0].config.get("fan_in_fan_out")))
        expected = outputs_of(model, inputs, new_tokens)
        loaded: dict[str, Any] = {"model": base if adapter else folder, "adapter": adapter}
        found, info = fresh_outputs(inputs, new_tokens=new_tokens, **loaded)
        report: dict[str, Any] = {"written": compare(found, expected, mask)}
        check_same(report["written"], "written weights")
        if gates is not None:
            report["live_mixture"] = compare(found, live, mask)
            report["base_to_live_mixture"] = compare(plain, live, mask)
            if exact and written.is_float32:
                check_same(report["live_mixture"], "the live mixture")
        if routed is not None:
            report["routed_model"] = compare(found, routed, mask)
        if info["consumed"] not in (None, written.num_keys):
            raise ValueError(f"PEFT consumed {info['consumed']} of {written.num_keys} keys")
        probe = {"samples": mask.shape[0], "tokens": mask.shape[1], "new_tokens": new_tokens}
        return {
            "comparisons": report,
            "probe": {**probe, "compute_dtype": "float32"},
            "keys_consumed": written.num_keys,
            "base": str(base),
            "base_fingerprint": base_fingerprint(base),
            "versions": versions(),
        }

    return verify


@torch.no_grad()
def add_written(model: nn.Module, written: Written, transpose: bool = False) -> None:
    """Put a stored update into the model's weights, rounded as its files are; replaced parameters are there already."""
    changed = {f"{site}.weight" for site in written.deltas}
    if written.cast is not None:
        for name, parameter in model.named_parameters():
            if name not in changed:  # those are rounded once, after the addition
                parameter.copy_(parameter.to(written.cast))
    for name, dtype in written.replaced.items():
        if name not in changed:
            model.get_parameter(name).copy_(model.get_parameter(name).to(dtype))
    for site, delta in written.deltas.items():
        weight = model.get_parameter(f"{site}.weight")
        change = delta().to(weight.device)
        total = weight.to(change.dtype) + (change.T if transpose else change)
        weight.copy_(total.to(written.dtypes.get(site, weight.dtype)))


def fresh_outputs(
    inputs: Mapping[str, Tensor], *, model: Folder, adapter: Folder | None = None, new_tokens: int
) -> tuple[Outputs, dict[str, Any]]:
    """The probe's outputs from a new process of peft and transformers alone; ValueError where it fails or complains."""
    with tempfile.TemporaryDirectory() as folder:
        probe, result = Path(folder, "probe.safetensors"), Path(folder, "result.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, probe)
        job: dict[str, Any] = {"probe": str(probe), "result": str(result), "new_tokens": new_tokens}
        job |= {"model": str(Path(model).resolve()), "threads": torch.get_num_threads()}
        job["adapter"] = str(Path(adapter).resolve()) if adapter else None
        # -I: neither the current folder nor PYTHONPATH can import this project.
        command = [sys.executable, "-I", "-c", FRESH, json.dumps(job)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if done.returncode or not lines:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"{adapter or model}: a fresh process cannot load it: {last}")
        info = json.loads(lines[0].removeprefix("RESULT "))
        if info["problems"]:
            raise ValueError(f"{adapter or model}: a fresh process reports {info['problems'][0]}")
        found = load_file(result)
    return Outputs(logits=found["logits"], tokens=found["tokens"]), info


def compare(found: Outputs, reference: Outputs, mask: Int[Tensor, "batch seq"]) -> dict[str, float]:
    """Largest logit difference over real tokens, beside the logits' size, and equal greedy tokens."""
    real = mask.bool()
    gap = (found.logits - reference.logits)[real].abs()
    return {
        "max_abs_logit_diff": float(gap.max()),
        "max_abs_logit": float(reference.logits[real].abs().max()),
        "greedy_token_agreement": float((found.tokens == reference.tokens).float().mean()),
    }


def check_same(result: Mapping[str, float], what: str) -> None:
    """Raise ValueError unless a comparison is within rounding."""
    limit = TOLERANCE * result["max_abs_logit"]
    if not result["max_abs_logit_diff"] <= limit:  # NaN is not within
        gap = f"{result['max_abs_logit_diff']:.3g} from the reference (limit {limit:.3g})"
        raise ValueError(f"{what}: reloaded logits differ by {gap}; nothing was written")


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
