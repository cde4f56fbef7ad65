"""A CLIP with its experts on a data set: features of pictures and texts, each with its own gates.

    samples with choices      pictures x texts of the classes -> accuracy
    samples with captions     pictures x all captions         -> recall, both ways

A class's text is gated as a text of the data set is: by its words and the task, never by a picture.
Several processes share the batches of pictures and of texts; the main one compares.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from data.checks import BadSampleError
from data.mixture import read_sample
from data.pairs import PairCollator, fill, only_images, only_texts, templates
from data.sample import Sample
from moa.benchmarks.scores import Prediction
from moa.clip_model import CHUNK, ClipMixture
from moa.evaluation.embedding import classify, retrieve
from moa.evaluation.fingerprints import data_digest, sample_digest
from moa.evaluation.processes import ALONE, Processes
from moa.evaluation.result import Result
from moa.evaluation.run import (
    check_finite,
    check_gates,
    choose_gates,
    first_pictures,
    rows_of_batches,
    without_picture,
)

Group = tuple[str, tuple[str, ...]]  # the question and the choices of samples


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What became of the samples of one batch."""

    rejected: list[BadSampleError]
    read: list[str]  # digest of each sample
    samples: list[Sample] = field(default_factory=list)
    features: Float[Tensor, "samples dim"] | None = None
    gates: list[list[list[float]]] = field(default_factory=list)


@torch.no_grad()
def evaluate_pairs(
    model: ClipMixture,
    dataset: Any,
    collator: PairCollator,
    *,
    name: str,
    gates: str = "router",
    batch_size: int = 32,
    on_bad_sample: str = "error",
    num_pictures: int = 64,
    progress: bool = True,
    processes: Processes = ALONE,
) -> Result:
    """Classify the pictures of a data set, or retrieve with them; the options are those of `evaluate`."""
    check_gates(gates, model.bank.names)
    model.eval()
    began, device = time.perf_counter(), model.backbone.model.logit_scale.device
    thinned = first_pictures(num_pictures)

    def look(rows: range) -> Pictures:
        items = [read_sample(dataset, row, name) for row in rows]
        read = [*map(sample_digest, items)]
        batch, rejected = collator.split([known(item, model.routes) for item in items])
        if rejected and on_bad_sample == "error":
            raise rejected[0]
        if batch is None:
            return Pictures(rejected=rejected, read=read)
        batch = only_images(batch.to(device))
        chosen = choose_gates(model, batch, gates).gates
        assert chosen is not None  # a CLIP is routed by sample
        features = model.image_features(batch, chosen).cpu()
        check_finite(batch.samples, "gates", chosen.isfinite())
        check_finite(batch.samples, "features", features.isfinite())
        return Pictures(
            rejected=rejected,
            read=read,
            samples=[*map(thinned, batch.samples)],
            features=features,
            gates=chosen.float().cpu().tolist(),
        )

    rows = rows_of_batches(len(dataset), batch_size)
    seen = processes.map(look, rows, bar=name if progress else None)
    samples = [sample for part in seen for sample in part.samples]
    skipped = [error for part in seen for error in part.rejected]
    if processes.is_main and not samples:
        raise ValueError(f"{name}: none of {len(dataset)} samples can be scored; {skipped[0]}")
    texts, like = processes.from_main(
        lambda: (texts_of(name, samples), without_picture(samples[0]))
    )
    encoded = text_features(model, collator, texts, like, gates, processes)
    if not processes.is_main:
        return Result(name=name, tasks={})
    features = torch.cat([part.features for part in seen if part.features is not None]).to(device)
    settings = {"gates": gates, "batch_size": batch_size, "on_bad_sample": on_bad_sample,
                "templates": sorted({t for s in samples for t in templates(s.question)})}  # fmt: skip
    result = score(name, samples, features, encoded, settings)
    result = with_gates(result, samples, [rows for part in seen for rows in part.gates])
    seconds = time.perf_counter() - began
    data = data_digest(read for part in seen for read in part.read)
    return replace(
        result, skipped=skipped, seconds=seconds, num_processes=processes.size, data=data
    )


def known(item: Sample | BadSampleError, experts: Sequence[str]) -> Sample | BadSampleError:
    """An expert that this model does not have is as good as none: the data may be another model's."""
    if isinstance(item, BadSampleError) or item.expert in experts:
        return item
    return replace(item, expert=None)


def groups_of(samples: Sequence[Sample]) -> list[Group]:
    return list(dict.fromkeys((sample.question, sample.choices) for sample in samples))


def texts_of(name: str, samples: Sequence[Sample]) -> list[list[str]]:
    """The names of the classes in each template of each group; or, without choices, all captions."""
    with_choices = sum(bool(sample.choices) for sample in samples)
    if with_choices == len(samples):
        return [
            [fill(template, choice) for choice in choices]
            for question, choices in groups_of(samples)
            for template in templates(question)
        ]
    if with_choices:
        found = f"{with_choices} of {len(samples)} samples have choices"
        raise ValueError(f"{name}: {found}; a data set is for classification or for retrieval")
    return [[fill(templates(s.question)[0], a) for s in samples for a in s.answers]]


def score(
    name: str,
    samples: list[Sample],
    features: Float[Tensor, "samples dim"],
    encoded: Sequence[Tensor],
    settings: dict[str, Any],
) -> Result:
    """By classification where the samples have choices, else by retrieval; `encoded` are `texts_of` them."""
    if not samples[0].choices:
        return retrieve(name, samples, features, encoded[0], **settings)
    rest, classes = iter(encoded), dict[Group, Tensor]()
    for question, choices in groups_of(samples):
        each = torch.stack([next(rest) for _ in templates(question)])  # [template, class, dim]
        classes[question, choices] = normalize(each.mean(0), dim=-1)
    return classify(name, samples, features, lambda *group: classes[group], **settings)


def text_features(
    model: ClipMixture,
    collator: PairCollator,
    lists: Sequence[Sequence[str]],
    like: Sample,
    gates: str,
    processes: Processes,
) -> list[Float[Tensor, "_ dim"]]:
    """Features of each list of texts, of the task and the expert that the sample `like` has."""
    device = model.backbone.model.logit_scale.device

    def encode(texts: Sequence[str]) -> Tensor:
        batch = only_texts(collator.text_batch(texts, like).to(device))
        chosen = choose_gates(model, batch, gates).gates
        assert chosen is not None  # a CLIP is routed by sample
        features = model.text_features(batch, chosen).cpu()
        if not features.isfinite().all():
            raise ValueError(f"the model's features of {texts[0]!r} and others are not finite")
        return features

    starts = [range(0, len(texts), CHUNK) for texts in lists]
    chunks = [t[s : s + CHUNK] for t, own in zip(lists, starts, strict=True) for s in own]
    found = processes.map(encode, chunks)
    if not processes.is_main:
        return []
    rest = iter(found)
    return [torch.cat([next(rest) for _ in own]).to(device) for own in starts]


def with_gates(
    result: Result, samples: Sequence[Sample], decided: Sequence[list[list[float]]]
) -> Result:
    """The result with the gates that each picture was read with."""
    by_picture = {s.image_id: rows for s, rows in zip(samples, decided, strict=True)}

    def gated(predictions: Sequence[Prediction]) -> list[Prediction]:
        return [replace(p, gates=by_picture[p.sample.image_id]) for p in predictions]

    return replace(result, tasks={t: (gated(p), scores) for t, (p, scores) in result.tasks.items()})
