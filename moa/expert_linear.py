"""A frozen linear layer with its experts, and the context that brings them their gates.

The gates of a forward live until the next one, so that activation checkpointing recomputes with
the gates it first ran with, and decoding goes on with the gates of the prompt.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa.gating import softmax_gates, top_k_gates
from moa.mixing import add_mixture, concatenate, gated, mix, mix_linear


@dataclass(kw_only=True)
class GateState:
    """The gates of one forward: per site [batch, 1, total rank], the experts' scaling included.

    Where rows of tokens hold several samples they are [rows, seq, total rank]. `gates` is None where
    every token is routed at every site by the site's own token router.
    """

    gates: dict[str, Tensor] | None
    # In inference the experts that some sample uses, and the only ones in `gates`; None: all.
    active: frozenset[str] | None = None
    expand: bool = False  # generation repeats each sample for its beams and return sequences
    top_k: int | None = None  # of token routing; None: softmax over all experts
    temperature: float | int = 1.0  # of token routing
    recording: bool = True
    # site -> [batch, seq, expert], divided by the temperature
    token_logits: dict[str, Tensor] = field(default_factory=dict)
    # What inference computes once for all decoding steps, by site. It lives no longer than the
    # gates: an optimiser may write to parameters through flat buffers, which leaves no trace.
    prepared: dict[str, "Prepared"] = field(default_factory=dict)
    latest: "SameInput | None" = None  # of the site that was prepared last

    def forget(self) -> None:
        """Drop what was computed from the factors: they may change."""
        self.prepared.clear()
        self.latest = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A site's gates and concatenated factors [rank, in], [rank, out] in the dtype of its output."""

    shape: tuple[int, int]  # of the input they fit: first axis and number of axes
    gates: Tensor
    a: Tensor
    b: Tensor
    same_input: "SameInput | None" = None  # None: tokens are routed one by one


class SameInput:
    """Sites that were given one and the same tensor, such as q, k and v: A x once for all of them.

    Which ones shows in the first forward of a generation; the steps after it project once.
    """

    def __init__(self, x: Tensor) -> None:
        self.members: list[tuple[str, Tensor, Tensor]] = []  # site, a, gates
        self._input = ref(x)  # weak: the prompt's tensors are large
        self._joined: tuple[Tensor, Tensor | None] | None = None  # A and gates of all members
        self._hidden: dict[str, Tensor] = {}

    def takes(self, x: Tensor, a: Tensor, gates: Tensor) -> bool:
        """Whether a site with this input, [rank, in] and gates is one of them."""
        if self._joined is not None or self._input() is not x:
            return False
        _, other, its_gates = self.members[0]
        return a.dtype == other.dtype and gates.shape[:-1] == its_gates.shape[:-1]

    def hidden(self, x: Tensor, site: str) -> Tensor:
        """The site's gated A x."""
        if self._input() is not x or site not in self._hidden:
            self._joined = self._joined or self._join()
            self._input = ref(x)
            parts = gated(x, *self._joined).split([len(a) for _, a, _ in self.members], -1)
            names = (name for name, _, _ in self.members)
            self._hidden = dict(zip(names, parts, strict=True))
        return self._hidden.pop(site)

    def _join(self) -> tuple[Tensor, Tensor | None]:
        a = torch.cat([a for _, a, _ in self.members])
        gates = torch.cat([gates for _, _, gates in self.members], -1)
        if gates.numel() == len(a):  # one sample, or one gate for all: once in A
            return a * gates.view(-1, 1), None
        return a, gates


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
    """y = W x + B ((A x) * gates): a base layer and the experts at its site.

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
        self._spread: tuple[Tensor, Tensor] | None = None  # of token routing

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
        if not self.scalings or not self.context.enabled:
            return self.base_layer(x)
        state = self._state()
        if state.active is not None and not state.active & self.scalings.keys():
            return self.base_layer(x)
        if torch.is_grad_enabled():
            state.forget()
            return self._mix(x, state)
        out = self.base_layer(x)
        ready = state.prepared.get(self.name)
        if ready is None or ready.shape != (x.shape[0], x.ndim) or ready.a.dtype != out.dtype:
            ready = self._prepare(x, state, out.dtype)
            if ready.same_input is not None:
                return add_mixture(out, gated(x, ready.a, ready.gates), ready.b)
        if ready.same_input is not None:
            return add_mixture(out, ready.same_input.hidden(x, self.name), ready.b)
        return add_mixture(out, gated(x, ready.a, self._token_gates(x, state)), ready.b)

    def _mix(self, x: Tensor, state: GateState) -> Tensor:
        base, gates, factors = self.base_layer, self._gates(x, state), self._factors(state)
        if is_bare(base):
            return mix_linear(x, base.weight, base.bias, gates, *factors)
        return mix(x, base(x), gates, *factors)

    def add(self, expert: str, a: nn.Parameter, b: nn.Parameter, scaling: float) -> None:
        """Take an expert's factors, [rank, in] and [out, rank], as the last one's successors."""
        self.register_parameter(f"lora_A_{expert}", a)
        self.register_parameter(f"lora_B_{expert}", b)
        self.scalings[expert] = scaling
        self._spread = None

    def remove(self, expert: str) -> tuple[nn.Parameter, nn.Parameter, float]:
        """Hand an expert's factors and scaling back."""
        removed = self.lora_A[expert], self.lora_B[expert], self.scalings.pop(expert)
        delattr(self, f"lora_A_{expert}")
        delattr(self, f"lora_B_{expert}")
        self._spread = None
        return removed

    def extra_repr(self) -> str:
        return f"site={self.name}, ranks={self.ranks}"

    def spread(self, columns: dict[str, int]) -> tuple[Tensor, Tensor]:
        """Index and factor [total rank] that turn gates [.., expert] into gates [.., rank].

        `columns` says where each expert stands in the gates.
        """
        ranks, device = self.ranks, self.base_layer.weight.device
        index = [columns[expert] for expert, rank in ranks.items() for _ in range(rank)]
        scaling = [self.scalings[expert] for expert, rank in ranks.items() for _ in range(rank)]
        return torch.tensor(index, device=device), torch.tensor(scaling, device=device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "ExpertLinear":
        self._spread = None  # the device may change
        if self.context.state is not None:
            self.context.state.forget()
        return super()._apply(fn, recurse)

    def _factors(self, state: GateState) -> tuple[list[Tensor], list[Tensor]]:
        own, active = self.scalings, state.active
        experts = own if active is None else [expert for expert in own if expert in active]
        parameters: Any = self._parameters  # getattr would search for each of them
        factors_a = [parameters[f"lora_A_{expert}"] for expert in experts]
        return factors_a, [parameters[f"lora_B_{expert}"] for expert in experts]

    def _prepare(self, x: Tensor, state: GateState, dtype: torch.dtype) -> Prepared:
        a, b = concatenate(*self._factors(state), dtype)
        gates = a.new_empty(0) if state.gates is None else self._gates(x, state).to(dtype)
        same = None
        if state.gates is not None:
            if state.latest is None or not state.latest.takes(x, a, gates):
                state.latest = SameInput(x)
            same = state.latest
            same.members.append((self.name, a, gates))
        ready = Prepared(shape=(x.shape[0], x.ndim), gates=gates, a=a, b=b.t(), same_input=same)
        state.prepared[self.name] = ready
        return ready

    def _state(self) -> GateState:
        state = self.context.state
        if state is None:
            raise ValueError(
                f"{self.name}: its experts {list(self.scalings)} have no gates; call "
                "bank.set_gates(...) first, or run inside bank.context.disabled()"
            )
        return state

    def _gates(self, x: Tensor, state: GateState) -> Tensor:
        if state.gates is None:
            return self._token_gates(x, state)
        gates = state.gates.get(self.name)
        if gates is None:
            raise ValueError(
                f"{self.name}: its gates are unknown: set_gates was told the owners of no row of its "
                "stream"
            )
        if x.dim() == 2 and gates.shape[0] == x.shape[0]:
            return gates[:, 0]  # a row is a token: the patches of all pictures, one after the other
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
        """Gates [batch, seq, total rank] of each token by itself, decided in float32."""
        if self.token_router is None:
            raise ValueError(f"{self.name}: has no token router; call bank.add_token_routers()")
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.token_router.float()) / state.temperature
            top_k = state.top_k
            gates = softmax_gates(logits) if top_k is None else top_k_gates(logits, top_k)
        if state.recording:
            state.token_logits[self.name] = logits  # by site: a second call replaces the first
        if self._spread is None:
            self._spread = self.spread({expert: i for i, expert in enumerate(self.scalings)})
        index, scaling = self._spread
        return gates.index_select(-1, index) * scaling


def is_bare(layer: nn.Linear) -> bool:
    """Whether a layer is its weight and bias and nothing more, so that it need not be called.

    Quantised layers are of another type, ZeRO-3 gathers a layer's weight in hooks, accelerate's
    offloading puts another forward in front, and a trained weight needs its own gradient.
    """
    hooks = layer._forward_pre_hooks or layer._forward_hooks
    hooks = hooks or layer._backward_hooks or layer._backward_pre_hooks
    frozen = not any(p.requires_grad for p in layer._parameters.values() if p is not None)
    return type(layer) is nn.Linear and frozen and not hooks and "forward" not in vars(layer)
