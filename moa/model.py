"""Backbone + experts + routing: gates are decided once, before any expert runs.

    batch -> evidence -> routing -> gates -> bank.set_gates -> vision tower, projector, language model

Every way to decide gates ends in the same tensor, and every forward takes the same path through the experts.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from data.batch import Batch
from moa.backbones.clip import ClipBackbone
from moa.backbones.llava import Backbone, Look
from moa.experts.bank import ExpertBank, by_stream
from moa.experts.crosstalk import crosstalk, energy_tables
from moa.experts.penalties import PADDING
from moa.experts.rank_gates import task_shares
from moa.experts.token_routers import pooling
from moa.packing import answer_positions, prompt_samples
from moa.routing.decisions import mean_token_gates, token_decisions, token_loads, token_losses
from moa.routing.gating import balanced_bias
from moa.routing.roles import NONE, Roles
from moa.routing.router import Evidence
from moa.routing.routing import Gates, Routing
from moa.routing.schedule import GateDraws


@dataclass(frozen=True, kw_only=True)
class MixtureOutput:
    """One forward. With labels, `logits` [batch, answer, vocab] are those of the answers' tokens alone,
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
    router_logits: Float[Tensor, "batch decision choice"] | None
    aux: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    loads: dict[str, Float[Tensor, " _"]] = field(default_factory=dict)  # of sites that are balanced by a bias
    energies: Float[Tensor, "watched expert expert"] | None = None  # where asked for, see moa/experts/crosstalk.py


class MixtureModel(nn.Module, ABC):
    """What every mixture has: a backbone, its bank of experts, and the routing that decides their gates.

    `LanguageMixture` answers, `ClipMixture` compares. `gates` are the roles of the experts, by default all routed;
    `router` and `settings` are those of `Routing`.
    """

    def __init__(
        self,
        backbone: Backbone | ClipBackbone,
        bank: ExpertBank,
        router: nn.Module | None = None,
        *,
        gates: Sequence[str] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.model = backbone.model
        self.backbone: Any = backbone
        self.bank = bank
        names = tuple(bank.names)
        roles = Roles(names, ("routed",) * len(names) if gates is None else tuple(gates))
        self.routing = Routing(router, roles=roles, **settings)
        self.available: Tensor | None = None  # [expert] bool: the experts that there are; None: all of them

    @property
    def router(self) -> Any:
        """The module with the logits; None for kinds without one, and where tokens are routed."""
        return self.routing.router

    @abstractmethod
    def probe(self, batch: Batch, **options: Any) -> tuple[Tensor, Tensor]:
        """What an export must reproduce, see the subclasses; `options` go to generation, where there is one."""

    def answering(self) -> "LanguageMixture":
        """This mixture, where it answers in tokens; ValueError for one that compares."""
        raise ValueError("a dual encoder generates no text")

    @property
    def counted(self) -> Tensor:
        """The routed experts [expert], which crosstalk is measured among: shared ones are meant to answer all."""
        return torch.tensor([g == "routed" for g in self.routing.roles.gates], device=self.routing.weights.device)

    @property
    def routes(self) -> list[str]:
        """What a sample may be meant for: an expert, or none of them with a null expert."""
        return [*self.bank.names, *([NONE] if self.routing.null_expert else [])]

    def compute_gates(
        self,
        batch: Batch,
        *,
        override: Tensor | None = None,
        withhold: Collection[str] = (),
        available: Tensor | None = None,
        look: Look | None = None,
        draws: GateDraws | None = None,
    ) -> Gates:
        """The gates of a batch, each sample by itself, from the prompt side alone.

        override: gates [batch, expert] or [batch, site or 1, expert] to use instead.
        withhold: kinds of evidence treated as missing. available: [expert] or [batch, expert] bool,
        False where an expert may not be used. look: at the images, where it was computed before.
        draws: what training does to the gates that the router decides.
        """
        if self.available is not None:
            available = self.available if available is None else available & self.available
        if override is not None:
            return self.routing.override(override, available)
        choice: dict[str, Any] = {"withhold": withhold, "available": available, "draws": draws}
        return self.routing.decide(self.evidence(batch, look), batch.expert_ids, **choice)

    def set_gates(self, decided: Gates, batch: Batch, *, expand: bool = False) -> None:
        """Let the coming forward of a batch use these gates; `expand` where generation repeats samples."""
        routing, rows = self.routing, (self.backbone.owners(batch), batch.segments)
        if decided.gates is not None:
            self.bank.set_gates(decided.gates, *rows, expand=expand)
        else:
            more: dict[str, Any] = {"score": routing.token_logits, "recording": not expand}
            if routing.pool != "none":
                prompt, owners = prompt_samples(batch.token_samples(), batch.labels), self._owners(batch)
                more["pooling"] = pooling(routing.pool, len(batch), self.bank.streams, prompt, owners, batch.segments)
            if decided.logits is not None:
                more["samples"] = by_stream(decided.logits[:, 0], *rows)
            self.bank.route_tokens(partial(routing.token_gates, draw=True), routing.temperature, **more)
        if self.bank.num_tasks:
            self.bank.set_tasks(task_shares(batch.task_ids, self.bank.num_tasks), *rows)
        watch = self.bank.context.watch
        if watch is not None and watch.penalties:
            for stream, own in ({"text": batch.token_samples()} | self._owners(batch)).items():
                watch.tasks[stream] = batch.task_ids[own.clamp(min=0)].where(own >= 0, PADDING)

    def evidence(self, batch: Batch, look: Look | None = None, kinds: Collection[str] | None = None) -> Evidence:
        """What the router may look at, or some kinds of evidence, from the backbone without experts and gradient."""
        kinds, found = self.routing.evidence if kinds is None else kinds, dict[str, Tensor]()
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
        """Add a batch of samples of known experts to the means of a router that learns by means."""
        self.router.update(self.evidence(batch), self.routing.targets(batch.expert_ids))

    def balance(self, loads: Mapping[str, Float[Tensor, " _"]]) -> None:
        """Move the biases of top-k by how often each site's experts were chosen."""
        choices, joint = self.bank.token_choices(), torch.tensor(self.routing.roles.joint)
        for site, load in loads.items():
            own, bias = choices[site], self.bank.token_biases[site]
            apart = joint if own is None else joint[list(own)]
            bias.copy_(balanced_bias(bias, load, self.routing.bias_rate, apart))

    def enable_gradient_checkpointing(self, *, compare: bool = True) -> None:
        """Recompute activations in the backward pass, each layer with the gates it first had. `compare` the shapes of
        what was kept and what is recomputed: not of weights that come and go."""
        if not self.backbone.recomputes:
            raise ValueError("train.gradient_checkpointing: open_clip recomputes without a place for the gates")
        options: dict[str, Any] = {"context_fn": self.bank.context.checkpoint_contexts}
        options |= {"use_reentrant": False, "determinism_check": "default" if compare else "none"}
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    def _owners(self, batch: Batch) -> dict[str, Tensor]:
        owners = self.backbone.owners(batch)
        if batch.is_blank:  # its image belongs to no sample
            owners = {stream: torch.full_like(rows, -1) for stream, rows in owners.items()}
        return owners


class LanguageMixture(MixtureModel):
    def answering(self) -> "LanguageMixture":
        return self

    def forward(
        self, batch: Batch, gates: Tensor | None = None, draws: GateDraws | None = None, **choice: Any
    ) -> MixtureOutput:
        """Loss per sample and what the router decided; `choice` are options of `compute_gates`."""
        decided, features = self._prefill(batch, gates, choice | {"draws": draws})
        hidden = self.backbone.hidden_states(batch, features)
        labels = None
        if batch.labels is not None:
            hidden, labels = answer_positions(hidden, batch.labels, batch.segments, len(batch))
        logits = self.backbone.logits(hidden)
        loss, num_tokens = answer_loss(logits, labels, len(batch))
        aux, used, loads = self._decisions(batch, decided)
        energies = self._energies(batch)
        if energies is not None and energies.requires_grad:
            aux["crosstalk"] = crosstalk(energies, self.counted)
        aux |= self._penalties()
        return MixtureOutput(
            loss_per_sample=loss,
            num_tokens=num_tokens,
            logits=logits,
            labels=labels,
            gates=used,
            router_logits=decided.logits,
            aux=aux,
            loads=loads,
            energies=None if energies is None else energies.detach(),
        )

    def generate(self, batch: Batch, gates: Tensor | None = None, **options: Any) -> Int[Tensor, "rows new"]:
        """New token ids, a row per sample and return sequence; see `generate_routed`."""
        return self.generate_routed(batch, gates, **options)[0]

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
        """New token ids of a batch padded on the left, and the gates that they were generated with. Beams and return
        sequences keep their sample's gates. `kwargs` go to transformers' generate."""
        if batch.segments is not None:
            raise ValueError("generation needs a row per sample: collate without pack_length")
        training = self.training
        self.eval()  # activation checkpointing, a training matter, would forbid the cache
        try:
            choice = {"withhold": withhold, "available": available}
            decided, features = self._prefill(batch, gates, choice, expand=True)
            return self.backbone.generate(batch, features, **kwargs), decided
        finally:
            self.train(training)

    def probe(self, batch: Batch, **options: Any) -> tuple[Tensor, Tensor]:
        """What an export must reproduce: logits [batch, seq, vocab] and generated tokens [batch, new]."""
        return self(batch).logits.float(), self.generate(batch, **options)

    def _prefill(
        self, batch: Batch, override: Tensor | None, choice: dict[str, Any], expand: bool = False
    ) -> tuple[Gates, Any]:
        look = None
        if override is None and "image" in self.routing.evidence:
            with torch.no_grad(), self.bank.context.disabled():
                look = self.backbone.look(batch)
        decided = self.compute_gates(batch, override=override, look=look, **choice)
        self.set_gates(decided, batch, expand=expand)
        # What the router looked at serves the language model too, as far as it has no experts.
        family = self.backbone.family
        if look is None or not self._is_plain(family.tower):
            return decided, self.backbone.features(batch)
        if all(map(self._is_plain, family.projectors)):
            return decided, look.features
        return decided, self.backbone.features(batch, look.tower)

    def _is_plain(self, part: str) -> bool:
        trained = any(p.requires_grad for p in self.model.get_submodule(part).parameters())
        return not trained and not any(site == part or site.startswith(f"{part}.") for site in self.bank.sites)

    def _energies(self, batch: Batch) -> Float[Tensor, "watched owner expert"] | None:
        """What the watched sites measured in the forward that has ended, by the samples' expert; kept no longer."""
        state = self.bank.context.state
        if state is None or state.watch is None or not state.watch.found:
            return None
        energies = dict(state.watch.found)
        state.watch.found.clear()  # left there, they would keep the graph until the next forward
        return energy_tables(energies, self.bank.streams, batch.token_samples(), self._owners(batch), batch.expert_ids)

    def _penalties(self) -> dict[str, Float[Tensor, ""]]:
        """The losses on experts that the sites of the forward that has ended computed, their means; kept no longer."""
        state = self.bank.context.state
        if state is None or state.watch is None or not torch.is_grad_enabled():
            return {}
        values = dict(state.watch.values)
        state.watch.values.clear()
        for name in state.watch.penalties:
            if name not in values:
                raise ValueError(f"losses.{name}: has no effect: no layer has two routed experts with an A each")
        return {name: torch.stack(found).mean() for name, found in values.items()}

    def _decisions(self, batch: Batch, decided: Gates) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """Losses on the decisions, the gates [batch, site or 1, expert] that were used, and the loads."""
        if decided.gates is not None:
            losses = self.routing.losses([decided], batch.expert_ids, batch.task_ids)
            return losses, decided.gates, {}
        logits, owners, samples = self.bank.take_token_logits(), self._owners(batch), batch.token_samples()
        if self.routing.pool != "none":  # a decision for each sample that has such rows
            everyone = torch.arange(len(batch), device=samples.device)
            owners = {s: everyone.where(torch.isin(everyone, rows), -1) for s, rows in owners.items()}
            samples = everyone[:, None]
        choices, biases = self.bank.token_choices(), self.bank.token_biases
        groups = list(token_decisions(logits, self.bank.streams, samples, owners, choices, biases))
        aux = token_losses(groups, batch.expert_ids, batch.task_ids, self.routing.token_losses)
        loads = token_loads(groups, self.routing.token_choice) if biases and self.training else {}
        return aux, mean_token_gates(groups, len(batch), self.routing.token_gates), loads


def answer_loss(
    logits: Float[Tensor, "_ answer vocab"], labels: Int[Tensor, "batch answer"] | None, num_samples: int
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Each sample's mean cross-entropy over its answer tokens in float32, and their number."""
    if labels is None:
        zeros = logits.new_zeros(num_samples, dtype=torch.float32)
        return zeros, zeros.long()
    flat = logits.float().flatten(0, 1), labels.flatten()  # -100 is ignored
    loss = F.cross_entropy(*flat, reduction="none").view(labels.shape)
    count = (labels != -100).sum(1)
    return loss.sum(1) / count.clamp(min=1), count


def per_sample(
    tokens: Float[Tensor, "rows patch image"], owner: Int[Tensor, " rows"], image_mask: Bool[Tensor, " batch"]
) -> tuple[Float[Tensor, "batch tokens image"], Bool[Tensor, "batch tokens"]]:
    """The tokens of each sample's images in a row, and where there are any."""
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
