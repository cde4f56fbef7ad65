"""From features to responses, for models that compare images with texts: CLIP and its like.

classification  images x texts of the classes   -> Result with top-1, top-5, mean per class
retrieval       images x all captions           -> Result with R@1, R@5, R@10, both ways
captions        image x its caption             -> CLIPScore, RefCLIPScore
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from data.sample import Sample
from moa.benchmarks.ranking import classification_scores, retrieval_scores
from moa.benchmarks.scores import Response, Scores
from moa.evaluation.result import Result
from moa.metrics.clipscore import clip_score, ref_clip_score
from moa.metrics.retrieval import Ranking, rank_candidates, rank_retrieval

# the features of all classes, from a sample's template and its choices
ClassFeatures = Callable[[str, tuple[str, ...]], Float[Tensor, "classes dim"]]


def classify(
    name: str,
    samples: Sequence[Sample],
    image_features: Float[Tensor, "samples dim"],
    class_features: ClassFeatures,
    **settings: Any,
) -> Result:
    """Every image against the classes that its sample chooses from; the true class becomes a tag.

    ValueError for an answer that is no choice.
    """
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
    image_features: Float[Tensor, "samples dim"],
    text_features: Float[Tensor, "texts dim"],
    **settings: Any,
) -> Result:
    """The nearest caption of every image, and the nearest image of every caption.

    `text_features` are those of all samples' answers in their order.
    """
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
    image_features: Float[Tensor, "captions dim"],
    caption_features: Float[Tensor, "captions dim"],
    reference_features: Sequence[Float[Tensor, "_ dim"]] | None = None,
) -> Scores:
    """CLIPScore of captions, and RefCLIPScore with references; all texts begin with `moa.metrics.clipscore.PREFIX`."""
    values = {"CLIPScore": clip_score(image_features, caption_features).tolist()}
    if reference_features is not None:
        found = ref_clip_score(image_features, caption_features, reference_features)
        values["RefCLIPScore"] = found.tolist()
    return Scores(primary="CLIPScore", values=values)
