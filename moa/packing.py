"""Rows that hold several samples: positions that restart, and each sample's own answer.

    input_ids  [rows, seq]   a a a a b b b . .      a row is filled with samples in their order
    segments   [rows, seq]   0 0 0 0 1 1 1 -1 -1    which sample a token belongs to, -1 at padding
    positions  [rows, seq]   0 1 2 3 0 1 2 0 1      where they restart, attention ends

No attention mask: transformers makes a block mask of restarting positions, and only where none is
given. A batch that is not packed has a sample a row, and takes the same path.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Tokens = Int[Tensor, "rows seq"]
Segments = Tokens | None  # None: a row is a sample
Owners = Mapping[str, Int[Tensor, " _"]]  # stream of sites -> the sample of each of its rows, -1 for none


def restart_positions(segments: Tokens) -> Tokens:
    """Each token's place in its own run of one segment; padding is a run like any other."""
    places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    return places - torch.where(begins(segments), places, 0).cummax(1).values


def begins(segments: Tokens) -> Bool[Tensor, "rows seq"]:
    """Where a run of one segment begins."""
    return F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)


def prompt_samples(samples: Tokens, labels: Tokens | None) -> Tokens:
    """The sample of each token ahead of its sample's first answer, -1 at all others; `samples` is -1 at padding."""
    if labels is None:
        return samples
    answer = labels != -100
    count = answer.cumsum(1)  # along the row, so less what the samples before have
    before = torch.where(begins(samples), count - answer.long(), 0).cummax(1).values
    return samples.masked_fill(count > before, -1)


def next_labels(labels: Tokens, segments: Segments) -> Tokens:
    """The label that each position predicts, -100 where it predicts none; a segment's last position does not."""
    following = labels[:, 1:]
    if segments is not None:
        following = following.masked_fill(segments[:, 1:] != segments[:, :-1], -100)
    return F.pad(following, (0, 1), value=-100)


def answer_positions(
    hidden: Float[Tensor, "rows seq width"], labels: Tokens, segments: Segments, num_samples: int
) -> tuple[Float[Tensor, "batch answer width"], Int[Tensor, "batch answer"]]:
    """The hidden states that predict a sample's supervised tokens, and those tokens.

    They are at the left of the sample's row, with zeros and -100 behind them. The output layer is the widest of all:
    running it on the images' and the prompt's positions would take most of its time and memory for nothing. Samples are
    in the order of their numbers; without `segments` a row is a sample.
    """
    if segments is None:
        segments = torch.arange(num_samples, device=labels.device)[:, None].expand_as(labels)
    labels = next_labels(labels, segments)
    supervised = labels != -100
    owner = segments[supervised]
    count = torch.bincount(owner, minlength=num_samples)
    slot = torch.arange(len(owner), device=owner.device) - (count.cumsum(0) - count)[owner]
    longest = max(int(count.max()), 1)
    picked = hidden.new_zeros(num_samples, longest, hidden.shape[-1])
    targets = labels.new_full((num_samples, longest), -100)
    picked = picked.index_put((owner, slot), hidden[supervised])
    return picked, targets.index_put((owner, slot), labels[supervised])
