"""The kinds of router, a row each. Config, model, build and training read this table; none names a kind.

    kind       its logits come from                gates
    softmax    a learned Router                    all experts, sum 1
    top_k      a learned Router                    the k largest, sum 1
    top_p      a learned Router                    the fewest whose probabilities reach p, sum 1
    threshold  a learned Router                    what a probability is above a threshold, sum 1 or 0
    sigmoid    a learned Router                    each expert by itself
    anchors    the likeness to experts' means      as softmax
    likeness   the same, not around their mean     each cosine by itself, sum 1 at most
    one_hot    -                                   the sample's own expert, uniform where it is unknown
    fixed      -                                   the same for every sample

`noise` is added to the logits in training alone, before the temperature divides them: softmax with gumbel is the Gumbel
softmax (arXiv 1611.01144), sigmoid with logistic the relaxed Bernoulli of Polytropon (arXiv 2202.13914), and learned
that of noisy top-k (arXiv 1701.06538, eq. 4).

A new kind is a row and its function.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from moa.routing.late import Late, Tensor

if TYPE_CHECKING:
    from torch import nn

    from moa.routing import gating, router
else:
    gating, router = Late("moa.routing.gating"), Late("moa.routing.router")

Decided = tuple[Tensor, Tensor | None]

TABLE = "table"  # a score without features: the logits of a task are what is learned
CLUSTER = "cluster"  # those of the cluster of samples that one is nearest to
TABLE_OPTIONS = ("experts", "sites", "num_tasks", "per_site", "modality_dropout")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind: its function, and what the others need of it."""

    # gates as logits, and of learned kinds the probabilities that losses read (before top-k, sum 1), from
    #   logits [batch, site, choice], over the temperature, a null expert last; None without a router
    #   mask, False where an expert may not be used, or None; expert_ids [batch], -1 unknown; weights [expert];
    #   joint [choice], True where an expert takes no place of top-k, or None; raised [batch, site, 1] from a learned
    #   threshold, or None; bias [site, 1, choice] or None; and the `options`. Experts: those that it chooses among
    gates: Callable[..., Decided]
    # makes the module with the logits from experts, sites, dims, num_tasks and the options
    router: "Callable[..., nn.Module] | None" = None
    learns: Literal["gradient", "means"] | None = None  # by an optimiser, or by adding samples up
    per_token: bool = False  # may decide for each token by itself
    null_expert: bool = False  # may have one choice more, no expert at all
    by_expert: bool = False  # decides by the sample's own expert
    module_options: tuple[str, ...] = ()  # settings in the config that `router` takes
    options: tuple[str, ...] = ()  # settings that the function reads
    noises: tuple[str, ...] = ()  # those that training may add to its logits
    learned_threshold: bool = False  # without a `threshold`, the router learns one
    below_one: bool = False  # its gates may sum to less than 1
    hard: bool = False  # gates that are 0 have no gradient, unless it is `straight_through`


def softmax(*, logits: Any, mask: Any, **_: Any) -> Decided:
    probs = gating.softmax_gates(logits)
    return (probs if mask is None else gating.top_k_gates(logits, probs.shape[-1], mask)), probs


def top_k(*, logits: Any, mask: Any, top_k: int, joint: Any, renormalize: bool, bias: Any = None, **_: Any) -> Decided:
    return gating.top_k_gates(logits, top_k, mask, joint, renormalize, bias), gating.softmax_gates(logits)


def top_p(*, logits: Any, mask: Any, top_p: float | None, joint: Any, renormalize: bool, **_: Any) -> Decided:
    kept = TOP_P if top_p is None else top_p
    return gating.top_p_gates(logits, kept, mask, joint, renormalize), gating.softmax_gates(logits)


def threshold(*, logits: Any, mask: Any, threshold: float | None, joint: Any, raised: Any, **_: Any) -> Decided:
    level = raised.sigmoid() / logits.shape[-1] if threshold is None else threshold
    return gating.threshold_gates(logits, level, mask, joint), gating.softmax_gates(logits)


def sigmoid(*, logits: Any, mask: Any, threshold: float | None, normalize: bool, **_: Any) -> Decided:
    gates = gating.sigmoid_gates(logits)
    probs = gates / gates.sum(-1, keepdim=True)
    return gating.cut_gates(gates if mask is None else gates * mask, threshold, normalize), probs


def one_hot(*, expert_ids: Any, weights: Any, mask: Any, joint: Any, **_: Any) -> Decided:
    gates = gating.one_hot_gates(expert_ids, len(weights), joint)[:, None]
    return (gates if mask is None else gating.apply_availability(gates, mask)), None


def fixed(*, expert_ids: Any, weights: Any, mask: Any, **_: Any) -> Decided:
    gates = weights.expand(len(expert_ids), 1, -1)
    return (gates if mask is None else gates * mask), None


def learned_router(**options: Any) -> "nn.Module":
    if "banks" in options:
        return router.BankRouter(**options)
    if options.get("score") == CLUSTER:
        return router.ClusterRouter(**{key: options[key] for key in (*TABLE_OPTIONS, "evidence", "centres")})
    if options.get("score") == TABLE:
        return router.TableRouter(**{key: options[key] for key in TABLE_OPTIONS})
    return router.Router(**options)


def anchors(*, sites: int, **options: Any) -> "nn.Module":
    return router.AnchorRouter(**options)


def likeness(*, logits: Any, mask: Any, **_: Any) -> Decided:
    gates = gating.likeness_gates(logits)
    return (gates if mask is None else gates * mask), None


LEARNED: dict[str, Any] = {
    "router": learned_router,
    "learns": "gradient",
    "module_options": (
        *("evidence", "hidden", "pooling", "per_site", "modality_dropout"),
        *("score", "learned_threshold", "learned_noise", "task_prior"),
    ),
}
SOFTMAX: dict[str, Any] = LEARNED | {
    "per_token": True,
    "null_expert": True,
    "noises": ("gaussian", "learned", "gumbel"),
}
TOP_P = 0.8
KINDS = {
    "softmax": Kind(gates=softmax, **SOFTMAX),
    "top_k": Kind(gates=top_k, **SOFTMAX, options=("top_k", "renormalize"), hard=True),
    "top_p": Kind(gates=top_p, **SOFTMAX, options=("top_p", "renormalize"), hard=True),
    "threshold": Kind(gates=threshold, **SOFTMAX, options=("threshold",), learned_threshold=True, below_one=True),
    "sigmoid": Kind(
        gates=sigmoid,
        **LEARNED,
        per_token=True,
        options=("threshold", "normalize"),
        noises=("gaussian", "learned", "logistic"),
    ),
    "one_hot": Kind(gates=one_hot, by_expert=True),
    "fixed": Kind(gates=fixed, options=("weights",)),
    "anchors": Kind(gates=softmax, router=anchors, learns="means", module_options=("evidence",)),
    "likeness": Kind(
        gates=likeness,
        router=partial(anchors, sharpness=1.0, centred=False),
        learns="means",
        module_options=("evidence",),
        below_one=True,
    ),
}


def names(which: Callable[[Kind], bool]) -> str:
    return ", ".join(name for name, kind in KINDS.items() if which(kind))
