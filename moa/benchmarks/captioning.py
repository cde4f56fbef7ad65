"""Captions against reference captions (COCO and its like): CIDEr-D, BLEU, ROUGE-L, METEOR."""

from collections.abc import Sequence
from functools import partial

from moa.benchmarks.benchmark import Benchmark
from moa.benchmarks.scores import Prediction, Scores, empty_answers
from moa.benchmarks.submission import caption_row
from moa.metrics.captions import caption_scores
from moa.metrics.text import exact_match


def score(predictions: Sequence[Prediction], *, meteor: bool = False) -> Scores:
    """The primary score is CIDEr-D / 10, clipped to [0, 1]; the raw corpus metrics stand beside it.

    Document frequencies come from these references, so a subset has its own scale. METEOR, where
    asked for, needs Java and some ten seconds; `notes` says where it is absent.
    """
    references = [p.sample.answers for p in predictions]
    captions = caption_scores([p.text for p in predictions], references, meteor=meteor)
    exact = [exact_match(p.text, p.sample.answers) for p in predictions]
    return Scores(
        primary="CIDEr/10",
        values={
            "CIDEr/10": [min(max(value / 10, 0.0), 1.0) for value in captions.cider],
            "exact_match": exact,
        },
        corpus=captions.corpus,
        failures=empty_answers(predictions),
        notes={
            "tokenizer": captions.tokenizer,
            "document_frequencies": f"from the references of these {len(predictions)} samples",
            **{metric: f"absent: {reason}" for metric, reason in captions.absent.items()},
        },
    )


CAPTION = Benchmark(score=score)
COCO_CAPTIONS = Benchmark(score=partial(score, meteor=True), submission=caption_row)
