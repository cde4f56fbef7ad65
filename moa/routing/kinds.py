"""The kinds of router, a row each. Config, model, build and training read this table; none names a kind.

    kind       its logits come from                gates
    softmax    a learned Router                    all experts, sum 1
    top_k      a learned Router                    the k largest, sum 1
    sigmoid    a learned Router                    each expert by itself
    anchors    the likeness to experts' means      as softmax
    one_hot    -                                   the sample's own expert, uniform where it is unknown
    fixed      -                                   the same for every sample

A new kind is a row and its function. The config reads the rows, so that torch is imported in functions alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

    Decided = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind: its function, and what the others need of it."""

    # gates as logits, and of learned kinds the probabilities that losses read (before top-k, sum 1), from
    #   logits [batch, site, choice], over the temperature, a null expert last; None without a router
    #   mask, False where an expert may not be used, or None; top_k; expert_ids [batch], -1 unknown; weights [expert];
    #   joint [choice], True where an expert takes no place of top-k, or None. Experts: those that it chooses among
    gates: "Callable[..., Decided]"
    # makes the module with the logits from experts, sites, dims, num_tasks and the options
    router: "Callable[..., nn.Module] | None" = None
    learns: Literal["gradient", "means"] | None = None  # by an optimiser, or by adding samples up
    per_token: bool = False  # may decide for each token by itself
    null_expert: bool = False  # may have one choice more, no expert at all
    by_expert: bool = False  # decides by the sample's own expert
    module_options: tuple[str, ...] = ()  # settings in the config that `router` takes
    options: tuple[str, ...] = ()  # settings that the function reads


def softmax(*, logits: Any, mask: Any, **_: Any) -> "Decided":
    from moa.routing.gating import softmax_gates, top_k_gates

    probs = softmax_gates(logits)
    return (probs if mask is None else top_k_gates(logits, probs.shape[-1], mask)), probs


def top_k(*, logits: Any, mask: Any, top_k: int, joint: Any, **_: Any) -> "Decided":
    from moa.routing.gating import softmax_gates, top_k_gates

    return top_k_gates(logits, top_k, mask, joint), softmax_gates(logits)


def sigmoid(*, logits: Any, mask: Any, **_: Any) -> "Decided":
    from moa.routing.gating import sigmoid_gates

    gates = sigmoid_gates(logits)
    return (gates if mask is None else gates * mask), gates / gates.sum(-1, keepdim=True)


def one_hot(*, expert_ids: Any, weights: Any, mask: Any, joint: Any, **_: Any) -> "Decided":
    from moa.routing.gating import apply_availability, one_hot_gates

    gates = one_hot_gates(expert_ids, len(weights), joint)[:, None]
    return (gates if mask is None else apply_availability(gates, mask)), None


def fixed(*, expert_ids: Any, weights: Any, mask: Any, **_: Any) -> "Decided":
    gates = weights.expand(len(expert_ids), 1, -1)
    return (gates if mask is None else gates * mask), None


def learned_router(**options: Any) -> "nn.Module":
    from moa.routing.router import Router

    return Router(**options)


def anchors(*, sites: int, **options: Any) -> "nn.Module":
    from moa.routing.router import AnchorRouter

    return AnchorRouter(**options)


LEARNED: dict[str, Any] = {
    "router": learned_router,
    "learns": "gradient",
    "module_options": ("evidence", "hidden", "pooling", "per_site", "modality_dropout"),
}
SOFTMAX: dict[str, Any] = LEARNED | {"per_token": True, "null_expert": True}
KINDS = {
    "softmax": Kind(gates=softmax, **SOFTMAX),
    "top_k": Kind(gates=top_k, **SOFTMAX, options=("top_k",)),
    "sigmoid": Kind(gates=sigmoid, **LEARNED),
    "one_hot": Kind(gates=one_hot, by_expert=True),
    "fixed": Kind(gates=fixed, options=("weights",)),
    "anchors": Kind(gates=softmax, router=anchors, learns="means", module_options=("evidence",)),
}


def names(which: Callable[[Kind], bool]) -> str:
    """The kinds that a rule allows, for a message."""
    return ", ".join(name for name, kind in KINDS.items() if which(kind))
