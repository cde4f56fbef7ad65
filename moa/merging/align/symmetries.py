"""Where a Hugging Face CLIP is free: its specification for `alignment.py`."""

import re
from collections.abc import Mapping, Sequence

from moa.merging.align.alignment import Axis, Symmetry, Units

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
