"""Bottleneck adapters as experts, around any module with a tensor in and one out: an MLP, a projector, a linear layer.

    parallel   y = f(x) + sum_e gate_e scaling_e B_e act(A_e x)           (arXiv 2110.04366, DM-Adapter)
    serial     y = f(x) + sum_e gate_e scaling_e B_e act(A_e f(x))        (arXiv 1902.00751, TC-MoA)

The down projection A and the up projection B, which starts at zero, are the factors of a LoRA expert, and all that the
bank does with these it does with them. But an activation lies between: the sum of two such experts is no third one, and
none is an update of a weight, so that they are not merged.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moa.experts.context import GateContext
from moa.experts.lora import ExpertLinear
from moa.experts.lora_product import chosen, concatenate, widen

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class AdapterSite(ExpertLinear):
    """A frozen module and the adapters around it, which all read its input, or all its output (`serial`)."""

    def __init__(self, base: nn.Module, name: str, context: GateContext, *, kind: str, activation: str) -> None:
        super().__init__(base, name, context)
        self.kind, self.serial, self.activation = kind, kind == "serial_adapter", activation
        layers = [module for module in base.modules() if isinstance(module, nn.Linear)]
        if not layers:
            raise ValueError(f"{name}: has no linear layer, whose width an adapter could take")
        self.out_width, last = layers[-1].out_features, layers[-1]
        self.in_width = self.out_width if self.serial else layers[0].in_features
        self._last = [last]  # in a list: it is a part of the module already

    def forward(self, x: Float[Tensor, "*lead in"], *args: Any, **kwargs: Any) -> Tensor:
        """The module's output, plus each adapter's times its gate and scaling."""
        out = self.base_layer(x, *args, **kwargs)
        state = self._state()
        if state is None:
            return out
        source = out if self.serial else x
        self._check(source, out)
        self._penalise(source, state)
        ranks = self.layout(state)[0]
        a, b = concatenate(*self._factors(state), out.dtype)
        gates = widen(self._gates(source, state), ranks.place, ranks.scaling)
        own = self._own_rank_gates(source, state, drop=self.training)
        hidden = self.activate(chosen(F.linear(source.to(out.dtype), a), ranks.spread))
        hidden = hidden * (gates if own is None else gates * own).to(hidden.dtype)
        return out + F.linear(chosen(hidden, ranks.gather), b)

    def activate(self, hidden: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](hidden)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_width, self.in_width

    @property
    def weight(self) -> Tensor:
        return self._last[0].weight

    def _check(self, source: Tensor, out: Any) -> None:
        """ValueError for a module that an adapter cannot be around."""
        if not isinstance(out, Tensor):
            raise ValueError(
                f"{self.name}: gives a {type(out).__name__}; an adapter is around a module with one tensor out"
            )
        found = source.shape[-1], out.shape[-1]
        if found != (self.in_width, self.out_width) or source.shape[:-1] != out.shape[:-1]:
            raise ValueError(
                f"{self.name}: maps {list(source.shape)} to {list(out.shape)}, and its linear layers {self.in_width} "
                f"to {self.out_width}; choose a module with one output for each input, or kind: serial_adapter"
            )
