"""The vision tower learns what lies under each of its patches, and where that begins and ends."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.world.concepts import GROUNDS
from scripts.demo.base.model import WIDTH
from scripts.demo.base.steps import steps, track
from scripts.demo.base.world import LABELS, World


def name_patches(tower: nn.Module, world: World, args: Any) -> float:
    """Stage 1: cross-entropy of each patch with what it shows, and the L1 distance of its box.

    Naming alone makes the tower forget where a patch lies, and no decoder can tell it afterwards.
    Returns the share of foreground patches that it names rightly.
    """
    head = nn.Linear(WIDTH, len(LABELS) + 4).to(args.device)
    weight = torch.tensor([0.3 if name in GROUNDS else 1.0 for name in LABELS], device=args.device)
    parameters = [*tower.parameters(), *head.parameters()]
    right = 0.0
    for rows, take in steps(parameters, args.tower_steps, len(world.scenes), 64, 1e-3, args, "tower"):
        pixels = world.pixel_values[rows].to(args.device).float()
        target, true_box = world.labels[rows].to(args.device), world.boxes[rows].to(args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            out = head(tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]).float()
        logits, box = out.split([len(LABELS), 4], -1)
        named = F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight=weight)
        bounded = ~true_box.isnan().any(-1)
        distance = F.l1_loss(box[bounded], true_box[bounded])
        front = target > len(GROUNDS)
        share = (logits.argmax(-1) == target)[front].float().mean().item()
        right = 0.98 * right + 0.02 * share
        take(named + 5 * distance, name=named.item(), foreground=share, box=distance.item())
    return right


@torch.no_grad()
def encode_scenes(tower: nn.Module, world: World, device: str) -> Tensor:
    """Stage 2: [scenes, patches, width] features of every scene, in half precision."""
    return torch.cat([
        tower(chunk.to(device).float(), output_hidden_states=True).hidden_states[-1][:, 1:].half().cpu()
        for chunk in track(world.pixel_values.split(128), "encode")
    ])  # fmt: skip
