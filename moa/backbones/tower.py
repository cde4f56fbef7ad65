"""What is kept of a vision tower's output: the states that the projector is made from."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

Layers = int | Sequence[int] | None  # hidden states that are read; None: the last, after all layers


def tower_states(output: Any, layers: Layers) -> Float[Tensor, "rows tokens width"]:
    """The states that are read, those of several layers side by side."""
    if layers is None:
        return output.last_hidden_state
    read = [layers] if isinstance(layers, int) else layers
    return torch.cat([output.hidden_states[layer] for layer in read], dim=-1)


def tower_output(states: Float[Tensor, "rows tokens width"], layers: Layers) -> Any:
    """An output of the tower in which these states are found where they are looked for."""
    if layers is None:
        return BaseModelOutputWithPooling(last_hidden_state=states)
    read = [layers] if isinstance(layers, int) else list(layers)
    found: Any = dict(zip(read, states.chunk(len(read), dim=-1), strict=True))
    return BaseModelOutputWithPooling(last_hidden_state=states, hidden_states=found)
