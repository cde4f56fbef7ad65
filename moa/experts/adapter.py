"""Bottleneck adapters as experts, around any module that gives a tensor, or one first: MLP, projector, attention.

    parallel   y = f(x) + sum_e gate_e scaling_e B_e act(A_e x)           (arXiv 2110.04366, DM-Adapter)
    serial     y = f(x) + sum_e gate_e scaling_e B_e act(A_e f(x))        (arXiv 1902.00751, TC-MoA)
    prompt     y = f(x) + sum_e gate_e scaling_e B_e softmax(A_e x)

A prompt expert has as many prompts as its rank: the rows of A are their keys, in which the layer's own map of queries
is contained, and the columns of B their values. So a token attends to prompts ahead of the sequence, by one head, as
arXiv 2110.04366 (eq. 7) rewrites prefix tuning, and beside the layer's attention rather than inside of its softmax, as
in LLaMA-Adapter (arXiv 2303.16199): the sequence stays as long as it is, and a start of B = 0 changes nothing.

The down projection A and the up projection B, which starts at zero, are the factors of a LoRA expert, and all that the
bank does with these it does with them. But an activation lies between: the sum of two such experts is no third one, and
none is an update of a weight, so that they are not merged.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, or the first of several, plus each adapter's times its gate and scaling."""
        whole = self.base_layer(*args, **kwargs)
        state = self._state()
        if state is None:
            return whole
        x, several = next(iter((*args, *kwargs.values()))), isinstance(whole, tuple)
        out = whole[0] if several else whole
        source = out if self.serial else x
        self._check(source, out)
        self._penalise(source, state)
        ranks = self._with_cores(state)
        a, b = concatenate(*self._factors(state), out.dtype)
        gates = widen(self._gates(source, state), ranks.place, ranks.scaling)
        own = self._own_rank_gates(source, state, drop=self.training)
        sizes = [self.ranks[expert] for _, expert in self._pairs(state)]
        hidden = self.activate(chosen(F.linear(source.to(out.dtype), a), ranks.spread), sizes)
        hidden = hidden * (gates if own is None else gates * own).to(hidden.dtype)
        mixed = out + F.linear(chosen(hidden, ranks.gather), b)
        return (mixed, *whole[1:]) if several else mixed

    def activate(self, hidden: Tensor, ranks: Sequence[int]) -> Tensor:
        if self.kind != "prompt":
            return ACTIVATIONS[self.activation](hidden)
        return torch.cat([own.softmax(-1) for own in hidden.split(list(ranks), dim=-1)], dim=-1)

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
                f"{self.name}: gives a {type(out).__name__}; an adapter is around a module with a tensor out"
            )
        found = source.shape[-1], out.shape[-1]
        if found != (self.in_width, self.out_width) or source.shape[:-1] != out.shape[:-1]:
            raise ValueError(
                f"{self.name}: maps {list(source.shape)} to {list(out.shape)}, and its linear layers {self.in_width} "
                f"to {self.out_width}; choose a module with one output for each input, or kind: serial_adapter"
            )
