"""Small networks trained apart on real drawings (OpenMoji), for tests of alignment: MLPs and CLIPs."""

import copy

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from data.world.concepts import CONCEPTS
from data.world.scenes import sprite

NAMES = sorted(name for group in CONCEPTS.values() for name in group)
STYLES = ("color", "line", "flat")


def drawings(names, each, side, seed, *, turn=0.0, room=10):
    """[pictures, 3, side, side] in 0..1 of every name, shifted and turned on coloured grounds, and labels."""
    rng = np.random.default_rng(seed)
    pictures = []
    for name in names:
        for index in range(each):
            drawing = sprite(name, STYLES[index % 3], 32)
            drawing = drawing.rotate(float(rng.uniform(-turn, turn)), Image.Resampling.BILINEAR)
            colour = tuple(rng.integers(120, 255, 3).tolist())
            ground = Image.new("RGB", (32 + room, 32 + room), colour)
            ground.paste(drawing, tuple(rng.integers(0, room, 2).tolist()), drawing)
            pictures.append(np.asarray(ground.resize((side, side)), np.float32) / 255)
    labels = torch.arange(len(names)).repeat_interleave(each)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), labels


def with_state(model, state):
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    return other


def average(a, b):
    mine, theirs = a.state_dict(), b.state_dict()
    return with_state(a, {key: (mine[key] + theirs[key]) / 2 for key in mine})


def layers_of(model):
    """The linear layers with a bias."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m.bias is not None]


# MLPs -------------------------------------------------------------------------------------------


def mlp(sizes, seed):
    torch.manual_seed(seed)
    layers = [layer for one, two in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(one, two), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def grey(pictures: Tensor) -> Tensor:
    """Flat, standardised grey pictures."""
    flat = pictures.mean(1).flatten(1)
    return (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)


def train_mlp(model, inputs, labels, seed, steps):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (128,), generator=generator)
        loss = nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


# CLIPs ------------------------------------------------------------------------------------------

LETTERS = {letter: index + 3 for index, letter in enumerate(sorted(set("".join(NAMES))))}
END = len(LETTERS) + 3
LENGTH = max(map(len, NAMES)) + 2


def clip(seed, *, width=32, heads=4, layers=1, ratio=2, vocab=END + 1):
    """A CLIP that reads letters and sees 24 x 24 pixels in patches of 8."""
    torch.manual_seed(seed)
    shared = {
        "hidden_size": width, "intermediate_size": ratio * width,
        "num_hidden_layers": layers, "num_attention_heads": heads,
    }  # fmt: skip
    text = {
        "vocab_size": vocab, "max_position_embeddings": LENGTH,
        "bos_token_id": 1, "eos_token_id": END, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"image_size": 24, "patch_size": 8}
    config = CLIPConfig(text_config={**shared, **text}, vision_config={**shared, **vision}, projection_dim=width)
    return CLIPModel(config).eval()


def spell(names):
    words = torch.zeros(len(names), LENGTH, dtype=torch.long)
    for row, name in zip(words, names, strict=True):
        row[: len(name) + 2] = torch.tensor([1, *(LETTERS[letter] for letter in name), END])
    return words


def similarities(model, pictures):
    """[pictures, names]"""
    return model(input_ids=spell(NAMES), pixel_values=2 * pictures - 1).logits_per_image


def train_clip(model, pictures, labels, seed, steps):
    """Each picture's own name against all the others."""
    optimizer = torch.optim.AdamW(model.train().parameters(), 2e-3, weight_decay=0.3)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 30) * (1 - 0.9 * step / steps))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(pictures), (48,), generator=generator)
        logits = similarities(model, pictures[chosen])
        loss = nn.functional.cross_entropy(logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return model.eval()
