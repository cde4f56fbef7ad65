"""From features to predictions, for models that compare pictures with texts: CLIP and its like.

    classification  pictures x texts of the classes   -> Result with top-1, top-5, mean per class
    retrieval       pictures x all captions           -> Result with R@1, R@5, R@10, both ways
    captions        picture x its caption             -> CLIPScore, RefCLIPScore

Who makes the features (a run with its router, a plain model) is the caller's business.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from data.sample import Sample
from moa.benchmarks import classification, retrieval
from moa.benchmarks.scores import Prediction, Scores
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
    """Every picture against the classes that its sample chooses from.

    `class_features` is asked once for each set of choices. The true class becomes a tag, so that
    `by_tag` holds the accuracy of each. ValueError for an answer that is no choice.
    """
    predictions: list[Prediction | None] = [None] * len(samples)
    groups: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for row, sample in enumerate(samples):
        if sample.answers[:1] and sample.answers[0] in sample.choices:
            groups.setdefault((sample.question, sample.choices), []).append(row)
        else:
            found = f"answers={sample.answers} is none of its {len(sample.choices)} choices"
            raise ValueError(f"{name}: sample {sample.id}: {found}")
    for (question, choices), rows in groups.items():
        ranking = rank_classes(
            image_features[rows],
            class_features(question, choices),
            [choices.index(samples[row].answers[0]) for row in rows],
        )
        for row, rank, nearest in zip(rows, *map(Tensor.tolist, ranking), strict=True):
            sample = samples[row]
            tagged = replace(sample, tags=(*sample.tags, f"class {sample.answers[0]}"))
            predictions[row] = Prediction(sample=tagged, text=choices[nearest], rank=rank)
    done = [prediction for prediction in predictions if prediction is not None]
    scored = {"classification": (done, classification.score(done))}
    return Result(name=name, tasks=scored, settings=settings)


def rank_classes(
    images: Float[Tensor, "samples dim"], texts: Float[Tensor, "classes dim"], true: Sequence[int]
) -> Ranking:
    wanted = one_hot(torch.tensor(true, device=images.device), len(texts)).bool()
    cosines = normalize(images, dim=-1) @ normalize(texts, dim=-1).T
    return rank_candidates(cosines, wanted)


def retrieve(
    name: str,
    samples: Sequence[Sample],
    image_features: Float[Tensor, "samples dim"],
    text_features: Float[Tensor, "texts dim"],
    **settings: Any,
) -> Result:
    """Every picture asks for its captions, and every caption for its picture.

    A sample is a picture with all its captions; `text_features` are those of all samples' answers in
    their order. Standard errors are clustered by picture both ways.
    """
    owners = [row for row, sample in enumerate(samples) for _ in sample.answers]
    captions = [caption for sample in samples for caption in sample.answers]
    if len(captions) != len(text_features):
        found = f"{len(captions)} captions and {len(text_features)} text features"
        raise ValueError(f"{name}: {found}; there must be one for each")
    to_text, to_image = rank_retrieval(
        image_features, text_features, torch.tensor(owners, device=image_features.device)
    )
    asked = [
        replace(samples[row], id=f"{samples[row].id}#{number}", answers=(caption,))
        for number, (row, caption) in enumerate(zip(owners, captions, strict=True))
    ]
    found_texts = [captions[i] for i in to_text.nearest.tolist()]
    found_images = [samples[i].image_id for i in to_image.nearest.tolist()]
    tasks = {
        "image_to_text": ranked(samples, found_texts, to_text),
        "text_to_image": ranked(asked, found_images, to_image),
    }
    return Result(name=name, tasks=tasks, settings=settings)


def ranked(
    samples: Sequence[Sample], texts: Sequence[str], ranking: Ranking
) -> tuple[list[Prediction], Scores]:
    predictions = [
        Prediction(sample=sample, text=text, rank=rank)
        for sample, text, rank in zip(samples, texts, ranking.rank.tolist(), strict=True)
    ]
    return predictions, retrieval.score(predictions)


def clip_scores(
    image_features: Float[Tensor, "captions dim"],
    caption_features: Float[Tensor, "captions dim"],
    reference_features: Sequence[Float[Tensor, "_ dim"]] | None = None,
) -> Scores:
    """CLIPScore of generated captions, and RefCLIPScore where there are references.

    All texts must have been encoded with `moa.metrics.clipscore.PREFIX` before them.
    """
    values = {"CLIPScore": clip_score(image_features, caption_features).tolist()}
    if reference_features is not None:
        found = ref_clip_score(image_features, caption_features, reference_features)
        values["RefCLIPScore"] = found.tolist()
    return Scores(primary="CLIPScore", values=values)
