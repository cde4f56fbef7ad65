"""CLIPs of one architecture: their specification, maps between two of them, and proof that a map changes nothing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moa.merging.align.activations import activation_matching
from moa.merging.align.alignment import Maps, Spec, weight_matching
from moa.merging.align.symmetries import clip_spec
from moa.merging.align.transport import transport

# Largest difference of a similarity, as a share of the largest: what rounding to a dtype does to rotated weights.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def spec_of(model: Any, rotate: bool) -> Spec:
    config = model.config
    return clip_spec(
        {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()},
        text_heads=config.text_config.num_attention_heads,
        vision_heads=config.vision_config.num_attention_heads,
        rotate=rotate,
    )


def match(
    method: str,
    a: Any,
    b: Any,
    spec: Spec,
    *,
    seed: int = 0,
    batches: Sequence[Mapping[str, Tensor]] = (),
    on_sweep: Callable[[int, int], None] = lambda sweep, changed: None,
) -> Maps:
    """Maps of B's units to A's by `weight_matching`, `ot`, or by what they do on the `batches`."""
    if method == "activations":
        own = b.dtype
        maps = activation_matching(a.float(), b.float(), spec, batches, run=run_clip)
        b.to(own)
        return maps
    mine, theirs = a.state_dict(), b.state_dict()
    plans = transport(mine, theirs, spec_of(a, False))
    if method == "ot":
        return plans
    # From B as it is, heads soon agree with its order of the residual stream, and hold it there.
    return weight_matching(mine, theirs, spec, seed=seed, start=plans, on_sweep=on_sweep)


def run_clip(model: Any, batch: Mapping[str, Tensor]) -> object:
    return model(**batch)


@torch.no_grad()
def similarities(model: Any, count: int = 4) -> Tensor:
    """Image-text similarities of noise and random words, the same for every model of one architecture."""
    generator = torch.Generator().manual_seed(0)
    text, vision = model.config.text_config, model.config.vision_config
    length = min(16, text.max_position_embeddings)
    words = torch.randint(text.vocab_size, (count, length), generator=generator)
    words[:, -1] = text.eos_token_id
    size = (count, vision.num_channels, vision.image_size, vision.image_size)
    images = torch.randn(size, generator=generator)
    own = model.dtype
    found = model.float()(input_ids=words, pixel_values=images).logits_per_image
    model.to(own)
    return found


def check_same(before: Tensor, after: Tensor, dtype: torch.dtype) -> dict[str, float]:
    difference, largest = float((after - before).abs().max()), float(before.abs().max())
    if difference > TOLERANCE[dtype] * largest:
        gap = f"{difference:.3g} of {largest:.3g}"
        raise ValueError(f"out: the aligned model differs by {gap} on the probe; not written")
    return {"difference": difference, "largest": largest}


def cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Of all weights as one vector."""
    ab, aa, bb = (
        sum(float((x[key].double() * y[key].double()).sum()) for key in x) for x, y in ((a, b), (a, a), (b, b))
    )
    return ab / (aa * bb) ** 0.5
