"""A CLIP with its experts on a data set: features of images and texts, each with its own gates.

    samples with choices      images x texts of the classes -> top-1, top-5, mean per class
    samples with captions     images x all captions         -> R@1, R@5, R@10, both ways
    from Python               image x its caption           -> CLIPScore, RefCLIPScore

The text of a class is gated as a text of the data set: by its words and the task, never by an image.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from data.batch import Batch
from data.checks import BadSampleError
from data.mixture import Source, read_sample
from data.pairs import PairCollator, fill, only_images, only_texts, templates
from data.sample import Sample
from moa.benchmarks.scores import Response, Scores, classification_scores, retrieval_scores
from moa.clip_model import CHUNK, ClipMixture
from moa.evaluation.fingerprints import data_digest, sample_digest
from moa.evaluation.predict import check_finite, choose_gates
from moa.evaluation.processes import ALONE, Processes
from moa.evaluation.result import Result
from moa.evaluation.run import first_images, rows_of_batches, without_unknown_expert
from moa.evaluation.settings import check_gates, mixes_answers
from moa.metrics.retrieval import (
    Captions,
    Ranking,
    References,
    clip_score,
    rank_candidates,
    rank_retrieval,
    ref_clip_score,
)
from moa.sections import EvalConfig

Group = tuple[str, tuple[str, ...]]  # the question and the choices of samples
Features = Float[Tensor, "samples dim"]
# the features of all classes, from a sample's template and its choices
ClassFeatures = Callable[[str, tuple[str, ...]], Float[Tensor, "classes dim"]]


@dataclass(kw_only=True)
class Images:
    """What became of the samples of one batch."""

    rejected: list[BadSampleError]
    read: list[str]  # digest of each sample
    samples: list[Sample] = field(default_factory=list)
    features: Features | None = None
    gates: list[list[list[float]]] = field(default_factory=list)


@torch.no_grad()
def evaluate_pairs(
    model: ClipMixture,
    dataset: Source,
    collator: PairCollator,
    settings: EvalConfig,
    *,
    name: str,
    progress: bool = False,
    processes: Processes = ALONE,
) -> Result:
    """Classify the images of a data set, or retrieve with them; the arguments are those of `evaluate`."""
    check_gates(settings.gates, model.bank.names)
    if mixes_answers(settings.gates):
        rule = "averages probabilities of tokens, and a CLIP has none; choices: uniform"
        raise ValueError(f"eval.gates={settings.gates}: {rule}")
    model.eval()
    began, device = time.perf_counter(), model.backbone.model.logit_scale.device
    keep = first_images(settings.num_images)

    def encode(rows: range) -> Images:
        items = [read_sample(dataset, row, name) for row in rows]
        known = [without_unknown_expert(item, model.routes) if isinstance(item, Sample) else item for item in items]
        batch, rejected = collator.split(known)
        if rejected and settings.on_bad_sample != "skip":
            raise rejected[0]
        part = Images(rejected=rejected, read=[*map(sample_digest, items)])
        if batch is None:
            return part
        batch = only_images(batch.to(device))
        gates = gates_of(model, batch, settings.gates)
        part.features = model.image_features(batch, gates).cpu()
        check_finite(batch.samples, "gates", gates.isfinite())
        check_finite(batch.samples, "features", part.features.isfinite())
        part.samples, part.gates = [*map(keep, batch.samples)], gates.float().cpu().tolist()
        return part

    batches = rows_of_batches(len(dataset), settings.batch_size)
    parts = processes.map(encode, batches, bar=name if progress else None)
    samples = [sample for part in parts for sample in part.samples]
    skipped = [error for part in parts for error in part.rejected]
    if processes.is_main and not samples:
        raise ValueError(f"{name}: none of {len(dataset)} samples can be scored; {skipped[0]}")
    texts, like = processes.from_main(lambda: (texts_of(name, samples), replace(samples[0], image=None)))
    encoded = text_features(model, collator, texts, like, settings.gates, processes)
    if not processes.is_main:
        return Result(name=name, tasks={})
    features = torch.cat([part.features for part in parts if part.features is not None]).to(device)
    asked = {
        "gates": settings.gates,
        "batch_size": settings.batch_size,
        "on_bad_sample": settings.on_bad_sample or "error",
        "templates": sorted({t for s in samples for t in templates(s.question)}),
    }
    result = score(name, samples, features, encoded, asked)
    gates = [rows for part in parts for rows in part.gates]
    by_image = {s.image_id: rows for s, rows in zip(samples, gates, strict=True)}
    tasks = {
        task: ([replace(r, gates=by_image[r.sample.image_id]) for r in found], scores)
        for task, (found, scores) in result.tasks.items()
    }
    return replace(
        result,
        tasks=tasks,
        skipped=skipped,
        seconds=time.perf_counter() - began,
        num_processes=processes.size,
        data=data_digest(digest for part in parts for digest in part.read),
    )


def gates_of(model: ClipMixture, batch: Batch, rule: str | Mapping[str, float]) -> Float[Tensor, "batch site expert"]:
    gates = choose_gates(model, batch, rule).gates
    assert gates is not None  # a CLIP is routed by sample
    return gates


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
    name: str, samples: list[Sample], features: Features, encoded: Sequence[Tensor], asked: dict[str, Any]
) -> Result:
    """By classification where the samples have choices, else by retrieval; `encoded` are `texts_of` them."""
    if not samples[0].choices:
        return retrieve(name, samples, features, encoded[0], **asked)
    rest, classes = iter(encoded), dict[Group, Tensor]()
    for question, choices in groups_of(samples):
        each = torch.stack([next(rest) for _ in templates(question)])  # [template, class, dim]
        classes[question, choices] = normalize(each.mean(0), dim=-1)
    return classify(name, samples, features, lambda *group: classes[group], **asked)


def text_features(
    model: ClipMixture,
    collator: PairCollator,
    lists: Sequence[Sequence[str]],
    like: Sample,
    rule: str | Mapping[str, float],
    processes: Processes,
) -> list[Float[Tensor, "_ dim"]]:
    """Features of each list of texts, of the task and the expert that the sample `like` has."""
    device = model.backbone.model.logit_scale.device

    def encode(texts: Sequence[str]) -> Tensor:
        batch = only_texts(collator.text_batch(texts, like).to(device))
        features = model.text_features(batch, gates_of(model, batch, rule)).cpu()
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


# -- From features to responses --------------------------------------------------------------------


def classify(
    name: str, samples: Sequence[Sample], image_features: Features, class_features: ClassFeatures, **settings: Any
) -> Result:
    """Every image against the classes that its sample chooses from; the true class becomes a tag. ValueError for an
    answer that is no choice."""
    groups: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for row, sample in enumerate(samples):
        if not sample.answers or sample.answers[0] not in sample.choices:
            found = f"answers={sample.answers} is none of its {len(sample.choices)} choices"
            raise ValueError(f"{name}: sample {sample.id}: {found}")
        groups.setdefault((sample.question, sample.choices), []).append(row)
    responses: dict[int, Response] = {}
    for (question, choices), rows in groups.items():
        true = torch.tensor([choices.index(samples[row].answers[0]) for row in rows])
        images, texts = image_features[rows], class_features(question, choices)
        cosines = normalize(images, dim=-1) @ normalize(texts, dim=-1).T
        wanted = one_hot(true.to(images.device), len(texts)).bool()
        ranking = rank_candidates(cosines, wanted)
        for row, rank, nearest in zip(rows, *map(Tensor.tolist, ranking), strict=True):
            sample = samples[row]
            tagged = replace(sample, tags=(*sample.tags, f"class {sample.answers[0]}"))
            responses[row] = Response(sample=tagged, text=choices[nearest], rank=rank)
    done = [responses[row] for row in range(len(samples))]
    scored = {"classification": (done, classification_scores(done))}
    return Result(name=name, tasks=scored, settings=settings)


def retrieve(
    name: str,
    samples: Sequence[Sample],
    image_features: Features,
    text_features: Float[Tensor, "texts dim"],
    **settings: Any,
) -> Result:
    """The nearest caption of every image, and the nearest image of every caption. `text_features` are those of all
    samples' answers in their order."""
    image_of_text = [row for row, sample in enumerate(samples) for _ in sample.answers]
    captions = [caption for sample in samples for caption in sample.answers]
    if len(captions) != len(text_features):
        found = f"{len(captions)} captions and {len(text_features)} text features"
        raise ValueError(f"{name}: {found}; there must be one for each")
    to_text, to_image = rank_retrieval(
        image_features, text_features, torch.tensor(image_of_text, device=image_features.device)
    )
    asked = [
        replace(samples[row], id=f"{samples[row].id}#{number}", answers=(caption,))
        for number, (row, caption) in enumerate(zip(image_of_text, captions, strict=True))
    ]
    found_texts = [captions[i] for i in to_text.nearest.tolist()]
    found_images = [samples[i].image_id for i in to_image.nearest.tolist()]
    tasks = {
        "image_to_text": ranked(samples, found_texts, to_text),
        "text_to_image": ranked(asked, found_images, to_image),
    }
    return Result(name=name, tasks=tasks, settings=settings)


def ranked(samples: Sequence[Sample], texts: Sequence[str], ranking: Ranking) -> tuple[list[Response], Scores]:
    responses = [
        Response(sample=sample, text=text, rank=rank)
        for sample, text, rank in zip(samples, texts, ranking.rank.tolist(), strict=True)
    ]
    return responses, retrieval_scores(responses)


def clip_scores(
    image_features: Captions, caption_features: Captions, reference_features: References | None = None
) -> Scores:
    """CLIPScore of captions, and RefCLIPScore with references; all texts begin with `moa.metrics.retrieval.PREFIX`."""
    values = {"CLIPScore": clip_score(image_features, caption_features).tolist()}
    if reference_features is not None:
        found = ref_clip_score(image_features, caption_features, reference_features)
        values["RefCLIPScore"] = found.tolist()
    return Scores(primary="CLIPScore", values=values)
