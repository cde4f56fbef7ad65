"""LoRA experts at a frozen linear layer.

y = W x + sum_e gate_e scaling_e B_e A_e x
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moa.experts.context import GateContext, GateState
from moa.experts.lora_product import add_mixture, concatenate, mix, widen


@dataclass(frozen=True, slots=True)
class Prepared:
    """A site's rank gates, and its concatenated factors A [rank, in] and B^T [rank, out] in its output's dtype."""

    shape: tuple[int, int]  # of the input they fit: first axis and number of axes
    gates: Tensor | None  # None: tokens are routed one by one
    a: Tensor
    b_t: Tensor

    def fits(self, x: Tensor, dtype: torch.dtype) -> bool:
        return self.shape == (x.shape[0], x.ndim) and self.a.dtype == dtype


class ExpertLinear(nn.Module):
    """A frozen linear layer and the LoRA experts at its site.

    The factors are direct parameters `lora_A_<expert>` [rank, in] and `lora_B_<expert>` [out, rank]
    rather than those of a ParameterDict: ZeRO-3 gathers what the running module itself owns.
    """

    token_router: nn.Parameter | None

    def __init__(self, base_layer: nn.Linear, name: str, context: GateContext) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.context = context
        self.scalings: dict[str, float] = {}  # expert -> alpha / rank or alpha / sqrt(rank)
        self.register_parameter("token_router", None)
        self._per_rank: tuple[Any, Tensor, Tensor] | None = None  # what `per_rank` gave last

    def forward(self, x: Float[Tensor, "*lead in"]) -> Float[Tensor, "*lead out"]:
        """The base's output, plus each expert's B A x times its gate and scaling."""
        out = self.base_layer(x)
        state = self._state()
        if state is None:  # switched off, or no expert of this site has a gate other than 0
            return out
        if torch.is_grad_enabled():
            # Each factor goes in by itself, so that each gets its own gradient, also from gate 0.
            self.context.forget()  # the step that follows changes the factors
            gates = self._gates(x, state)  # [batch, 1, expert], or by token [batch, seq, expert]
            return mix(x, out, gates, *self.per_rank(state), *self._factors(state))
        # A generation calls this at each token under the same gates: its rank gates, A and B are
        # put together at the first one. `out` is fresh, so that the product is added into it.
        rank_gates, a, b_t = self._prepared(x, state, out.dtype)
        return add_mixture(out, x, rank_gates, a, b_t)

    @property
    def experts(self) -> list[str]:
        return list(self.scalings)

    @property
    def lora_A(self) -> dict[str, nn.Parameter]:
        return {expert: getattr(self, f"lora_A_{expert}") for expert in self.scalings}

    @property
    def lora_B(self) -> dict[str, nn.Parameter]:
        return {expert: getattr(self, f"lora_B_{expert}") for expert in self.scalings}

    @property
    def ranks(self) -> dict[str, int]:
        return {expert: a.shape[0] for expert, a in self.lora_A.items()}

    def own(self, expert: str) -> list[nn.Parameter]:
        """The parameters of one expert."""
        return [self.lora_A[expert], self.lora_B[expert]]

    def add(self, expert: str, a: nn.Parameter, b: nn.Parameter, scaling: float) -> None:
        """Take an expert's factors, [rank, in] and [out, rank], as the last one's successors."""
        self.register_parameter(f"lora_A_{expert}", a)
        self.register_parameter(f"lora_B_{expert}", b)
        self.scalings[expert] = scaling
        self._per_rank = None

    def remove(self, expert: str) -> tuple[nn.Parameter, nn.Parameter, float]:
        """Give back what `add` took."""
        removed = self.lora_A[expert], self.lora_B[expert], self.scalings.pop(expert)
        delattr(self, f"lora_A_{expert}")
        delattr(self, f"lora_B_{expert}")
        self._per_rank = None
        return removed

    def per_rank(self, state: GateState) -> tuple[Tensor, Tensor]:
        """For each rank [total rank], the place of its expert among the gates, and its scaling."""
        key, known = (state.experts, state.active), self._per_rank
        if known is None or known[0] != key:
            device, running = self.base_layer.weight.device, self._running(state)
            ranks = [len(a) for a in self._factors(state)[0]]
            each = [e for e, rank in zip(running, ranks, strict=True) for _ in range(rank)]
            place = torch.tensor([state.experts.index(e) for e in each], device=device)
            scaling = torch.tensor([self.scalings[e] for e in each], device=device)
            known = self._per_rank = key, place, scaling
        return known[1], known[2]

    def extra_repr(self) -> str:
        return f"site={self.name}, ranks={self.ranks}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "ExpertLinear":
        self._per_rank = None  # the device may change
        self.context.forget()
        return super()._apply(fn, recurse)

    def _state(self) -> GateState | None:
        """The gates of this forward; None where no expert of this site takes part."""
        if not self.scalings or not self.context.enabled:
            return None
        state = self.context.state
        if state is None:
            raise ValueError(
                f"{self.name}: its experts {list(self.scalings)} have no gates; call "
                "bank.set_gates(...) first, or run inside bank.context.disabled()"
            )
        return state if state.uses(self.scalings) else None

    def _gates(self, x: Tensor, state: GateState) -> Tensor:
        return state.gates_at(self.name, x, self.token_router)

    def _rank_gates(self, x: Tensor, state: GateState, dtype: torch.dtype) -> Tensor:
        return widen(self._gates(x, state), *self.per_rank(state)).to(dtype)

    def _prepared(self, x: Tensor, state: GateState, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Rank gates, A [rank, in] and B^T [rank, out], kept in the state until the next gates."""
        kept = state.prepared.get(self.name)
        if kept is None or not kept.fits(x, dtype):
            a, b = concatenate(*self._factors(state), dtype)
            gates = None if state.gates is None else self._rank_gates(x, state, dtype)
            kept = Prepared(shape=(x.shape[0], x.ndim), gates=gates, a=a, b_t=b.t())
            state.prepared[self.name] = kept
        gates = self._rank_gates(x, state, dtype) if kept.gates is None else kept.gates
        return gates, kept.a, kept.b_t

    def _running(self, state: GateState) -> list[str]:
        """The experts of this site that take part, in the order of their factors."""
        active = state.active
        return [e for e in self.scalings if active is None or e in active]

    def _factors(self, state: GateState) -> tuple[list[Tensor], list[Tensor]]:
        experts = self._running(state)
        parameters: Any = self._parameters  # getattr would search for each of them
        factors_a = [parameters[f"lora_A_{expert}"] for expert in experts]
        return factors_a, [parameters[f"lora_B_{expert}"] for expert in experts]
