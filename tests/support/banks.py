"""What tests of the bank share: a bank on the tiny LLaVA, values for its experts, and gates."""

import torch
from torch import nn

from moa.experts.bank import ExpertBank
from tests.support.tiny import tiny_batch

LANGUAGE = r"model\.language_model\.layers\.\d+\..*_proj"
PROJECTOR = r"model\.multi_modal_projector\.linear_\d"
VISION = r"model\.vision_tower\.encoder\.layers\.[01]\.self_attn\.[qv]_proj"
SITE = "model.language_model.layers.0.self_attn.q_proj"


def stream_of(site: str) -> str:
    return "text" if "language_model" in site else "image"


def make_bank(model: nn.Module, targets=(LANGUAGE, PROJECTOR, VISION), **ranks: int) -> ExpertBank:
    bank = ExpertBank.attach(model.requires_grad_(False), list(targets), stream_of=stream_of)
    for name, rank in (ranks or {"vqa": 4, "caption": 2, "grounding": 8}).items():
        bank.add(name, rank=rank, alpha=8)
    return bank


def fill(bank: ExpertBank, std: float = 0.3) -> None:
    """Give every B values, so that the experts change something."""
    generator = torch.Generator().manual_seed(1)
    for site in bank.sites.values():
        for expert in site.experts:
            site.factor("lora", "B", expert).data.normal_(std=std, generator=generator)


def inputs(processor):
    batch = tiny_batch(processor)
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "pixel_values": batch.pixel_values,
    }


def some_gates(bank: ExpertBank, batch: int = 4, sites: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(batch, sites, len(bank.names), generator=generator)
