"""A dual encoder + experts + routing: images and texts, each gated by itself, compared once.

    images -> vision tower, frozen -> router -> gates -> vision tower with experts -> features
    texts  -> token embeddings     -> router -> gates -> text tower with experts   -> features

An image's gates are decided without any text and a text's without any image, so that features are computed once.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

import moa.contrastive as contrastive
from data.batch import Batch
from data.pairs import PairBatch, fill, only_images, only_texts, templates
from moa.model import MixtureModel, MixtureOutput
from moa.routing.routing import Gates
from moa.routing.schedule import GateDraws

CHUNK = 256  # texts encoded at a time


class ClipMixture(MixtureModel):
    """A mixture around a dual encoder, which compares images with texts.

    objective: `contrastive`, every text of the batch on all processes is a negative of every image (`negatives`
    "source": of its data set); `classification`, against the frozen texts of the sample's choices.
    """

    def __init__(self, *parts: Any, objective: str = "contrastive", negatives: str = "all", **settings: Any) -> None:
        super().__init__(*parts, **settings)
        self.objective, self.negatives = objective, negatives
        self._heads: dict[tuple[str, tuple[str, ...]], Tensor] = {}
        texts = [name for name, stream in self.bank.streams.items() if stream == "text"]
        if objective == "classification" and texts:
            raise ValueError(
                f"losses.pairs=classification has a frozen text head: {len(texts)} of model.targets lie "
                f"in the text tower and would never learn, first {texts[0]}"
            )

    def forward(
        self, batch: PairBatch, gates: Tensor | None = None, draws: GateDraws | None = None, **choice: Any
    ) -> MixtureOutput:
        """Loss per sample and what the router decided; `choice` are options of `compute_gates`."""
        sides = [only_images(batch)]
        if self.objective == "contrastive":
            sides.append(only_texts(batch))
        decided = [self.compute_gates(side, override=gates, draws=draws, **choice) for side in sides]
        used = [_of_samples(side) for side in decided]
        images = self.image_features(batch, used[0])
        if self.objective == "contrastive":
            logits, loss = self._contrast(batch, images, self.text_features(batch, used[1]))
        else:
            logits, loss = self._classify(batch, images)
        ids, tasks = (ids.repeat(len(sides)) for ids in (batch.expert_ids, batch.task_ids))
        return MixtureOutput(
            loss_per_sample=loss,
            num_tokens=torch.ones_like(loss, dtype=torch.long),
            logits=logits[:, None],
            labels=None,
            gates=torch.stack(used).mean(0),
            router_logits=decided[0].logits,
            aux=self.routing.losses(decided, ids, tasks),
        )

    def routed_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features of a batch's images and of its texts, each with its own gates."""
        images, texts = (_of_samples(self.compute_gates(side(batch))) for side in (only_images, only_texts))
        return self.image_features(batch, images), self.text_features(batch, texts)

    def probe(self, batch: Batch, **options: Any) -> tuple[Tensor, Tensor]:
        """What an export must reproduce: features [batch, side, dim] and each image's nearest text [batch, 1]."""
        return contrastive.compared(*self.routed_features(batch))

    def image_features(self, batch: Batch, gates: Float[Tensor, "batch site expert"]) -> Float[Tensor, "batch dim"]:
        self.set_gates(Gates(gates=gates), batch)
        return self.backbone.image_features(batch.pixel_values)

    def text_features(self, batch: Batch, gates: Float[Tensor, "batch site expert"]) -> Float[Tensor, "batch dim"]:
        self.set_gates(Gates(gates=gates), batch)
        return self.backbone.text_features(batch.input_ids, batch.attention_mask)

    @torch.no_grad()
    def frozen_head(self, question: str, choices: Sequence[str]) -> Float[Tensor, "class dim"]:
        """The choices' texts as the base reads them, over the templates of `question`; kept."""
        key = question, tuple(choices)
        device = self.backbone.model.logit_scale.device
        if key not in self._heads or self._heads[key].device != device:
            with self.bank.context.disabled():
                rows = [self._plain_texts(t, choices, device) for t in templates(question)]
            self._heads[key] = F.normalize(torch.stack(rows).mean(0), dim=-1)
        return self._heads[key]

    def _contrast(self, batch: PairBatch, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [batch, all] and the loss; in training over the samples of all processes."""
        count = len(batch)
        sizes = contrastive.batch_sizes(count, images.device) if self.training else [count]
        start = sum(sizes[: dist.get_rank()]) if len(sizes) > 1 else 0
        own = torch.arange(start, start + count, device=images.device)
        text_keys, image_keys, sources, all_texts = (
            contrastive.gather_rows(rows, sizes)
            for rows in (batch.text_keys, batch.image_keys, batch.source_keys, texts)
        )
        ignored = contrastive.not_negatives(text_keys, image_keys, own)
        if self.negatives == "source":
            ignored = ignored | (sources[own, None] != sources)
        logits = self.backbone.logits(images, all_texts)
        if self.backbone.is_sigmoid:
            return logits, contrastive.sigmoid_loss(logits, own, ignored)
        text_logits = self.backbone.logits(texts, contrastive.gather_rows(images, sizes))
        return logits, contrastive.softmax_loss(logits, text_logits, own, ignored)

    def _classify(self, batch: PairBatch, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [batch, class], -inf past a sample's own choices, and the cross-entropy."""
        for sample in batch.samples:
            if not sample.choices:
                where = f"source {sample.source!r}, sample {sample.id}"
                raise ValueError(f"losses.pairs=classification: {where} has no choices")
        most = max(len(sample.choices) for sample in batch.samples)
        rows = []
        for image, sample in zip(images, batch.samples, strict=True):
            head = self.frozen_head(sample.question, sample.choices)
            row = self.backbone.logits(image[None], head)
            rows.append(F.pad(row[0], (0, most - row.shape[1]), value=-torch.inf))
        logits = torch.stack(rows)
        wanted = [sample.choices.index(sample.answers[0]) for sample in batch.samples]
        target = torch.tensor(wanted, device=images.device)
        return logits, F.cross_entropy(logits, target, reduction="none")

    def _plain_texts(self, template: str, names: Sequence[str], device: torch.device) -> Tensor:
        parts = []
        for start in range(0, len(names), CHUNK):
            texts = [fill(template, name) for name in names[start : start + CHUNK]]
            ids, mask = self.backbone.processor.texts(texts)
            parts.append(self.backbone.text_features(ids.to(device), mask.to(device)))
        return torch.cat(parts)


def _of_samples(decided: Gates) -> Tensor:
    assert decided.gates is not None  # a dual encoder is routed by sample
    return decided.gates
