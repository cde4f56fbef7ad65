"""LoRA experts at a frozen linear layer, and the context that brings them their gates.

    y = W x + sum_e gate_e scaling_e B_e A_e x

The gates of a forward live until the next one, so that activation checkpointing recomputes with
the gates it first ran with, and decoding goes on with the gates of the prompt.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa.experts.lora_product import add_mixture, concatenate, mix, widen

Decide = Callable[[Tensor], tuple[Tensor, Tensor]]  # logits -> gates and probabilities


@dataclass(kw_only=True)
class GateState:
    """The gates of one forward: by site [batch, 1, expert], the experts in the order of `experts`.

    Where rows of tokens hold several samples they are [rows, seq, expert]. `gates` is None where
    every token is routed at every site by the site's own token router.
    """

    gates: dict[str, Tensor] | None
    experts: tuple[str, ...] = ()
    active: frozenset[str] | None = None  # in inference: those that some sample uses; None: all
    expand: bool = False  # generation repeats each sample for its beams and return sequences
    decide: Decide | None = None  # of token routing
    temperature: float | int = 1.0  # of token routing
    recording: bool = True
    # site -> [batch, seq, expert], divided by the temperature
    token_logits: dict[str, Tensor] = field(default_factory=dict)
    # What inference computes once for all decoding steps, by site. It lives no longer than the
    # gates: an optimiser may write to parameters through flat buffers, which leaves no trace.
    prepared: dict[str, "Prepared"] = field(default_factory=dict)

    def forget(self) -> None:
        """Drop what was computed from the factors: they may change."""
        self.prepared.clear()


@dataclass(frozen=True, slots=True)
class Prepared:
    """A site's rank gates and concatenated factors [rank, in], [rank, out] in its output's dtype."""

    shape: tuple[int, int]  # of the input they fit: first axis and number of axes
    gates: Tensor | None  # None: tokens are routed one by one
    a: Tensor
    b: Tensor

    def fits(self, x: Tensor, dtype: torch.dtype) -> bool:
        return self.shape == (x.shape[0], x.ndim) and self.a.dtype == dtype


class GateContext:
    """Holds the gates between the router that decides them and the sites that use them."""

    def __init__(self) -> None:
        self.state: GateState | None = None
        self.enabled = True

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, every site computes its base layer alone."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def checkpoint_contexts(self) -> tuple[Any, Any]:
        """The `context_fn` of torch.utils.checkpoint: recompute with the gates of this forward.

        Without it, a second forward before the backward pass lends the first one its own gates.
        """
        return _Swap(self, None), _Swap(self, (self.state, self.enabled))


class _Swap:
    """Inside, the context is as it was; None leaves it as it is."""

    def __init__(self, context: GateContext, inside: tuple[GateState | None, bool] | None) -> None:
        self.context, self.inside = context, inside

    def __enter__(self) -> None:
        self.outside = self.context.state, self.context.enabled
        if self.inside is not None:
            state, self.context.enabled = self.inside
            self.context.state = replace(state, recording=False) if state else None

    def __exit__(self, *_: object) -> None:
        self.context.state, self.context.enabled = self.outside


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
        self._columns: tuple[Any, Tensor, Tensor] | None = None  # what `columns` gave last

    @property
    def lora_A(self) -> dict[str, nn.Parameter]:
        return {expert: getattr(self, f"lora_A_{expert}") for expert in self.scalings}

    @property
    def lora_B(self) -> dict[str, nn.Parameter]:
        return {expert: getattr(self, f"lora_B_{expert}") for expert in self.scalings}

    @property
    def ranks(self) -> dict[str, int]:
        return {expert: a.shape[0] for expert, a in self.lora_A.items()}

    def forward(self, x: Tensor) -> Tensor:
        """The base's output, plus each expert's B A x times its gate and scaling."""
        out = self.base_layer(x)
        state = self._state()
        if state is None:
            return out
        if torch.is_grad_enabled():
            state.forget()
            return mix(x, out, self._gates(x, state), *self.columns(state), *self._factors(state))
        ready = state.prepared.get(self.name)
        if ready is None or not ready.fits(x, out.dtype):
            ready = state.prepared[self.name] = self._prepare(x, state, out.dtype)
        gates = self._rank_gates(x, state, out.dtype) if ready.gates is None else ready.gates
        return add_mixture(out, x, gates, ready.a, ready.b)

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
        return state if state.active is None or state.active & self.scalings.keys() else None

    def _prepare(self, x: Tensor, state: GateState, dtype: torch.dtype) -> Prepared:
        a, b = concatenate(*self._factors(state), dtype)
        gates = None if state.gates is None else self._rank_gates(x, state, dtype)
        return Prepared(shape=(x.shape[0], x.ndim), gates=gates, a=a, b=b.t())

    def _rank_gates(self, x: Tensor, state: GateState, dtype: torch.dtype) -> Tensor:
        return widen(self._gates(x, state), *self.columns(state)).to(dtype)

    def add(self, expert: str, a: nn.Parameter, b: nn.Parameter, scaling: float) -> None:
        """Take an expert's factors, [rank, in] and [out, rank], as the last one's successors."""
        self.register_parameter(f"lora_A_{expert}", a)
        self.register_parameter(f"lora_B_{expert}", b)
        self.scalings[expert] = scaling
        self._columns = None

    def remove(self, expert: str) -> tuple[nn.Parameter, nn.Parameter, float]:
        """Give an expert's factors and scaling back."""
        removed = self.lora_A[expert], self.lora_B[expert], self.scalings.pop(expert)
        delattr(self, f"lora_A_{expert}")
        delattr(self, f"lora_B_{expert}")
        self._columns = None
        return removed

    def extra_repr(self) -> str:
        return f"site={self.name}, ranks={self.ranks}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "ExpertLinear":
        self._columns = None  # the device may change
        if self.context.state is not None:
            self.context.state.forget()
        return super()._apply(fn, recurse)

    def _running(self, state: GateState) -> list[str]:
        """The experts of this site that take part, in the order of their factors."""
        own, active = self.scalings, state.active
        return list(own) if active is None else [expert for expert in own if expert in active]

    def _factors(self, state: GateState) -> tuple[list[Tensor], list[Tensor]]:
        experts = self._running(state)
        parameters: Any = self._parameters  # getattr would search for each of them
        factors_a = [parameters[f"lora_A_{expert}"] for expert in experts]
        return factors_a, [parameters[f"lora_B_{expert}"] for expert in experts]

    def columns(self, state: GateState) -> tuple[Tensor, Tensor]:
        """For each rank [total rank], the place of its expert among the gates, and its scaling."""
        experts = state.experts if state.gates is not None else tuple(self.scalings)
        key, known = (experts, state.active), self._columns
        if known is None or known[0] != key:
            device, running = self.base_layer.weight.device, self._running(state)
            ranks = [len(a) for a in self._factors(state)[0]]
            each = [e for e, rank in zip(running, ranks, strict=True) for _ in range(rank)]
            place = torch.tensor([experts.index(expert) for expert in each], device=device)
            scaling = torch.tensor([self.scalings[expert] for expert in each], device=device)
            known = self._columns = key, place, scaling
        return known[1], known[2]

    def _gates(self, x: Tensor, state: GateState) -> Tensor:
        """The gates of this input's rows, [batch, 1, expert], or of its tokens, [batch, seq, expert]."""
        if state.gates is None:
            return self._token_gates(x, state)
        gates = state.gates.get(self.name)
        if gates is None:
            raise ValueError(
                f"{self.name}: its gates are unknown: set_gates was told the owners of no row of its "
                "stream"
            )
        if x.dim() == 2 and gates.shape[0] == x.shape[0]:
            return gates[:, 0]  # a row is a token: the patches of all images, one after the other
        if x.dim() == 3 and gates.shape[0] in (1, x.shape[0]):
            return gates
        if x.dim() != 3 and gates.shape[0] == 1:
            return gates[0]
        if x.dim() == 3 and state.expand and x.shape[0] % gates.shape[0] == 0:
            return gates.repeat_interleave(x.shape[0] // gates.shape[0], 0)
        raise ValueError(
            f"{self.name}: gates are for {gates.shape[0]} samples, but its input is "
            f"{list(x.shape)}; a site needs [batch, seq, in] with the batch of its gates"
        )

    def _token_gates(self, x: Tensor, state: GateState) -> Tensor:
        """Gates [batch, seq, expert] of each token by itself, decided in float32."""
        if self.token_router is None or state.decide is None:
            raise ValueError(f"{self.name}: has no token router; call bank.add_token_routers()")
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.token_router.float()) / state.temperature
            gates, _ = state.decide(logits)
        if state.recording:
            state.token_logits[self.name] = logits  # by site: a second call replaces the first
        return gates
