"""The context that brings gates from the router to the layers, for every kind of expert.

The gates of a forward live until the next one: checkpointing recomputes with them, and decoding keeps the prompt's.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moa.experts.crosstalk import Watch
from moa.experts.token_routers import Pooling, TokenSite
from moa.routing.gating import fused_logits, mixed_logits

# logits [.., choice], the places of these choices among all or None, where there is one a bias -> gates [.., expert]
Decide = Callable[..., Tensor]
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
    score: Score = F.linear  # of token routing: what compares tokens with a router
    recording: bool = True
    biases: Mapping[str, Tensor] = field(default_factory=dict)  # site -> what top-k adds to the shares of its choices
    pooling: Pooling | None = None  # of token routing: the tokens of a prompt decide together
    # site with a router -> [batch, seq, choice], or pooled [batch, choice], divided by the temperature
    token_logits: dict[str, Tensor] = field(default_factory=dict)
    # site with a router -> its gates, which other sites read, and where they are pooled also later tokens
    decided: dict[str, Tensor] = field(default_factory=dict)
    watch: Watch | None = None  # what sites measure in this forward
    # by stream, each row's or token's share of every task, for experts whose ranks have gates by task
    tasks: dict[str, Tensor] = field(default_factory=dict)
    streams: dict[str, str] = field(default_factory=dict)  # site -> stream
    # by stream, each row's or token's logits from a router of samples, where these count beside a token's
    samples: dict[str, Tensor] = field(default_factory=dict)
    # What inference computes once for all decoding steps, by site. It lives no longer than the
    # gates: an optimiser may write to parameters through flat buffers, which leaves no trace.
    prepared: dict[str, Any] = field(default_factory=dict)

    def gates_at(
        self,
        site: str,
        x: Float[Tensor, "*lead in"],
        token_router: Tensor | None,
        routed: TokenSite | None = None,
        depth: Float[Tensor, " 1"] | None = None,
    ) -> Float[Tensor, "*lead_or_1 expert"]:
        """A site's gates, [batch, 1, expert] or [batch, seq, expert], as its input's rows need them."""
        if self.gates is None:
            gates = self._token_gates(site, x, token_router, routed or TokenSite(leader=site), depth)
            if self.pooling is None:
                return gates
            gates = self.pooling.spread(site, gates)
        elif site in self.gates:
            gates = self.gates[site]
        else:
            raise ValueError(f"{site}: has no gates: set_gates got no owners of its stream's rows")
        return self._fitted(site, x, gates)

    def tasks_at(self, site: str, x: Float[Tensor, "*lead in"]) -> Float[Tensor, "*lead_or_1 task"]:
        shares = self.tasks.get(self.streams.get(site, ""))
        if shares is None:
            raise ValueError(f"{site}: its experts have gates by task, and no tasks; call bank.set_tasks(...)")
        return self._fitted(site, x, shares)

    def _fitted(self, site: str, x: Tensor, gates: Tensor) -> Tensor:
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

    def _token_gates(
        self, site: str, x: Tensor, token_router: Tensor | None, routed: TokenSite, depth: Tensor | None
    ) -> Tensor:
        """Gates [*lead, expert] of each token by itself, or pooled [batch, expert], decided in float32."""
        decide = self.decide
        if decide is None or (token_router is None and routed.leader == site and routed.choices != ()):
            raise ValueError(f"{site}: has no token router; call bank.add_token_routers()")
        found = self.decided.get(routed.leader)
        if routed.leader != site:
            if found is None:
                raise ValueError(f"{site}: runs before {routed.leader}, whose token router it shares; use share=site")
            if self.pooling is None and found.shape[:-1] != x.shape[:-1]:
                lengths = f"{list(x.shape[:-1])} tokens, and {routed.leader} {list(found.shape[:-1])}"
                raise ValueError(f"{site}: has {lengths}, whose token router it shares; use share=site")
            return found
        if found is not None and self.pooling is not None:
            return found  # of the prompt: this is a later token
        with torch.autocast(x.device.type, enabled=False):
            if token_router is None:  # no routed expert
                logits = x.new_zeros(*x.shape[:-1], 0, dtype=torch.float32)
            else:
                logits = self.score(x.float(), token_router.float()) / self.temperature
            if routed.by_task:
                shares = self.tasks_at(site, x)
                logits = (logits.unflatten(-1, (shares.shape[-1], -1)) * shares[..., None]).sum(-2)
            if self.samples:
                sample = self._fitted(site, x, self.samples[self.streams[site]])
                sample = sample if routed.choices is None else sample[..., list(routed.choices)]
                if routed.banks:
                    logits = fused_logits(logits, sample, routed.banks)
                elif depth is not None:
                    logits = mixed_logits(logits, sample, depth.float())
            if self.pooling is not None:
                logits = self.pooling.logits(site, self._of_samples(site, logits))
            bias = {"bias": self.biases[site].to(x.device)} if site in self.biases else {}
            gates = decide(logits, routed.choices, **bias)
        if self.recording and token_router is not None:
            self.token_logits[site] = logits  # by site: a second call replaces the first
        self.decided[site] = gates
        return gates

    def _of_samples(self, site: str, logits: Tensor) -> Tensor:
        """Of repeated samples one each: their prompts are the same."""
        assert self.pooling is not None
        stream = self.pooling.streams[site]
        known, length = self.pooling.weights[stream].shape[1], logits.shape[1] if stream == "text" else 1
        times = logits.shape[0] * length // known if self.expand and stream == "text" else 1
        if stream == "text" and logits.shape[0] * length != known * times:
            raise ValueError(f"{site}: has {list(logits.shape[:2])} tokens, and the prompts of the batch {known}")
        return logits[::times]


class GateContext:
    """Holds the gates between the router that decides them and the sites that use them."""

    def __init__(self) -> None:
        self.state: GateState | None = None
        self.enabled = True
        self.root = False  # experts learn by the square root of their gates
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
            # a copy that records nothing, and decides again: logits are taken once, after the forward
            self.context.state = replace(state, recording=False, decided={}) if state else None

    def __exit__(self, *_: object) -> None:
        self.context.state, self.context.enabled = self.outside
