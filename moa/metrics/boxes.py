"""Boxes: intersection over union, and the share of hits by both conventions for "at 0.5".

Boxes are x0, y0, x1, y1 in pixels of the original image; a box in 0..1 of an image that is not
square gives the same IoU only if all boxes are scaled alike.
"""

from collections.abc import Sequence

Box = tuple[float, float, float, float]  # x0, y0, x1, y1, one unit for all four


def iou(first: Box, second: Box) -> float:
    """Intersection over union; 0 where a box has no area."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0.0) * max(height, 0.0)
    total = _area(first) + _area(second) - shared
    return shared / total if total > 0 else 0.0


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def best_iou(predicted: Box | None, truths: Sequence[Box]) -> float:
    """IoU with the nearest true box; an unparsable answer (None) scores 0."""
    if predicted is None:
        return 0.0
    return max((iou(predicted, truth) for truth in truths), default=0.0)


def grounding_scores(
    predicted: Sequence[Box | None], truths: Sequence[Sequence[Box]], threshold: float = 0.5
) -> dict[str, list[float]]:
    """Per sample: hits at IoU >= 0.5 (lmms-eval, Qwen-VL) and > 0.5 (Shikra), the IoU, and `unparsable` as 0/1."""
    overlaps = [best_iou(box, boxes) for box, boxes in zip(predicted, truths, strict=True)]
    return {
        f"Acc@{threshold}": [float(overlap >= threshold) for overlap in overlaps],
        f"Acc@>{threshold}": [float(overlap > threshold) for overlap in overlaps],
        "mean_IoU": overlaps,
        "unparsable": [float(box is None) for box in predicted],
    }
