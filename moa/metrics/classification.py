"""Classification: accuracy where every class counts the same, whatever its number of samples."""

from collections import defaultdict
from collections.abc import Hashable, Sequence


def per_class_accuracy(hits: Sequence[float], classes: Sequence[Hashable]) -> dict[Hashable, float]:
    """The share of hits among the samples of each true class."""
    found: dict[Hashable, list[float]] = defaultdict(list)
    for hit, name in zip(hits, classes, strict=True):
        found[name].append(hit)
    return {name: sum(values) / len(values) for name, values in found.items()}


def mean_per_class_accuracy(hits: Sequence[float], classes: Sequence[Hashable]) -> float:
    """The mean of the classes' accuracies, over the classes that occur.

    The convention of Caltech-101, Oxford pets, Flowers and Aircraft in CLIP's evaluation.
    """
    found = per_class_accuracy(hits, classes)
    return sum(found.values()) / len(found) if found else float("nan")
