"""Metrics of CLIP models: retrieval, accuracy by class."""

import pytest
import torch
from torch.nn.functional import one_hot

from moa.benchmarks.scores import mean_per_class_accuracy, recall_at
from moa.metrics.retrieval import (
    clip_score,
    rank_candidates,
    rank_retrieval,
    ref_clip_score,
)


def brute_force_ranks(images, texts, owner):
    """Both lists of ranks by sorting, for scores without ties."""
    scores = (images @ texts.T).tolist()
    to_text = []
    for i, row in enumerate(scores):
        order = sorted(range(len(row)), key=lambda j: -row[j])
        to_text.append(1 + min(order.index(j) for j in range(len(row)) if owner[j] == i))
    to_image = []
    for j in range(len(owner)):
        order = sorted(range(len(scores)), key=lambda i: -scores[i][j])
        to_image.append(1 + order.index(owner[j]))
    return to_text, to_image


def test_ranks_are_those_of_sorting_every_row(monkeypatch):
    monkeypatch.setattr("moa.metrics.retrieval.BLOCK", 3)  # several blocks, the last one short
    torch.manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(7, 5), dim=-1)
    owner = torch.arange(7).repeat_interleave(3)[torch.randperm(21)]
    texts = torch.nn.functional.normalize(torch.randn(21, 5), dim=-1)
    to_text, to_image = rank_retrieval(images, texts * 4, owner)
    expected = brute_force_ranks(images, texts, owner.tolist())
    assert (to_text.rank.tolist(), to_image.rank.tolist()) == expected
    assert to_text.nearest.tolist() == (images @ texts.T).argmax(1).tolist()


def test_any_caption_of_a_picture_counts_and_every_caption_asks():
    images = one_hot(torch.tensor([0, 1, 2])).float()
    texts = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0], [0, 0.1, 1.0]])
    to_text, to_image = rank_retrieval(images, texts, torch.tensor([0, 0, 1, 2]))
    # picture 0 has one caption that fits and one that fits picture 1, where it stands in a tie
    assert to_text.rank.tolist() == [1, 2, 1]
    assert to_image.rank.tolist() == [1, 3, 1, 1]
    assert recall_at(to_image.rank.tolist(), 1) == [1.0, 0.0, 1.0, 1.0]


def test_equal_or_broken_scores_do_not_count_as_found():
    wanted = torch.tensor([[True, False, False]])
    assert rank_candidates(torch.ones(1, 3), wanted).rank.tolist() == [3]
    assert rank_candidates(torch.full((1, 3), torch.nan), wanted).rank.tolist() == [3]


def test_images_without_captions_are_one_clear_error():
    with pytest.raises(ValueError, match="1 of 3 images have no caption"):
        rank_retrieval(torch.ones(3, 2), torch.ones(2, 2), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"outside 0\.\.2"):
        rank_retrieval(torch.ones(3, 2), torch.ones(2, 2), torch.tensor([0, 3]))


def test_a_rare_class_counts_as_much_as_a_frequent_one():
    hits, classes = [1.0, 1.0, 1.0, 0.0], ["cat", "cat", "cat", "dog"]
    assert mean_per_class_accuracy(hits, classes) == 0.5


def test_clip_score_is_two_and_a_half_cosines_and_never_negative():
    image = torch.tensor([[3.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    text = torch.tensor([[3.0, 4.0], [-1.0, 0.0], [0.0, 2.0]])
    assert clip_score(image, text).tolist() == pytest.approx([2.5 * 0.6, 0.0, 0.0])


def test_ref_clip_score_is_the_harmonic_mean_with_the_nearest_reference():
    image, text = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [-1.0, 0.0]])
    references = [torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0]])]
    # first: 2.5 * 0.6 = 1.5 and max(0.8, 0.6) = 0.8; second: both sides are 0
    expected = [2 * 1.5 * 0.8 / (1.5 + 0.8), 0.0]
    assert ref_clip_score(image, text, references).tolist() == pytest.approx(expected)
