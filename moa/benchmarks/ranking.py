"""Scores of a model that orders candidates instead of generating: classification and retrieval."""

from collections.abc import Sequence
from statistics import median

from moa.benchmarks.scores import Response, Scores
from moa.metrics.retrieval import mean_per_class_accuracy, recall_at


def classification_scores(responses: Sequence[Response]) -> Scores:
    """Top-1, top-5, and the mean over classes of top-1, by which CLIP's paper reports Caltech-101 and Aircraft."""
    ranks = ranks_of(responses)
    hits, classes = recall_at(ranks, 1), [r.sample.answers[0] for r in responses]
    return Scores(
        primary="top_1",
        values={"top_1": hits, "top_5": recall_at(ranks, 5)},
        corpus={"mean_per_class": mean_per_class_accuracy(hits, classes)},
    )


def retrieval_scores(responses: Sequence[Response]) -> Scores:
    """R@1, R@5 and R@10 of one direction, over all that is searched, such as Karpathy's 1,000 or 5,000 images."""
    ranks = ranks_of(responses)
    return Scores(
        primary="R@1",
        values={f"R@{k}": recall_at(ranks, k) for k in (1, 5, 10)},
        corpus={"median_rank": float(median(ranks))},
        notes={"ties": "a wrong candidate with the same score stands before the right one"},
    )


def ranks_of(responses: Sequence[Response]) -> list[int]:
    ranks = [response.rank for response in responses if response.rank is not None]
    assert len(ranks) == len(responses), "made by moa.evaluation.dual_encoder"
    return ranks
