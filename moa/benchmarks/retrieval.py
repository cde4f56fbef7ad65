"""Image-text retrieval (COCO, Flickr30k), one direction: the rank of the nearest true match."""

from collections.abc import Sequence
from statistics import median

from moa.benchmarks.scores import Prediction, Scores, ranks_of
from moa.metrics.retrieval import recall_at


def score(predictions: Sequence[Prediction]) -> Scores:
    """R@1, R@5 and R@10 over all pictures, or over all captions, of the set that is searched.

    The set is what makes it hard: the 1,000 or 5,000 pictures of Karpathy's test splits.
    """
    ranks = ranks_of(predictions)
    return Scores(
        primary="R@1",
        values={f"R@{k}": recall_at(ranks, k) for k in (1, 5, 10)},
        corpus={"median_rank": float(median(ranks))},
        notes={"ties": "a wrong candidate with the same score stands before the right one"},
    )
