"""CLIPs of one architecture: their specification, maps between two of them, and proof that a map changes nothing."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moa.merging.align.activations import activation_matching
from moa.merging.align.alignment import Axis, Maps, Spec, Symmetry, Units, transport, weight_matching

# Largest difference of a similarity, as a share of the largest: what rounding to a dtype does to rotated weights.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
Shapes = Mapping[str, tuple[int, ...]]


def clip_spec(shapes: Shapes, *, text_heads: int, vision_heads: int, rotate: bool = True) -> dict[str, Symmetry]:
    """Both towers of a CLIPModel: every tensor but `logit_scale` is moved.

    - the residual stream of each tower: a permutation, with which LayerNorm commutes, as its own parameters go along;
    - every block's attention heads as wholes, and inside each head what queries and keys share, and what values give
      to the output: nothing nonlinear is between them, so these may rotate;
    - every block's hidden units of the MLP: permutations;
    - the space where images and texts meet: both projections have no bias, so it may rotate, and with it the
      embeddings, but no similarity.

    With `rotate` false all are permutations.
    """
    towers = (
        ("text_model", "text_projection", text_heads),
        ("vision_model", "visual_projection", vision_heads),
    )
    spec: dict[str, Symmetry] = {}
    for tower, projection, heads in towers:
        spec |= _tower(shapes, tower, projection, heads, rotate)
    joint = Units(made=tuple((f"{projection}.weight", 0) for _, projection, _ in towers))
    return {**spec, "joint space": Symmetry(units=(joint,), rotate=rotate)}


def _tower(shapes: Shapes, tower: str, projection: str, heads: int, rotate: bool) -> dict[str, Symmetry]:
    found = (re.match(rf"{tower}\.encoder\.layers\.(\d+)", key) for key in shapes)
    layers = sorted({m[0] for m in found if m}, key=lambda layer: int(layer.rpartition(".")[2]))
    spec = {f"{tower} residual": Symmetry(units=(_residual(shapes, tower, projection, layers),))}
    for layer in layers:
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        scores = Units(made=_linear(f"{attention}.q_proj") + _linear(f"{attention}.k_proj"))
        out = ((f"{attention}.out_proj.weight", 1),)
        values = Units(made=_linear(f"{attention}.v_proj"), used=out)
        spec[attention] = Symmetry(units=(scores, values), blocks=heads, rotate=rotate)
        hidden = Units(made=_linear(f"{mlp}.fc1"), used=((f"{mlp}.fc2.weight", 1),))
        spec[mlp] = Symmetry(units=(hidden,))
    return spec


def _residual(shapes: Shapes, tower: str, projection: str, layers: Sequence[str]) -> Units:
    made: list[Axis] = []
    for key in shapes:
        if not key.startswith(f"{tower}."):
            continue
        if re.search(r"\.embeddings\.(class|patch)_|layer_?norm|layrnorm", key):
            made.append((key, 0))
        elif ".embeddings." in key and key.endswith(".weight"):
            made.append((key, 1))
    used: list[Axis] = [(f"{projection}.weight", 1)]
    for layer in layers:
        made += _linear(f"{layer}.self_attn.out_proj") + _linear(f"{layer}.mlp.fc2")
        readers = (*(f"self_attn.{part}_proj" for part in "qkv"), "mlp.fc1")
        used += [(f"{layer}.{reader}.weight", 1) for reader in readers]
    return Units(made=tuple(made), used=tuple(used))


def _linear(module: str) -> tuple[Axis, Axis]:
    return (f"{module}.weight", 0), (f"{module}.bias", 0)


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
    words = torch.randint(text.vocab_size, (count, min(16, text.max_position_embeddings)), generator=generator)
    words[:, -1] = text.eos_token_id
    images = torch.randn((count, vision.num_channels, vision.image_size, vision.image_size), generator=generator)
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
