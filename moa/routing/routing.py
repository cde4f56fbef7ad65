"""Evidence -> gates: a kind of router with its settings, held by every mixture.

evidence -> router -> logits / temperature -> the kind's function -> gates [batch, site or 1, expert]
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moa.routing.gating import apply_availability
from moa.routing.kinds import KINDS
from moa.routing.losses import gate_losses
from moa.routing.router import Evidence


@dataclass(frozen=True, kw_only=True)
class Gates:
    """Gates [batch, site or 1, expert], and what a learned router decided them from.

    `logits` are divided by the temperature already; `probs` are the gates before top-k, summing to
    one. The choices are the experts, and last the null expert where there is one. All three are
    None where tokens are routed one by one, inside the model.
    """

    gates: Float[Tensor, "batch site expert"] | None = None
    logits: Float[Tensor, "batch site choice"] | None = None
    probs: Float[Tensor, "batch site choice"] | None = None


class Routing(nn.Module):
    """Decides the gates of each sample by itself, from the prompt side alone.

    kind: a row of moa/routing/kinds.py, with its `router` where it has one. weights: of kind fixed, uniform by default.
    granularity "token": each site routes each token, and `router` is None. null_expert: one choice more, which adds
    nothing to the backbone, so that a sample's gates may sum to less than one.
    """

    weights: Tensor

    def __init__(
        self,
        router: nn.Module | None = None,
        *,
        experts: int,
        kind: str = "softmax",
        top_k: int = 2,
        null_expert: bool = False,
        temperature: float | int = 1.0,
        granularity: str = "sample",
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.granularity, self.null_expert = KINDS[kind], granularity, null_expert
        self.router, self.top_k, self.temperature = router, top_k, temperature
        wanted = self.kind.router is not None and granularity == "sample"
        if wanted != (router is not None):
            needs = "needs a router" if wanted else "has no router"
            raise ValueError(f"router.kind {kind} with granularity {granularity} {needs}")
        uniform = [1.0 / max(experts, 1)] * experts
        self.register_buffer("weights", torch.tensor(weights or uniform), persistent=False)

    @property
    def evidence(self) -> tuple[str, ...]:
        """The kinds of evidence that the router reads."""
        return getattr(self.router, "evidence", ())

    @property
    def places(self) -> int | None:
        """Experts kept per decision; None: all."""
        return self.top_k if "top_k" in self.kind.options else None

    def override(self, gates: Tensor, available: Tensor | None = None) -> Gates:
        """Gates [batch, expert] or [batch, site or 1, expert] from elsewhere, where experts are available."""
        gates = (gates if gates.dim() == 3 else gates[:, None]).float()
        if available is not None:
            gates = apply_availability(gates, _rows(available, gates))
        return Gates(gates=gates)

    def decide(
        self,
        evidence: Evidence,
        expert_ids: Int[Tensor, " batch"],
        *,
        withhold: Collection[str] = (),
        available: Tensor | None = None,
    ) -> Gates:
        """The gates of a batch; see `MixtureModel.compute_gates`. None where tokens are routed one by one."""
        if self.granularity == "token":
            if available is not None:
                raise ValueError("available: token routing uses all experts; give gates instead")
            return Gates()
        logits, mask = None, None if available is None else _rows(available, self.weights)
        if self.router is not None:
            logits = self.router(evidence, withhold) / self.temperature
            mask = None if mask is None else mask.expand_as(logits)
            if self.null_expert:  # of logit 0, without a parameter: softmax reads differences alone
                logits = F.pad(logits, (0, 1))
                mask = None if mask is None else F.pad(mask, (0, 1), value=True)
        gates, probs = self._gates(logits, mask, expert_ids)
        gates = gates[..., :-1] if self.null_expert else gates
        return Gates(gates=gates, logits=logits, probs=probs)

    def token_gates(
        self, logits: Float[Tensor, "*lead expert"]
    ) -> tuple[Float[Tensor, "*lead expert"], Float[Tensor, "*lead expert"]]:
        """Gates and probabilities of tokens by their logits, which are divided by the temperature."""
        gates, probs = self._gates(logits)
        assert probs is not None  # kinds that route tokens have logits
        return gates, probs

    def losses(
        self, decided: Sequence[Gates], expert_ids: Int[Tensor, " _"], task_ids: Int[Tensor, " _"]
    ) -> dict[str, Float[Tensor, ""]]:
        """The losses on decisions, row after row; empty where no gradient could follow them."""
        if self.kind.learns != "gradient" or any(d.logits is None for d in decided):
            return {}
        logits, probs = (torch.cat([getattr(d, name) for d in decided]).transpose(0, 1) for name in ("logits", "probs"))
        return gate_losses(logits, probs, expert_ids, task_ids, top_k=self.places)

    def _gates(
        self, logits: Tensor | None, mask: Tensor | None = None, expert_ids: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        own: dict[str, Any] = {"top_k": self.top_k, "weights": self.weights}
        return self.kind.gates(logits=logits, mask=mask, expert_ids=expert_ids, **own)


def _rows(available: Bool[Tensor, "*batch expert"], like: Tensor) -> Bool[Tensor, "_ 1 expert"]:
    """[expert] or [batch, expert] -> broadcastable to [batch, site, expert]."""
    return (available[None, None] if available.dim() == 1 else available[:, None]).to(like.device)
