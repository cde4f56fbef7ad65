"""Backbone + experts + router: one forward, one generate, gates decided once before any expert runs.

    batch -> evidence -> router -> gates -> bank.set_gates -> vision tower, projector, language model

Every way to decide gates (router kinds, oracle, fixed weights, an override) ends in the same gate
tensor, and every forward takes the same path through the experts.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from data.batch import Batch
from moa.backbones.clip import ClipBackbone
from moa.backbones.llava import Backbone, Look
from moa.config import NONE
from moa.experts.bank import ExpertBank
from moa.packing import answer_positions
from moa.routing.decisions import mean_token_gates, router_losses, token_decisions, token_losses
from moa.routing.gating import (
    apply_availability,
    one_hot_gates,
    sigmoid_gates,
    softmax_gates,
    top_k_gates,
)
from moa.routing.router import AnchorRouter, Evidence, Router

KINDS = ("softmax", "top_k", "sigmoid", "one_hot", "fixed", "anchors")


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


@dataclass(frozen=True, kw_only=True)
class MixtureOutput:
    """One forward. With labels, `logits` [batch, answer, vocab] stand at the answers' tokens alone,
    in their order, and `labels` [batch, answer] beside them, -100 where a sample has fewer; without
    labels `logits` are those of the whole sequence, a row of the batch each.

    `loss_per_sample` is the mean cross-entropy over a sample's `num_tokens` answer tokens, 0 for
    none. `gates` are [batch, site or 1, expert]; with token routing each sample's mean over valid
    tokens and sites. `aux` are the losses on the router's decisions, empty where nothing decides.
    """

    loss_per_sample: Float[Tensor, " batch"]
    num_tokens: Int[Tensor, " batch"]
    logits: Float[Tensor, "_ answer vocab"]
    labels: Int[Tensor, "batch answer"] | None
    gates: Float[Tensor, "batch site expert"]
    router_logits: Float[Tensor, "batch site choice"] | None
    aux: dict[str, Float[Tensor, ""]] = field(default_factory=dict)


class MixtureModel(nn.Module):
    """A backbone with its bank of experts and the router (None for kinds one_hot and fixed).

    kind: softmax | top_k | sigmoid (learned Router), anchors (AnchorRouter), one_hot (the sample's
    own expert, uniform where nobody knows), fixed (`weights`, uniform by default).
    With granularity "token" each site routes each token by itself, by softmax or top_k.
    null_expert: softmax and top_k have one choice more, which adds nothing to the backbone, so that
    a sample's gates may sum to less than one.
    """

    def __init__(
        self,
        backbone: Backbone | ClipBackbone,
        bank: ExpertBank,
        router: Router | AnchorRouter | None = None,
        *,
        kind: str = "softmax",
        top_k: int = 2,
        null_expert: bool = False,
        temperature: float | int = 1.0,
        granularity: str = "sample",
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_kind(kind, granularity, router)
        if null_expert and (kind not in ("softmax", "top_k") or granularity != "sample"):
            raise ValueError(
                f"router.null_expert needs kind softmax or top_k by sample, got {kind}"
            )
        self.model = backbone.model
        self.backbone: Any = backbone
        self.bank = bank
        self.router = router
        self.kind = kind
        self.top_k = top_k
        self.null_expert = null_expert
        self.temperature = temperature
        self.granularity = granularity
        count = len(bank.names)
        uniform = [1.0 / count] * count if count else []
        values = torch.tensor(list(weights) if weights is not None else uniform)
        self.register_buffer("weights", values, persistent=False)
        if len(values) != count:
            raise ValueError(f"weights: {len(values)} values for {count} experts {bank.names}")
        if weights is not None and kind != "fixed":
            raise ValueError(f"weights have no effect with router.kind {kind}; choices: fixed")
        if kind == "top_k" and not 1 <= top_k <= count:
            raise ValueError(f"router.top_k must be in 1..{count} (experts), got {top_k}")

    @property
    def routes(self) -> list[str]:
        """What a sample may be meant for: an expert, or none of them with a null expert."""
        return [*self.bank.names, *([NONE] if self.null_expert else [])]

    def forward(
        self,
        batch: Batch,
        gates: Tensor | None = None,
        *,
        withhold: Collection[str] = (),
        available: Tensor | None = None,
    ) -> MixtureOutput:
        """Loss per sample and what the router decided; see `compute_gates` for the arguments."""
        decided, features = self._prefill(batch, gates, withhold, available)
        hidden = self.backbone.hidden_states(batch, features)
        labels = None
        if batch.labels is not None:
            hidden, labels = answer_positions(hidden, batch.labels, batch.segments, len(batch))
        logits = self.backbone.logits(hidden)
        loss, num_tokens = answer_loss(logits, labels, len(batch))
        aux, used = self._decisions(batch, decided)
        return MixtureOutput(
            loss_per_sample=loss,
            num_tokens=num_tokens,
            logits=logits,
            labels=labels,
            gates=used,
            router_logits=decided.logits,
            aux=aux,
        )

    def generate(
        self,
        batch: Batch,
        gates: Tensor | None = None,
        *,
        withhold: Collection[str] = (),
        available: Tensor | None = None,
        **kwargs: Any,
    ) -> Int[Tensor, "rows new"]:
        """New token ids, a row per sample and return sequence; left padding in the batch.

        Gates are decided from the prompt and stay: beams and return sequences keep their sample's.
        `kwargs` go to transformers' generate.
        """
        ids, _ = self.generate_routed(
            batch, gates, withhold=withhold, available=available, **kwargs
        )
        return ids

    @torch.no_grad()
    def generate_routed(
        self,
        batch: Batch,
        gates: Tensor | None = None,
        *,
        withhold: Collection[str] = (),
        available: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Int[Tensor, "rows new"], Gates]:
        """As `generate`, with the gates that the ids were generated with."""
        if batch.segments is not None:
            raise ValueError("generation needs a row per sample: collate without pack_length")
        training = self.training
        self.eval()  # activation checkpointing, a training matter, would forbid the cache
        try:
            decided, features = self._prefill(batch, gates, withhold, available, expand=True)
            return self.backbone.generate(batch, features, **kwargs), decided
        finally:
            self.train(training)

    def compute_gates(
        self,
        batch: Batch,
        *,
        override: Tensor | None = None,
        withhold: Collection[str] = (),
        available: Tensor | None = None,
        look: Look | None = None,
    ) -> Gates:
        """The gates of a batch, each sample by itself, from the prompt side alone.

        override: gates [batch, expert] or [batch, site or 1, expert] to use instead.
        withhold: kinds of evidence treated as missing. available: [expert] or [batch, expert] bool,
        False where an expert may not be used. look: at the pictures, if it is at hand.
        """
        if override is not None:
            gates = override if override.dim() == 3 else override[:, None]
            return Gates(gates=_available(gates.float(), available))
        if self.granularity == "token":
            if available is not None:
                raise ValueError("available: token routing uses all experts; give gates instead")
            return Gates()
        if self.kind == "fixed":
            gates = self.get_buffer("weights").expand(len(batch), 1, -1)
            return Gates(gates=_available(gates, available, renormalise=False))
        if self.kind == "one_hot":
            gates = one_hot_gates(batch.expert_ids, len(self.bank.names))[:, None]
            return Gates(gates=_available(gates, available))
        if self.router is None:  # check_kind has seen to it
            raise AssertionError(self.kind)
        evidence = self.evidence(batch, look)
        logits = self.router(evidence, withhold) / self.temperature
        return self._gates_of(logits, available)

    def evidence(self, batch: Batch, look: Look | None = None) -> Evidence:
        """What the router may look at, from the backbone without experts, and without gradient."""
        kinds = self.router.evidence if self.router is not None else ()
        found: dict[str, Tensor] = {}
        with torch.no_grad(), self.bank.context.disabled():
            if "image" in kinds:
                look = look or self.backbone.look(batch)
                tokens, mask = per_sample(look.tokens, look.owner, batch.image_mask)
                found |= {"image_tokens": tokens, "image_mask": mask}
            if "text" in kinds:
                tokens = self.backbone.embed(batch.text_ids)
                found |= {"text_tokens": tokens, "text_mask": batch.text_mask.bool()}
            if "ocr" in kinds:
                chars = self.backbone.embed(batch.ocr_ids)
                tokens = masked_mean(chars, batch.ocr_char_mask)
                found |= {"ocr_tokens": tokens, "ocr_mask": batch.ocr_mask.bool()}
                found |= {"ocr_boxes": batch.ocr_boxes, "ocr_confidence": batch.ocr_confidence}
            if "task" in kinds:
                found["task_ids"] = batch.task_ids
        return Evidence(**found)

    def update_anchors(self, batch: Batch) -> None:
        """Add a batch of samples of known experts to the anchors (kind anchors)."""
        if not isinstance(self.router, AnchorRouter):
            raise ValueError(f"router.kind={self.kind} has no anchors; choices: anchors")
        self.router.update(self.evidence(batch), batch.expert_ids)

    def enable_gradient_checkpointing(self, *, compare: bool = True) -> None:
        """Recompute activations in the backward pass, each layer with the gates it first had.

        `compare` the shapes of what was kept and what is recomputed: not of weights that come and go.
        """
        self.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={
                "use_reentrant": False,
                "context_fn": self.bank.context.checkpoint_contexts,
                "determinism_check": "default" if compare else "none",
            }
        )

    def _prefill(
        self,
        batch: Batch,
        override: Tensor | None,
        withhold: Collection[str],
        available: Tensor | None,
        expand: bool = False,
    ) -> tuple[Gates, Any]:
        """Decide and set the gates, then compute the pictures' features with them."""
        look = None
        if override is None and self._router_sees("image"):
            with torch.no_grad(), self.bank.context.disabled():
                look = self.backbone.look(batch)
        decided = self.compute_gates(
            batch, override=override, withhold=withhold, available=available, look=look
        )
        self._set(decided, batch, expand)
        return decided, self._features(batch, look)

    def _router_sees(self, kind: str) -> bool:
        learned = self.kind not in ("one_hot", "fixed") and self.granularity == "sample"
        return learned and self.router is not None and kind in self.router.evidence

    def _features(self, batch: Batch, look: Look | None) -> Any:
        """What the router looked at serves the language model too, as far as it has no experts."""
        family = self.backbone.family
        if look is None or not self._is_plain(family.tower):
            return self.backbone.features(batch)
        if all(map(self._is_plain, family.projectors)):
            return look.features
        return self.backbone.features(batch, look.tower)

    def _is_plain(self, part: str) -> bool:
        """Whether a part of the model has neither experts nor training."""
        parameters = self.model.get_submodule(part).parameters()
        return not any(parameter.requires_grad for parameter in parameters) and not any(
            site.startswith(f"{part}.") for site in self.bank.sites
        )

    def _set(self, decided: Gates, batch: Batch, expand: bool) -> None:
        if decided.gates is None:
            top_k = self.top_k if self.kind == "top_k" else None
            self.bank.route_tokens(top_k, self.temperature, recording=not expand)
            return
        owners = self.backbone.owners(batch)
        self.bank.set_gates(decided.gates, owners, batch.segments, expand=expand)

    def _gates_of(self, logits: Tensor, available: Tensor | None) -> Gates:
        """Logits [batch, site, expert], divided by the temperature, as gates of this kind."""
        mask = None if available is None else _rows(available, logits).expand_as(logits)
        if self.null_expert:  # of logit 0, without a parameter: softmax knows differences alone
            logits = F.pad(logits, (0, 1))
            mask = None if mask is None else F.pad(mask, (0, 1), value=True)
        if self.kind == "sigmoid":
            gates = sigmoid_gates(logits)
            probs = gates / gates.sum(-1, keepdim=True)
            gates = _available(gates, available, renormalise=False)
        else:
            probs = softmax_gates(logits)
            top = self.top_k if self.kind == "top_k" else logits.shape[-1]
            whole = self.kind != "top_k" and mask is None
            gates = probs if whole else top_k_gates(logits, top, mask)
            gates = gates[..., :-1] if self.null_expert else gates
        return Gates(gates=gates, logits=logits, probs=probs)

    def _decisions(self, batch: Batch, decided: Gates) -> tuple[dict[str, Tensor], Tensor]:
        """Losses on the decisions, and the gates [batch, site or 1, expert] that were used."""
        top_k = self.top_k if self.kind == "top_k" else None
        if decided.gates is None:
            return self._token_decisions(batch, top_k)
        if decided.logits is None or decided.probs is None or self.kind == "anchors":
            return {}, decided.gates
        logits, probs = decided.logits.transpose(0, 1), decided.probs.transpose(0, 1)
        aux = router_losses(logits, probs, batch.expert_ids, batch.task_ids, top_k=top_k)
        return aux, decided.gates

    def _token_decisions(self, batch: Batch, top_k: int | None) -> tuple[dict[str, Tensor], Tensor]:
        """As `_decisions`, over every site's valid tokens; the gates are each sample's mean."""
        logits = self.bank.take_token_logits()
        owners = self.backbone.owners(batch)
        if batch.is_blank:  # nobody's tokens
            owners = {stream: torch.full_like(rows, -1) for stream, rows in owners.items()}
        groups = list(token_decisions(logits, self.bank.streams, batch.token_samples(), owners))
        aux = token_losses(groups, batch.expert_ids, batch.task_ids, top_k)
        return aux, mean_token_gates(groups, len(batch), top_k)


def check_kind(kind: str, granularity: str, router: nn.Module | None) -> None:
    """ValueError unless kind, granularity and router fit together."""
    if kind not in KINDS:
        raise ValueError(f"router.kind: {kind!r}; choices: {', '.join(KINDS)}")
    if granularity not in ("sample", "token"):
        raise ValueError(f"router.granularity: {granularity!r}; choices: sample, token")
    if granularity == "token":
        if kind not in ("softmax", "top_k"):
            raise ValueError(f"router.granularity token needs kind softmax or top_k, got {kind}")
        needed: tuple[type, ...] = (type(None),)
    elif kind == "anchors":
        needed = (AnchorRouter,)
    else:
        needed = (type(None), Router) if kind in ("one_hot", "fixed") else (Router,)
    if not isinstance(router, needed):
        names = " or ".join(t.__name__ for t in needed)
        found = type(router).__name__
        raise ValueError(
            f"router.kind {kind} with granularity {granularity} needs {names}: {found}"
        )


def answer_loss(
    logits: Float[Tensor, "_ answer vocab"],
    labels: Int[Tensor, "batch answer"] | None,
    num_samples: int,
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Each sample's mean cross-entropy over its answer tokens in float32, and their number."""
    if labels is None:
        zeros = logits.new_zeros(num_samples, dtype=torch.float32)
        return zeros, zeros.long()
    loss = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
    ).view(labels.shape)
    count = (labels != -100).sum(1)
    return loss.sum(1) / count.clamp(min=1), count


def per_sample(
    tokens: Float[Tensor, "rows patch image"],
    owner: Int[Tensor, " rows"],
    image_mask: Bool[Tensor, " batch"],
) -> tuple[Float[Tensor, "batch tokens image"], Bool[Tensor, "batch tokens"]]:
    """The tokens of each sample's pictures in a row, and where there are any."""
    batch, (rows, patches, _) = image_mask.shape[0], tokens.shape
    here = F.one_hot(owner, batch)  # [row, batch]
    slot = (here.cumsum(0) * here).sum(1) - 1  # which of its sample's rows each one is
    most = int(slot.max()) + 1 if rows else 1
    grid = tokens.new_zeros(batch, most, *tokens.shape[1:])
    grid[owner, slot] = tokens
    mask = torch.zeros(batch, most, dtype=torch.bool, device=tokens.device)
    mask[owner, slot] = True
    mask = (mask & image_mask[:, None])[..., None].expand(-1, -1, patches)
    return grid.flatten(1, 2), mask.flatten(1, 2)


def masked_mean(
    tokens: Float[Tensor, "batch word char width"], mask: Bool[Tensor, "batch word char"]
) -> Float[Tensor, "batch word width"]:
    """Mean over the masked characters; zeros where there are none."""
    weights = mask / mask.sum(-1, keepdim=True).clamp(min=1)
    return torch.einsum("bwc,bwcd->bwd", weights, tokens.float())


def _rows(available: Tensor, gates: Tensor) -> Tensor:
    """[expert] or [batch, expert] -> broadcastable to [batch, site, expert]."""
    return available.to(gates.device)[None, None] if available.dim() == 1 else available[:, None]


def _available(gates: Tensor, available: Tensor | None, *, renormalise: bool = True) -> Tensor:
    if available is None:
        return gates
    return apply_availability(gates, _rows(available, gates), renormalise=renormalise)
