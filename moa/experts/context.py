"""The context that brings gates from the router to the layers, for every kind of expert.

The gates of a forward live until the next one: checkpointing recomputes with them, and decoding keeps the prompt's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moa.experts.crosstalk import Watch

Decide = Callable[[Tensor], Tensor]  # logits [.., choice] -> gates [.., expert]
Score = Callable[[Tensor, Tensor], Tensor]  # features [.., in], a router [choice, in] -> logits [.., choice]


@dataclass(kw_only=True)
class GateState:
    """The gates of one forward: by site [batch, 1, expert], the experts in the order of `experts`.

    In packed rows they are [rows, seq, expert]. `gates` is None where every site routes each token by its own router.
    """

    gates: dict[str, Tensor] | None
    experts: tuple[str, ...]
    active: frozenset[str] | None = None  # in inference: those that some sample uses; None: all
    expand: bool = False  # generation repeats each sample for its beams and return sequences
    decide: Decide | None = None  # of token routing
    temperature: float | int = 1.0  # of token routing
    score: Score = F.linear  # of token routing
    recording: bool = True
    # site -> [batch, seq, choice], divided by the temperature
    token_logits: dict[str, Tensor] = field(default_factory=dict)
    watch: Watch | None = None  # what sites measure in this forward
    # What inference computes once for all decoding steps, by site. It lives no longer than the
    # gates: an optimiser may write to parameters through flat buffers, which leaves no trace.
    prepared: dict[str, Any] = field(default_factory=dict)

    def uses(self, experts: Iterator[str] | Any) -> bool:
        """Whether one of these experts takes part."""
        return self.active is None or not self.active.isdisjoint(experts)

    def gates_at(
        self, site: str, x: Float[Tensor, "*lead in"], token_router: Tensor | None
    ) -> Float[Tensor, "*lead_or_1 expert"]:
        """A site's gates, [batch, 1, expert] or [batch, seq, expert], as its input's rows need them."""
        if self.gates is None:
            return self._token_gates(site, x, token_router)
        gates = self.gates.get(site)
        if gates is None:
            raise ValueError(f"{site}: has no gates: set_gates got no owners of its stream's rows")
        if x.dim() == 2 and gates.shape[0] == x.shape[0]:
            return gates[:, 0]  # a row is a token: the patches of all images, one after the other
        if x.dim() == 3 and gates.shape[0] in (1, x.shape[0]):
            return gates
        if x.dim() != 3 and gates.shape[0] == 1:
            return gates[0]
        if x.dim() == 3 and self.expand and x.shape[0] % gates.shape[0] == 0:
            return gates.repeat_interleave(x.shape[0] // gates.shape[0], 0)
        raise ValueError(
            f"{site}: gates are for {gates.shape[0]} samples, but its input is "
            f"{list(x.shape)}; a site needs [batch, seq, in] with the batch of its gates"
        )

    def _token_gates(self, site: str, x: Tensor, token_router: Tensor | None) -> Tensor:
        """Gates [batch, seq, expert] of each token by itself, decided in float32."""
        if token_router is None or self.decide is None:
            raise ValueError(f"{site}: has no token router; call bank.add_token_routers()")
        with torch.autocast(x.device.type, enabled=False):
            logits = self.score(x.float(), token_router.float()) / self.temperature
            gates = self.decide(logits)
        if self.recording:
            self.token_logits[site] = logits  # by site: a second call replaces the first
        return gates


class GateContext:
    """Holds the gates between the router that decides them and the sites that use them."""

    def __init__(self) -> None:
        self.state: GateState | None = None
        self.enabled = True
        self.watch: Watch | None = None  # of the forwards whose gates are set from now on

    def forget(self) -> None:
        """Drop what inference computed from the experts: they may change."""
        if self.state is not None:
            self.state.prepared.clear()

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

        A checkpointed layer runs twice: now, and in the backward pass. By then a second forward (a dual encoder's other
        tower, a router's look) has set its own gates here, and the gradients would be wrong.
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
            # a copy that records nothing: logits are taken once, after the forward
            self.context.state = replace(state, recording=False) if state else None

    def __exit__(self, *_: object) -> None:
        self.context.state, self.context.enabled = self.outside
