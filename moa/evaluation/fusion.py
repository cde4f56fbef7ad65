"""A run and another one, whose tokens may be others, answer together: probabilities are averaged by what tokens mean.

    r = p R,  R = softmax(100 cos(token, anchor))      anchors: the tokens that both vocabularies have
    p with p R next to (1 - w) r + w r'                in the vocabulary of the run

DeePEn (Huang et al. 2024, arXiv 2404.12715, section 3), whose R this is. Its search for p by AdamW moves rounding
errors as far as differences. Here p <- p ((r / p R) R^T), the EM steps of a mixture's shares: they need no rate, come
nearer in KL(r || p R) with every step, and leave p where r is its own.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from data.batch import Batch
from data.collate import pad
from data.sources import make_collator
from moa.backbones.vocabulary import spellings, split
from moa.checkpoint import load_model, step_folder
from moa.config import RunConfig
from moa.model import LanguageMixture

SHARPNESS, STEPS = 100.0, 5  # of the released program


def relative(
    embeddings: Float[Tensor, "vocab width"], anchors: Int[Tensor, " anchor"]
) -> Float[Tensor, "vocab anchor"]:
    """Each token by its likeness to the anchors, as shares."""
    units = F.normalize(embeddings.float(), dim=-1)
    return (SHARPNESS * F.normalize(units @ units[anchors].T, dim=-1)).softmax(-1)


def nearest(
    start: Float[Tensor, "rows vocab"],
    shares: Float[Tensor, "vocab anchor"],
    wanted: Float[Tensor, "rows anchor"],
    steps: int = STEPS,
) -> Float[Tensor, "rows vocab"]:
    """Probabilities p, from `start` on, whose p `shares` come nearer to what is wanted."""
    tiny = torch.finfo(start.dtype).tiny
    for _ in range(steps):
        start = start * ((wanted / (start @ shares).clamp(min=tiny)) @ shares.T)
    return start


@dataclass(frozen=True, kw_only=True)
class Partner:
    """The other run, and both vocabularies by their anchors."""

    model: LanguageMixture
    config: RunConfig
    own: Float[Tensor, "vocab anchor"]
    theirs: Float[Tensor, "other_vocab anchor"]
    spelled: dict[int, bytes]  # token of the run -> its text
    tokens: dict[bytes, int]  # text -> token of the other run
    ends: tuple[int, int]  # of an answer, in both

    def translate(self, token: int) -> list[int]:
        """The other run's tokens for one of the run's; none for a row of the embeddings that is no token."""
        return [self.ends[1]] if token == self.ends[0] else split(self.spelled.get(token, b""), self.tokens)


@lru_cache(maxsize=1)
def open_partner(model: LanguageMixture, step: Path, device: torch.device) -> Partner:
    other, _, config = load_model(step, device)
    both = model, other.answering()
    own, theirs = (vocabulary(one) for one in both)
    theirs.pop(getattr(both[1].backbone.processor, "image_token", "").encode(), None)  # in no answer
    ends = own_end, their_end = tuple(one.backbone.end for one in both)
    shared = [ends, *((number, theirs[text]) for text, number in own.items() if text in theirs and number != own_end)]
    if len(shared) < 2:
        raise ValueError(f"gates=with:{step}: the two vocabularies have no token in common")
    anchors = torch.tensor(shared, device=device).T
    tables = [one.backbone.model.get_input_embeddings().weight for one in both]
    parts = [relative(table, ids) for table, ids in zip(tables, anchors, strict=True)]
    named: dict[str, Any] = {"own": parts[0], "theirs": parts[1], "tokens": theirs, "ends": (own_end, their_end)}
    return Partner(model=both[1], config=config, spelled={number: text for text, number in own.items()}, **named)


def vocabulary(model: LanguageMixture) -> dict[bytes, int]:
    return spellings(json.loads(model.backbone.processor.tokenizer.backend_tokenizer.to_str()))


class Fused:
    """A logits processor: the log of both runs' probabilities for the samples of a batch, fused.

    The other run reads its own prompts, and what was answered so far in its own tokens, from the start for each token.
    """

    def __init__(self, model: LanguageMixture, batch: Batch, run: str, weight: float, *, withhold_task: bool) -> None:
        self.weight, self.prompt, self.device = weight, batch.input_ids.shape[1], batch.input_ids.device
        self.partner = open_partner(model, step_folder(run), self.device)
        self.gates: Tensor | None = None
        other = self.partner.model
        options: dict[str, Any] = {"for_generation": True, "allow_unknown_tasks": True, "withhold_task": withhold_task}
        collator = make_collator(self.partner.config, other.backbone.intake, **options)
        self.padding = collator.processor.tokenizer.pad_token_id
        known = [replace(s, expert=s.expert if s.expert in other.routes else None) for s in batch.samples]
        self.batch: Batch = collator(known).to(self.device)
        rows = zip(self.batch.input_ids, self.batch.attention_mask.bool(), strict=True)
        self.prompts: list[list[int]] = [ids[mask].tolist() for ids, mask in rows]

    def __call__(
        self, input_ids: Int[Tensor, "rows _"], scores: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "rows vocab"]:
        own, theirs = scores.float().softmax(-1), self.others(input_ids[:, self.prompt :].tolist())
        wanted = (1 - self.weight) * own @ self.partner.own + self.weight * theirs @ self.partner.theirs
        return nearest(own, self.partner.own, wanted).log().to(scores.dtype)

    def others(self, answers: Sequence[Sequence[int]]) -> Float[Tensor, "rows other_vocab"]:
        """The other run's probabilities of what follows these answers of the run."""
        texts = [chain.from_iterable(map(self.partner.translate, answer)) for answer in answers]
        rows = [[*prompt, *text] for prompt, text in zip(self.prompts, texts, strict=True)]
        ids, mask = pad(rows, self.padding, left=True)
        batch = replace(self.batch, input_ids=ids.to(self.device), attention_mask=mask.long().to(self.device))
        seen = list[Tensor]()

        def keep(_: Tensor, scores: Tensor) -> Tensor:
            seen.append(scores)
            return scores

        token: dict[str, Any] = {"max_new_tokens": 1, "num_beams": 1, "do_sample": False, "pad_token_id": self.padding}
        _, decided = self.partner.model.generate_routed(batch, self.gates, logits_processor=[keep], **token)
        self.gates = decided.gates
        if not seen[0].amax(-1).isfinite().all():
            raise ValueError("gates=with: the other run's logits are not finite (NaN or infinity)")
        return seen[0].float().softmax(-1)
