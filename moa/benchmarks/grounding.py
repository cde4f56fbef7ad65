"""Referring expressions: find the box (RefCOCO and its like), scored in original pixels."""

from collections.abc import Sequence

from moa.benchmarks.benchmark import Benchmark, needs_box
from moa.benchmarks.scores import Prediction, Scores
from moa.metrics.boxes import grounding_scores


def score(predictions: Sequence[Prediction]) -> Scores:
    """Acc@0.5 by both conventions, and the mean IoU; an answer without a readable box has IoU 0."""
    values = grounding_scores([p.box for p in predictions], [p.sample.boxes for p in predictions])
    unparsable = [i for i, prediction in enumerate(predictions) if prediction.box is None]
    return Scores(
        primary="Acc@0.5",
        values=values,
        failures={"no readable box": unparsable} if unparsable else {},
        notes={
            "Acc@0.5": "hit at IoU >= 0.5, in pixels of the original picture",
            "Acc@>0.5": "hit at IoU > 0.5",
        },
    )


GROUNDING = Benchmark(score=score, needs=needs_box)
