"""Packed rows equal a row per sample: logits, losses, gates, gradients, on a real tiny LLaVA."""

import dataclasses

import pytest
import torch

from data.batch import Batch
from data.boxes import CODECS
from data.collate import ChatCollator, fill_rows, joined
from data.sample import OcrWord, Sample, Turn
from moa.backbones.llava import check_packing
from moa.model import MixtureModel
from moa.packing import answer_positions, prompt_samples, restart_positions
from tests.support.tiny import random_image
from tests.test_model import close, make_model

TASKS = ["vqa", "caption", "grounding"]


def samples() -> list[Sample]:
    """Of several lengths and tasks; one is text alone, one a conversation of two turns."""
    questions = ("what is this?", "read", "where is the small dog on the left?", "why?", "and now?")
    return [
        Sample(
            id=str(i), image_id=str(i), image=random_image(i) if i != 3 else None, question=question,
            turns=(Turn(question="sure?", answer="yes"),) if i == 2 else (),
            answers=("a dog on the left" if i % 2 else "no",), task=TASKS[i % 3], source="toy",
            expert=TASKS[(i + 1) % 3],
            ocr=(OcrWord(text="exit", box=(1, 2, 9, 8), confidence=0.9),) if i == 1 else None,
        )
        for i, question in enumerate(questions)
    ]  # fmt: skip


def collated(model: MixtureModel, pack_length: int | None = None, **changes) -> Batch:
    collate = ChatCollator(
        processor=model.backbone.processor, tasks=TASKS, experts=TASKS,
        codec=CODECS["location_tokens"], pack_length=pack_length, **changes,
    )  # fmt: skip
    return collate(samples())


def test_samples_fill_rows_in_their_order():
    assert fill_rows([4, 3, 5, 9, 1, 1], 9) == [range(0, 2), range(2, 3), range(3, 4), range(4, 6)]
    assert fill_rows([4], 2) == [range(0, 1)]  # a row is never cut


def test_rows_are_filled_evenly():
    """Nine samples of 10 tokens in rows of 80: two rows either way, of 50 tokens and not of 80."""
    assert fill_rows([10] * 9, 80) == [range(0, 5), range(5, 9)]
    assert fill_rows([10] * 9, 90) == [range(0, 9)]


def test_the_tokens_of_a_row_stand_one_behind_the_other():
    assert joined(["ab", "c", "de"], [range(0, 2), range(2, 3)]) == [["a", "b", "c"], ["d", "e"]]


def test_a_packed_batch_has_the_same_tokens_in_fewer_rows():
    model = make_model()
    plain, packed = collated(model), collated(model, 120)
    assert packed.input_ids.shape[0] < plain.input_ids.shape[0] == len(plain) == len(packed)
    assert collated(model, 1000).input_ids.numel() == plain.attention_mask.sum()  # no padding
    for name in ("input_ids", "labels"):
        ours, theirs = getattr(packed, name), getattr(plain, name)
        for i in range(len(plain)):
            own = ours[packed.segments == i]
            assert own.equal(theirs[i][plain.attention_mask[i].bool()])
    assert packed.attention_mask.equal((packed.segments >= 0).long())
    for name in ("pixel_values", "text_ids", "ocr_ids", "expert_ids"):
        assert getattr(packed, name).equal(getattr(plain, name))


def test_positions_restart_with_every_sample_and_with_the_padding():
    segments = torch.tensor([[0, 0, 0, 1, 1, -1, -1], [2, 3, 3, 3, 3, 4, -1]])
    assert restart_positions(segments).tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 3, 0, 0]]


def test_a_prompt_ends_at_its_samples_first_answer_and_a_later_turn_is_not_of_it():
    samples = torch.tensor([[0, 0, 0, 0, 1, 1, -1], [2, 2, 2, 3, 3, 3, 3], [-1, -1, 4, 4, 4, 4, 4]])
    none, some = -100, 7
    labels = torch.tensor([
        [none, some, none, some, none, some, none], [none, none, none, some, none, none, none],
        [none, none, none, none, some, some, none],
    ])  # fmt: skip
    expected = [[0, -1, -1, -1, 1, -1, -1], [2, 2, 2, -1, -1, -1, -1], [-1, -1, 4, 4, -1, -1, -1]]
    assert prompt_samples(samples, labels).tolist() == expected
    assert prompt_samples(samples, None).equal(samples)


def test_answers_come_back_by_sample_and_never_across_a_border():
    segments = torch.tensor([[0, 0, 1, 1, 1, -1], [2, 2, 2, 2, 2, 2]])
    # sample 1 begins with a supervised token: the last state of sample 0 must not predict it
    labels = torch.tensor([[-100, 7, 8, 9, 10, -100], [-100] * 6])
    hidden = torch.arange(12.0).view(2, 6, 1)
    picked, targets = answer_positions(hidden, labels, segments, 3)
    assert picked[..., 0].tolist() == [[0.0, 0.0], [2.0, 3.0], [0.0, 0.0]]
    assert targets.tolist() == [[7, -100], [9, 10], [-100, -100]]


KINDS = {
    "softmax": {},
    "a gate for each site": {"per_site": True},
    "sigmoid": {"kind": "sigmoid"},
    "the sample's own expert": {"kind": "one_hot"},
    "tokens by softmax": {"granularity": "token"},
    "tokens by top-k": {"granularity": "token", "kind": "top_k"},
    "tokens by sigmoid": {"granularity": "token", "kind": "sigmoid"},
    "the mean of a prompt's tokens": {"granularity": "token", "pool": "prompt_mean"},
    "their votes": {"granularity": "token", "kind": "top_k", "pool": "vote"},
}


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_packed_equals_unpacked(name):
    model = make_model(**KINDS[name])
    ours, theirs = model(collated(model, 120)), model(collated(model))
    for field in ("loss_per_sample", "num_tokens", "logits", "labels", "gates"):
        close(getattr(ours, field), getattr(theirs, field))
    assert ours.aux.keys() == theirs.aux.keys()
    for key in ours.aux:
        close(ours.aux[key], theirs.aux[key])
    assert theirs.gates.std(0).max() > 0.02  # samples differ in their gates, or nothing was shown


def test_every_token_has_the_logits_of_its_sample_alone():
    model = make_model()
    plain, packed = collated(model), collated(model, 1000)
    whole = dataclasses.replace(packed, labels=None)
    ours, theirs = model(whole).logits, model(dataclasses.replace(plain, labels=None)).logits
    for i in range(len(plain)):
        close(ours[packed.segments == i], theirs[i][plain.attention_mask[i].bool()])


def test_with_the_gates_of_another_sample_the_logits_would_differ():
    model = make_model()
    packed = collated(model, 1000)
    right = model(packed)
    first = right.gates[:1].detach().expand(len(packed), -1, -1)
    model.bank.set_gates(first, packed.image_index, packed.segments)
    hidden = model.backbone.hidden_states(packed, model.backbone.features(packed))
    wrong = model.backbone.logits(answer_positions(hidden, packed.labels, packed.segments, len(packed))[0])
    used = right.labels != -100
    assert (wrong[used] - right.logits[used]).abs().max() > 0.1


def test_gradients_are_those_of_the_unpacked_batch():
    gradients = []
    for pack_length in (None, 120):
        model = make_model().train()
        model.router.modality_dropout = 0.0
        trained = [*model.bank.parameters(), *model.router.parameters()]
        for parameter in trained:
            parameter.requires_grad_(True)
        model(collated(model, pack_length)).loss_per_sample.sum().backward()
        gradients.append([parameter.grad for parameter in trained])
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients[0])


FLEX = pytest.param("flex_attention", marks=pytest.mark.slow)  # compiles for a minute


@pytest.mark.parametrize("attention", ["sdpa", "eager", FLEX])
def test_the_attention_implementations_heed_restarting_positions(attention):
    model = make_model()
    expected = model(collated(model)).loss_per_sample
    model.model.model.language_model.set_attn_implementation(attention)
    with torch.no_grad():
        close(model(collated(model, 120)).loss_per_sample, expected)


@pytest.mark.slow
def test_an_attention_mask_beside_the_positions_would_mix_the_samples():
    """Why none is given: transformers takes a mask of ones for the whole truth."""
    model = make_model()
    packed = collated(model, 1000)
    ids, positions = packed.input_ids, restart_positions(packed.segments)
    options = {"input_ids": ids, "pixel_values": packed.pixel_values, "position_ids": positions}
    with model.bank.context.disabled(), torch.no_grad():
        apart = model.model(**options, use_cache=False).logits
        mixed = model.model(**options, attention_mask=torch.ones_like(ids), use_cache=False).logits
    assert (apart - mixed)[packed.segments == 0].abs().max() < 1e-5
    assert (apart - mixed)[packed.segments == 1].abs().max() > 0.05


def test_attention_that_would_mix_samples_is_refused():
    config = make_model().model.config
    for attention, rows, fine in (
        ("sdpa", 2, True), ("flash_attention_2", 1, True), ("flash_attention_2", 2, False),
        ("paged|sdpa", 1, False),
    ):  # fmt: skip
        config.text_config._attn_implementation_internal = attention
        if fine:
            check_packing(config, rows)
        else:
            with pytest.raises(ValueError, match="does not separate the samples of . rows; choices"):
                check_packing(config, rows)


def test_generation_takes_a_row_per_sample():
    model = make_model()
    with pytest.raises(ValueError, match="without pack_length"):
        model.generate(collated(model, 1000))
    assert collated(model, 1000, for_generation=True).segments is None
