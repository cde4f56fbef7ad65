"""The task-aware router: evidence about a sample -> one logit per expert (and site).

Each kind of evidence (image tokens, question tokens, OCR words with boxes, task) has an encoder that pools it into one
vector, and a learned "missing" vector for where there is none; the vectors together are read by a small head.
Everything is float32, also under autocast. The evidence is the prompt side alone: an answer cannot reach the gates.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moa.routing.gating import anchor_similarity, anchor_sums
from moa.routing.scores import SCORES

EVIDENCE = ("image", "text", "ocr", "task")
NEVER = -1e4  # a logit whose share of a softmax is exactly 0
# Kind of evidence -> what its encoder reads; the task is an id alone.
INPUTS = {
    "image": ("image_tokens", "image_mask"),
    "text": ("text_tokens", "text_mask"),
    "ocr": ("ocr_tokens", "ocr_boxes", "ocr_confidence", "ocr_mask"),
}
# Tensor of a router or of a site's token router -> what its first axes run over.
AXES = {
    r"token_(router|noise|bias)\..*": ("expert",),
    r"task_router\..*": ("task", "expert"),
    r"rank_gates\.task\..*": ("task",),
    r"head\.3\.(weight|bias)": ("expert",),
    r"noise\.(weight|bias)": ("expert",),
    r"site_offset": ("site", "expert"),
    r"encoders\.task\.weight": ("task",),
    r"table": ("site", "task", "expert"),
    r"prior": ("task", "expert"),
    r"cluster_table": ("site", "cluster", "expert"),
    r"task_sums": ("expert", "task"),
    r"\w+_(sums|counts)": ("expert",),
}


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a router may look at; masks are True where there is something, task id -1 is unknown.

    A kind that the router does not read is None. `ocr_tokens` is one vector per word, `ocr_boxes` are
    x0 y0 x1 y1 in 0..1 of the image.
    """

    image_tokens: Float[Tensor, "batch patch image"] | None = None
    image_mask: Bool[Tensor, "batch patch"] | None = None
    text_tokens: Float[Tensor, "batch text width"] | None = None
    text_mask: Bool[Tensor, "batch text"] | None = None
    ocr_tokens: Float[Tensor, "batch word width"] | None = None
    ocr_boxes: Float[Tensor, "batch word 4"] | None = None
    ocr_confidence: Float[Tensor, "batch word"] | None = None
    ocr_mask: Bool[Tensor, "batch word"] | None = None
    task_ids: Int[Tensor, " batch"] | None = None  # -1: none, or withheld; below: none of the run's


def axes_of(key: str) -> tuple[str, ...]:
    return next((axes for name, axes in AXES.items() if re.fullmatch(name, key)), ())


class LearnedRouter(nn.Module):
    """What they have in common. model.to(bfloat16) and DeepSpeed's cast move one, but leave it its precision."""

    def __init__(self, evidence: Collection[str], modality_dropout: float | int = 0.0) -> None:
        super().__init__()
        self.evidence = tuple(kind for kind in EVIDENCE if kind in evidence)
        self.modality_dropout = modality_dropout

    def seen(self, present: Bool[Tensor, " batch"], withheld: bool = False) -> Bool[Tensor, " batch"]:
        """Without what is withheld, and without the samples that training hides by chance: by one stream of random
        numbers on the CPU, the same on all devices."""
        if withheld:
            return torch.zeros_like(present)
        if not self.training or self.modality_dropout == 0:
            return present
        kept = torch.rand(present.shape) >= self.modality_dropout
        return present & kept.to(present.device, non_blocking=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LearnedRouter":
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class Router(LearnedRouter):
    """Learned router. Logits are `[batch, 1, expert]`, or `[batch, site, expert]` with `per_site`.

    `dims` gives the widths of the image tokens ("image") and of the language model's embeddings ("text", which OCR
    words share). `task_prior` adds a learned row of its task to a sample's logits. In training each kind of
    evidence is hidden from a sample with chance `modality_dropout`, so that the router learns to do without any of
    them.
    """

    def __init__(
        self,
        *,
        experts: int,
        sites: int,
        evidence: Sequence[str] = EVIDENCE,
        dims: Mapping[str, int],
        num_tasks: int = 0,
        hidden: int = 64,
        pooling: str = "attention",
        per_site: bool = False,
        modality_dropout: float | int = 0.0,
        score: str = "linear",
        learned_threshold: bool = False,
        learned_noise: bool = False,
        task_prior: bool = False,
    ) -> None:
        super().__init__(evidence, modality_dropout)
        encoders: dict[str, Callable[[], nn.Module]] = {
            "image": lambda: TokenEncoder(dims["image"], hidden, pooling),
            "text": lambda: TokenEncoder(dims["text"], hidden, pooling, neighbours=True),
            "ocr": lambda: OcrEncoder(dims["text"], hidden, pooling),
            "task": lambda: nn.Embedding(num_tasks, hidden),
        }
        self.encoders = nn.ModuleDict({kind: encoders[kind]() for kind in self.evidence})
        missing = {kind: nn.Parameter(torch.randn(hidden) * 0.02) for kind in self.evidence}
        self.missing = nn.ParameterDict(missing)
        width = hidden * len(self.evidence)
        last = Scores(hidden, experts, score)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), last)
        self.site_offset = nn.Parameter(torch.zeros(sites, experts)) if per_site else None
        self.threshold = zeros(hidden, 1) if learned_threshold else None
        self.noise = zeros(hidden, experts) if learned_noise else None
        self.prior = nn.Parameter(torch.zeros(num_tasks, experts)) if task_prior else None

    def forward(self, evidence: Evidence, withhold: Collection[str] = ()) -> Float[Tensor, "batch site column"]:
        """Logits in float32, then what else it learns; kinds in `withhold` are treated as missing in every sample."""
        device = next(self.parameters()).device.type
        with torch.autocast(device, enabled=False):
            read = {kind: self._encode(kind, evidence, kind in withhold) for kind in self.evidence}
            features = self.head[:-1](torch.cat([vector for vector, _ in read.values()], dim=-1))
            logits = self.head[-1](features)[:, None]
            if self.prior is not None:
                ids: Any = evidence.task_ids
                logits = logits + (self.prior[ids.clamp(min=0)] * read["task"][1][:, None])[:, None]
            logits = logits if self.site_offset is None else logits + self.site_offset
            more = [own(features)[:, None] for own in (self.threshold, self.noise) if own is not None]
            more = [column.expand(*logits.shape[:-1], -1) for column in more]
            return torch.cat([logits, *more], dim=-1) if more else logits

    def _encode(self, kind: str, evidence: Evidence, withheld: bool) -> tuple[Tensor, Tensor]:
        """One vector per sample, the learned missing one where there is no evidence, and where there is some."""
        encoder = self.encoders[kind]
        if kind == "task":
            ids: Any = evidence.task_ids
            present, vector = ids >= 0, encoder(ids.clamp(min=0))
        else:
            *values, mask = (getattr(evidence, name) for name in INPUTS[kind])
            present, vector = mask.any(1), encoder(*(value.float() for value in values), mask)
        present = self.seen(present, withheld)
        return torch.where(present[:, None], vector, self.missing[kind]), present


class BankRouter(LearnedRouter):
    """A router for each bank of experts, by the bank's own evidence; logits in the order of the choices.

    `banks` are the evidence of each choice's bank; the other options are those of `Router`.
    """

    def __init__(self, *, banks: Sequence[Sequence[str]], evidence: Sequence[str], **options: Any) -> None:
        super().__init__(evidence)
        numbers = bank_numbers(banks)
        self.places = [(bank, numbers[:choice].count(bank)) for choice, bank in enumerate(numbers)]
        own = [{"experts": numbers.count(bank), "evidence": banks[numbers.index(bank)]} for bank in sorted({*numbers})]
        self.routers = nn.ModuleList(Router(**options | its) for its in own)

    def forward(self, evidence: Evidence, withhold: Collection[str] = ()) -> Float[Tensor, "batch 1 choice"]:
        each = [router(evidence, withhold) for router in self.routers]
        return torch.stack([each[bank][..., place] for bank, place in self.places], dim=-1)


def bank_numbers(banks: Sequence[Sequence[str]]) -> list[int]:
    """The number of each choice's bank, counted as they come; choices of the same evidence are of one."""
    first = list(dict.fromkeys(frozenset(own) for own in banks))
    return [first.index(frozenset(own)) for own in banks]


class TableRouter(LearnedRouter):
    """Learned logits of each task, with `per_site` for each layer by itself; zeros, all alike, where the task is
    unknown or hidden: Polytropon's allocation of skills (arXiv 2202.13914, section 3), MTL-LoRA's weights of tasks."""

    def __init__(
        self, *, experts: int, sites: int, num_tasks: int, per_site: bool = False, modality_dropout: float | int = 0.0
    ) -> None:
        super().__init__(("task",), modality_dropout)
        self.table = nn.Parameter(torch.zeros(sites if per_site else 1, num_tasks, experts))

    def forward(self, evidence: Evidence, withhold: Collection[str] = ()) -> Float[Tensor, "batch site expert"]:
        ids: Any = evidence.task_ids
        known = self.seen(ids >= 0, "task" in withhold)
        return self.table[:, ids.clamp(min=0)].transpose(0, 1) * known[:, None, None]


class ClusterRouter(LearnedRouter):
    """Learned logits of each cluster of samples, with `per_site` for each layer by itself (MoCLE, arXiv 2312.12379).

    `centres` are those of k-means over what `described` gives for training samples, and stay. A sample without any of
    the evidence gets zeros, all alike.
    """

    def __init__(
        self,
        *,
        experts: int,
        sites: int,
        evidence: Sequence[str],
        centres: Float[Tensor, "cluster feature"],
        num_tasks: int = 0,
        per_site: bool = False,
        modality_dropout: float | int = 0.0,
    ) -> None:
        super().__init__(evidence, modality_dropout)
        self.num_tasks = num_tasks
        self.register_buffer("centres", centres.float())
        self.cluster_table = nn.Parameter(torch.zeros(sites if per_site else 1, len(centres), experts))

    def forward(self, evidence: Evidence, withhold: Collection[str] = ()) -> Float[Tensor, "batch site expert"]:
        features, present = described(evidence, self.evidence, self.num_tasks, withhold)
        nearest = torch.cdist(features, self.get_buffer("centres")).argmin(-1)
        return self.cluster_table[:, nearest].transpose(0, 1) * self.seen(present)[:, None, None]


def described(
    evidence: Evidence, kinds: Sequence[str], num_tasks: int, withhold: Collection[str] = ()
) -> tuple[Float[Tensor, "batch feature"], Bool[Tensor, " batch"]]:
    """A sample's mean evidence of each kind, of length 1 or zeros, side by side; and whether it has any."""
    parts, seen = [], []
    for kind in kinds:
        features, present = pooled(kind, evidence, num_tasks)
        present = torch.zeros_like(present) if kind in withhold else present
        parts.append(F.normalize(features, dim=-1) * present[:, None])
        seen.append(present)
    return torch.cat(parts, -1), torch.stack(seen).any(0)


def pooled(kind: str, evidence: Evidence, num_tasks: int) -> tuple[Tensor, Tensor]:
    """The mean of a sample's tokens of one kind in float32, of a task a row of the identity; and where it has some."""
    if kind == "task":
        ids: Any = evidence.task_ids
        return F.one_hot(ids.clamp(min=0), num_tasks).float(), ids >= 0
    tokens, mask = getattr(evidence, f"{kind}_tokens"), getattr(evidence, f"{kind}_mask")
    weights = mask / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("bt,btd->bd", weights, tokens.float()), mask.any(1)


class Scores(nn.Linear):
    """The last layer: logits by a row of `moa.routing.scores`, of which linear alone has a bias."""

    def __init__(self, hidden: int, experts: int, score: str) -> None:
        super().__init__(hidden, experts, bias=score == "linear")
        self.score = SCORES[score]
        nn.init.normal_(self.weight, std=0.02)  # gates start nearly uniform
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features) if self.bias is not None else self.score(features, self.weight)


def zeros(width: int, columns: int) -> nn.Linear:
    linear = nn.Linear(width, columns)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


class TokenEncoder(nn.Module):
    """Tokens [batch, token, dim] -> one vector [batch, hidden] over the masked tokens.

    `neighbours` lets each token see the ones beside it, so that word order counts a little.
    """

    def __init__(self, dim: int, hidden: int, pooling: str, *, neighbours: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, hidden)
        self.mix = nn.Conv1d(hidden, hidden, 3, padding=1) if neighbours else None
        self.pool = Pool(hidden, pooling)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.project(self.norm(tokens))
        if self.mix is not None:
            # Padding is zeroed, and so like the end of the text: it changes nothing.
            beside = self.mix((hidden * mask[..., None]).transpose(1, 2)).transpose(1, 2)
            hidden = hidden + beside
        return self.pool(F.gelu(hidden), mask)


class OcrEncoder(nn.Module):
    def __init__(self, dim: int, hidden: int, pooling: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.word = nn.Linear(dim, hidden)
        self.place = nn.Linear(7, hidden)
        self.pool = Pool(hidden, pooling)

    def forward(self, words: Tensor, boxes: Tensor, confidence: Tensor, mask: Tensor) -> Tensor:
        size = boxes[..., 2:] - boxes[..., :2]
        place = torch.cat([boxes, size, confidence[..., None]], dim=-1)
        return self.pool(F.gelu(self.word(self.norm(words)) + self.place(place)), mask)


class Pool(nn.Module):
    """Masked mean, or attention of one learned query; zeros where nothing is masked in."""

    def __init__(self, hidden: int, pooling: str) -> None:
        super().__init__()
        self.score = nn.Linear(hidden, 1, bias=False) if pooling == "attention" else None

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        if self.score is None:
            weights = mask / mask.sum(1, keepdim=True).clamp(min=1)
        else:
            # A finite floor: a row without tokens must give zeros, and no NaN in its gradient.
            scores = self.score(tokens)[..., 0].masked_fill(~mask, -1e30)
            weights = torch.softmax(scores, dim=1) * mask
        return torch.einsum("bt,bth->bh", weights, tokens)


class AnchorRouter(nn.Module):
    """Router without training: cosine of a sample's evidence with the mean evidence per expert.

    `update` adds samples of known experts to running sums (buffers, saved with the rest; processes
    may add theirs up); the forward pass compares each sample for itself, averages the similarity
    over the kinds of evidence it has, and multiplies by `sharpness`. Experts without samples so far
    are left out, unless none has any. `centred`: see `anchor_similarity`.
    """

    def __init__(
        self,
        *,
        experts: int,
        evidence: Sequence[str] = EVIDENCE,
        dims: Mapping[str, int],
        num_tasks: int = 0,
        sharpness: float | int = 10.0,
        centred: bool = True,
    ) -> None:
        super().__init__()
        self.evidence = tuple(kind for kind in EVIDENCE if kind in evidence)
        self.sharpness, self.centred = sharpness, centred
        self.num_tasks = num_tasks
        sizes = {**dims, "ocr": dims["text"], "task": num_tasks}
        for kind in self.evidence:
            self.register_buffer(f"{kind}_sums", torch.zeros(experts, sizes[kind]))
            self.register_buffer(f"{kind}_counts", torch.zeros(experts))

    @torch.no_grad()
    def update(self, evidence: Evidence, expert_ids: Int[Tensor, " batch"]) -> None:
        for kind in self.evidence:
            features, present = pooled(kind, evidence, self.num_tasks)
            sums, counts = self.get_buffer(f"{kind}_sums"), self.get_buffer(f"{kind}_counts")
            new_sums, new_counts = anchor_sums(sums, counts, features, present, expert_ids)
            sums.copy_(new_sums)
            counts.copy_(new_counts)

    def forward(self, evidence: Evidence, withhold: Collection[str] = ()) -> Float[Tensor, "batch 1 expert"]:
        """Logits in float32; kinds in `withhold` are left out."""
        total = count = seen = torch.zeros(())
        for kind in self.evidence:
            features, present = pooled(kind, evidence, self.num_tasks)
            if kind in withhold:
                present = torch.zeros_like(present)
            sums, counts = self.get_buffer(f"{kind}_sums"), self.get_buffer(f"{kind}_counts")
            total = total.to(sums) + anchor_similarity(sums, counts, features, present, self.centred)
            count, seen = count.to(sums) + present, seen.to(counts) + counts
        logits = self.sharpness * total / count.clamp(min=1)[:, None]
        # an expert that has no sample yet takes no share from those that have, or the first skill would be a fifth
        unseen = (seen == 0) & (seen > 0).any()
        return logits.masked_fill(unseen, NEVER)[:, None]
