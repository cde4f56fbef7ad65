"""A CLIP with its experts on a data set: features of pictures and texts, each with its own gates.

    samples with choices      pictures x texts of the classes -> accuracy
    samples with captions     pictures x all captions         -> recall, both ways

A class's text is gated as a text of the data set is: by its words and the task, never by a picture.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor
from torch.nn.functional import normalize

from data.checks import BadSampleError
from data.mixture import read_sample
from data.pairs import PairCollator, fill, only_pictures, only_texts, templates
from data.sample import Sample
from moa.benchmarks.embedding import classify, retrieve
from moa.benchmarks.result import Result
from moa.benchmarks.run import check_gates, choose_gates
from moa.benchmarks.scores import Prediction
from moa.clip_model import CHUNK, ClipMixture

Read = tuple[list[Sample], Tensor, list[list[list[float]]]]  # samples, features, gates


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
    progress: bool = True,
) -> Result:
    """Classify the pictures of a data set, or retrieve with them; `gates` as for `evaluate`."""
    check_gates(gates, model)
    model.eval()
    began, skipped = time.perf_counter(), list[BadSampleError]()
    samples, features, decided = [], list[Tensor](), []
    starts = range(0, len(dataset), batch_size)
    for start in track(starts, description=name, disable=not progress, transient=True):
        rows = range(start, min(start + batch_size, len(dataset)))
        batch, rejected = collator.split(
            [known(read_sample(dataset, row, name), model.bank.names) for row in rows]
        )
        if rejected and on_bad_sample == "error":
            raise rejected[0]
        skipped += rejected
        if batch is not None:
            batch = only_pictures(batch.to(model.backbone.model.logit_scale.device))
            chosen = choose_gates(model, batch, gates).gates
            assert chosen is not None  # a CLIP is routed by sample
            samples += batch.samples
            features.append(model.image_features(batch, chosen))
            decided += chosen.float().cpu().tolist()
    if not samples:
        raise ValueError(f"{name}: none of {len(dataset)} samples can be scored; {skipped[0]}")
    settings = {"gates": gates, "batch_size": batch_size, "on_bad_sample": on_bad_sample,
                "templates": sorted({t for s in samples for t in templates(s.question)})}  # fmt: skip
    result = score(model, collator, name, samples, torch.cat(features), gates, settings)
    seconds = time.perf_counter() - began
    return replace(with_gates(result, samples, decided), skipped=skipped, seconds=seconds)


def known(item: Sample | BadSampleError, experts: Sequence[str]) -> Sample | BadSampleError:
    """An expert that this model does not have is as good as none: the data may be another model's."""
    if isinstance(item, BadSampleError) or item.expert in experts:
        return item
    return replace(item, expert=None)


def score(
    model: ClipMixture,
    collator: PairCollator,
    name: str,
    samples: list[Sample],
    features: Float[Tensor, "samples dim"],
    gates: str,
    settings: dict[str, Any],
) -> Result:
    """By classification where every sample has choices, by retrieval where none has."""
    with_choices = sum(bool(sample.choices) for sample in samples)
    if with_choices == len(samples):
        return classify(
            name, samples, features, class_features(model, collator, samples[0], gates), **settings
        )
    if with_choices:
        found = f"{with_choices} of {len(samples)} samples have choices"
        raise ValueError(f"{name}: {found}; a data set is for classification or for retrieval")
    captions = [fill(templates(s.question)[0], a) for s in samples for a in s.answers]
    texts = text_features(model, collator, captions, samples[0], gates)
    return retrieve(name, samples, features, texts, **settings)


def class_features(
    model: ClipMixture, collator: PairCollator, like: Sample, gates: str
) -> Callable[[str, tuple[str, ...]], Float[Tensor, "classes dim"]]:
    """The classes' texts over the templates of a question, with gates of the data set of `like`."""

    def features(question: str, choices: tuple[str, ...]) -> Float[Tensor, "classes dim"]:
        rows = [
            text_features(model, collator, [fill(t, name) for name in choices], like, gates)
            for t in templates(question)
        ]
        return normalize(torch.stack(rows).mean(0), dim=-1)

    return features


def text_features(
    model: ClipMixture, collator: PairCollator, texts: Sequence[str], like: Sample, gates: str
) -> Float[Tensor, "texts dim"]:
    """Features of texts of the task and the expert that the sample `like` has."""
    found = []
    for start in range(0, len(texts), CHUNK):
        batch = collator.text_batch(texts[start : start + CHUNK], like)
        batch = only_texts(batch.to(model.backbone.model.logit_scale.device))
        chosen = choose_gates(model, batch, gates).gates
        assert chosen is not None  # a CLIP is routed by sample
        found.append(model.text_features(batch, chosen))
    return torch.cat(found)


def with_gates(
    result: Result, samples: Sequence[Sample], decided: Sequence[list[list[float]]]
) -> Result:
    """The result with the gates that each picture was read with."""
    by_picture = {s.image_id: rows for s, rows in zip(samples, decided, strict=True)}

    def gated(predictions: Sequence[Prediction]) -> list[Prediction]:
        return [replace(p, gates=by_picture[p.sample.image_id]) for p in predictions]

    return replace(result, tasks={t: (gated(p), scores) for t, (p, scores) in result.tasks.items()})
