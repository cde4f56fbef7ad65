"""Zero-shot and few-shot classification: the class whose text is nearest, by accuracy."""

from collections.abc import Sequence

from moa.benchmarks.scores import Prediction, Scores, ranks_of
from moa.metrics.classification import mean_per_class_accuracy
from moa.metrics.retrieval import recall_at


def score(predictions: Sequence[Prediction]) -> Scores:
    """Top-1 and top-5 by the rank of the true class, and the mean over classes of top-1.

    By which of them a data set is published differs: CLIP's paper has the mean over classes for
    Caltech-101, Oxford pets, Flowers and Aircraft, and top-1 for most others.
    """
    ranks = ranks_of(predictions)
    hits, classes = recall_at(ranks, 1), [p.sample.answers[0] for p in predictions]
    return Scores(
        primary="top_1",
        values={"top_1": hits, "top_5": recall_at(ranks, 5)},
        corpus={"mean_per_class": mean_per_class_accuracy(hits, classes)},
    )
