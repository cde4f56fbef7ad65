"""Collation: what the language model reads, what it learns from, what the router sees."""

from dataclasses import replace

import pytest
import torch

from data.boxes import CODECS
from data.chat import ChatEncoder
from data.checks import BadSampleError
from data.collate import IGNORED, ChatCollator
from data.config import PromptConfig
from data.sample import UNKNOWN_TASK, OcrWord, Sample, Turn
from tests.support.tiny import random_image, tiny_processor

CODEC = CODECS["location_tokens"]
PROCESSOR = tiny_processor()
TOKENIZER = PROCESSOR.tokenizer
COLLATE = ChatCollator(processor=PROCESSOR, tasks=["vqa", "grounding"], experts=["one", "two"], codec=CODEC)


def word(text: str, confidence: float = 0.9) -> OcrWord:
    return OcrWord(text=text, box=(4, 3, 20, 15), confidence=confidence)


def sample(**changes) -> Sample:
    base = Sample(
        id="7",
        image_id="p",
        image=random_image(0),  # 40 x 30 pixels
        question="what colour is the square?",
        answers=("red",),
        task="vqa",
        source="toy",
        expert="two",
        ocr=(word("STOP"), word("now", 0.5)),
    )
    return replace(base, **changes)


def prompt_of(batch, row: int = 0) -> str:
    text = TOKENIZER.decode(batch.input_ids[row][batch.attention_mask[row].bool()])
    return text.replace("<image>", "")


def test_only_the_answer_and_its_end_are_supervised():
    long = sample(answers=("a very long answer about it",), question="why is it so " * 5)
    batch = COLLATE([sample(), long])
    for row, answer in enumerate(("red", "a very long answer about it")):
        learned = batch.labels[row][batch.labels[row] != IGNORED]
        assert TOKENIZER.decode(learned).lstrip() == answer + TOKENIZER.eos_token
        where = batch.labels[row] != IGNORED
        assert torch.equal(batch.input_ids[row][where], learned)


def test_a_sample_is_encoded_alike_alone_and_beside_a_longer_one():
    alone, beside = COLLATE([sample()]), COLLATE([sample(), sample(question="why " * 30)])
    length = alone.input_ids.shape[1]
    assert torch.equal(beside.input_ids[0, :length], alone.input_ids[0])
    assert torch.equal(beside.labels[0, :length], alone.labels[0])
    assert not beside.attention_mask[0, length:].any()
    assert (beside.labels[0, length:] == IGNORED).all()


def test_every_image_token_has_its_place_in_the_sequence():
    batch = COLLATE([sample(), sample(image=random_image(1, 60, 20))])
    assert (batch.input_ids == PROCESSOR.image_token_id).sum(1).tolist() == [4, 4]
    assert batch.pixel_values.shape == (2, 3, 28, 28)
    assert batch.image_index.tolist() == [0, 1]


def test_the_prompt_holds_task_question_and_ocr_words():
    text = prompt_of(COLLATE([sample()]))
    assert "[vqa] what colour is the square?\nReference OCR token: STOP now" in text


def test_task_and_ocr_words_leave_the_prompt_by_their_switches():
    written = replace(COLLATE, settings=PromptConfig(task_template="<{task}> "))([sample()])
    assert "<vqa> what" in prompt_of(written)
    bare = replace(COLLATE, settings=PromptConfig(task_in_prompt=False, ocr_in_prompt=False))([sample()])
    assert "[vqa]" not in prompt_of(bare) and "STOP" not in prompt_of(bare)
    assert bare.task_ids.tolist() == [0] and bare.ocr_mask.any()  # the router still sees both


def test_a_withheld_task_reaches_neither_prompt_nor_router():
    batch = replace(COLLATE, withhold_task=True)([sample()])
    assert "vqa" not in prompt_of(batch)
    assert batch.task_ids.tolist() == [-1]


def test_tasks_are_withheld_from_training_samples_alone_by_their_share():
    rows = [sample(id=str(number)) for number in range(5000)]
    counts = [
        sum(map(replace(COLLATE, settings=PromptConfig(task_dropout=share)).withholds, rows))
        for share in (0.0, 0.3, 1.0)
    ]
    assert counts[0] == 0 and counts[1] == pytest.approx(1500, abs=150) and counts[2] == 5000
    asked = replace(COLLATE, for_generation=True, settings=PromptConfig(task_dropout=1.0))([sample()])
    assert "[vqa]" in prompt_of(asked) and asked.task_ids.tolist() == [0]


def test_the_routers_text_is_the_question_alone():
    batch = COLLATE([sample(), sample(ocr=None, answers=("green",), task="grounding")])
    assert torch.equal(batch.text_ids[0], batch.text_ids[1])
    words = TOKENIZER.decode(batch.text_ids[0][batch.text_mask[0]])
    assert words == "what colour is the square?"


def test_ocr_evidence_is_words_with_boxes_in_shares_of_the_image():
    batch = COLLATE([sample(), sample(ocr=()), sample(ocr=None)])
    assert batch.ocr_mask.tolist() == [[True, True], [False, False], [False, False]]
    assert torch.allclose(batch.ocr_boxes[0, 0], torch.tensor([4 / 40, 3 / 30, 20 / 40, 15 / 30]))
    assert batch.ocr_confidence[0].tolist() == pytest.approx([0.9, 0.5])
    read = [TOKENIZER.decode(batch.ocr_ids[0, i][batch.ocr_char_mask[0, i]]) for i in range(2)]
    assert read == ["STOP", "now"]


def test_a_batch_without_any_ocr_keeps_its_axes_and_masks_them():
    batch = COLLATE([sample(ocr=None), sample(ocr=())])
    assert batch.ocr_ids.shape[:2] == (2, 1) and not batch.ocr_mask.any()
    assert not batch.ocr_char_mask.any()


def test_the_most_confident_words_are_kept_in_reading_order():
    words = (word("a", 0.2), word("b", 0.9), word("c", 0.5))
    two = replace(COLLATE, settings=PromptConfig(max_ocr_words=2))
    assert [w.text for w in two.words(sample(ocr=words))] == ["b", "c"]
    rising = (word("a", 0.5), word("b", 0.9))
    assert [w.text for w in two.words(sample(ocr=rising))] == ["a", "b"]


def test_ids_name_tasks_and_experts_by_their_place_in_the_config():
    batch = COLLATE([sample(), sample(task="grounding", expert=None)])
    assert batch.task_ids.tolist() == [0, 1]
    assert batch.expert_ids.tolist() == [1, -1]


def test_the_target_is_the_most_frequent_answer_and_the_first_of_equals():
    assert COLLATE.target(sample(answers=("a", "b", "b", "c"))) == "b"
    assert COLLATE.target(sample(answers=("x", "y"))) == "x"


def test_a_box_becomes_text_by_the_codec():
    boxed = sample(task="grounding", answers=(), boxes=((0, 0, 40, 30),))
    assert COLLATE.target(boxed) == "<loc0000><loc0000><loc0031><loc0031>"
    learned = COLLATE([boxed]).labels[0]
    blank, *ids, _ = learned[learned != IGNORED].tolist()  # the blank, since no prompt ends with it
    assert TOKENIZER.decode([blank]) == " "
    assert ids == TOKENIZER.convert_tokens_to_ids(["<loc0000>"] * 2 + ["<loc0031>"] * 2)


def test_generation_pads_on_the_left_and_ends_where_the_answer_begins():
    collate = replace(COLLATE, for_generation=True)
    batch = collate([sample(answers=()), sample(question="why " * 9)])
    assert batch.labels is None
    assert batch.attention_mask[:, -1].all() and not batch.attention_mask[0, 0]
    assert prompt_of(batch).endswith("ASSISTANT:")
    assert "green" not in prompt_of(collate([sample(answers=("green",))]))


def test_a_sample_that_is_too_long_is_named_and_never_cut():
    short = replace(COLLATE, settings=PromptConfig(max_length=70))
    with pytest.raises(BadSampleError, match=r"source 'toy', sample 7: too long: \d+ tokens"):
        short([sample(question="why " * 60)])


def test_a_sample_of_just_the_longest_length_stays_beside_one_that_is_too_long():
    long, longer = sample(id="8"), sample(id="9", question="what colour is the square??")
    count = COLLATE.num_tokens(long)
    assert COLLATE.num_tokens(longer) == count + 1
    collate = replace(COLLATE, settings=PromptConfig(max_length=count))
    assert [e.rule for e in collate.split([longer])[1]] == ["too long"]
    batch, rejected = collate.split([longer, long])
    assert [s.id for s in batch.samples] == ["8"] and len(rejected) == 1


def test_bad_samples_are_split_off_and_the_good_ones_keep_their_encoding():
    collate = replace(COLLATE, settings=PromptConfig(max_length=100))
    bad = [sample(answers=(" ",)), sample(question="why " * 99), sample(task="cook")]
    failed = BadSampleError("rows.jsonl:3", "missing image", "a.png")
    batch, rejected = collate.split([bad[0], sample(), failed, bad[1], bad[2]])
    assert torch.equal(batch.input_ids, collate([sample()]).input_ids)
    assert sorted(e.rule for e in rejected) == [
        "empty answer", "missing image", "too long", "unknown task"
    ]  # fmt: skip
    assert collate.split([bad[0]])[0] is None


def test_a_held_out_task_is_allowed_where_asked_for():
    collate = replace(COLLATE, allow_unknown_tasks=True)
    batch = collate([sample(task="count")])
    assert batch.task_ids.tolist() == [UNKNOWN_TASK] and "[count]" in prompt_of(batch)


def unmarked(processor):
    template = processor.chat_template.replace("{% generation %}", "")
    processor.chat_template = template.replace("{% endgeneration %}", "")
    return processor


def test_without_generation_marks_the_answer_is_what_follows_the_prompt():
    samples = [sample(), sample(answers=("a longer answer",), question="why?")]
    found = replace(COLLATE, processor=unmarked(tiny_processor()))(samples)
    marked = COLLATE(samples)
    assert found.input_ids.equal(marked.input_ids)
    for row, other in zip(found.labels, marked.labels, strict=True):
        texts = [TOKENIZER.decode(labels[labels != IGNORED]) for labels in (row, other)]
        assert texts[0].lstrip() == texts[1].lstrip()
    prompts = replace(COLLATE, for_generation=True)(samples)
    for row, labels, prompt, mask in zip(
        found.input_ids, found.labels, prompts.input_ids, prompts.attention_mask, strict=True
    ):  # what is not supervised is the prompt that generation sees, and padding
        start = int((labels != IGNORED).nonzero()[0])
        assert row[:start].equal(prompt[mask.bool()])


def test_without_marks_every_answer_of_a_conversation_is_supervised_and_no_question():
    def said(role, text, *image):
        return {"role": role, "content": [*image, {"type": "text", "text": text}]}

    collate = replace(COLLATE, processor=unmarked(tiny_processor()))
    image = {"type": "image", "image": random_image(0)}
    chat = [said("user", "what?", image), said("assistant", "red"),
            said("user", "sure?"), said("assistant", "yes")]  # fmt: skip
    encoder = ChatEncoder(collate.processor)
    ids, mask = encoder.replies(encoder.dialogue(chat))
    texts = [TOKENIZER.decode([t for t, m in zip(ids, mask, strict=True) if m == on]) for on in (0, 1)]
    assert "sure?" in texts[0] and "red" not in texts[0] and "yes" not in texts[0]
    assert texts[1] == " red</s> yes</s>"
    prompt = collate.processor.apply_chat_template(chat[:1], add_generation_prompt=True)
    assert prompt + TOKENIZER.decode(ids) == collate.processor.apply_chat_template(chat)


@pytest.mark.parametrize("marks", [True, False])
def test_an_answer_ends_with_the_end_token_also_where_the_template_forgets_it(marks):
    processor = tiny_processor()
    processor.chat_template = processor.chat_template.replace("+ eos_token ", "+ ' ' ")
    batch = replace(COLLATE, processor=processor if marks else unmarked(processor))([sample()])
    learned = batch.labels[0][batch.labels[0] != IGNORED]
    assert learned[-1] == TOKENIZER.eos_token_id == batch.input_ids[0, -1]
    assert TOKENIZER.decode(learned[:-1]).strip() == "red"


def test_a_template_that_rewrites_the_prompt_is_refused():
    processor = unmarked(tiny_processor())
    processor.chat_template = "{{ messages | length }}" + processor.chat_template
    with pytest.raises(ValueError, match="rewrites the prompt"):
        replace(COLLATE, processor=processor)([sample()])


CROPPING = tiny_processor()
CROPPING.image_processor.size = {"shortest_edge": 28}
CROPPING.image_processor.crop_size = {"height": 28, "width": 28}
CROPPING.image_processor.do_center_crop = True
WIDE = random_image(1, 60, 30)


def test_a_box_that_the_centre_crop_hides_is_a_bad_sample_and_counted():
    collate = replace(COLLATE, processor=CROPPING)  # of 60 x 30 pixels it shows 30 in the middle
    boxes = {"half": (0, 0, 30, 30), "most": (10, 0, 45, 30), "seen": (15, 0, 45, 30)}
    rows = [sample(id=i, image=WIDE, answers=(), boxes=(b,)) for i, b in boxes.items()]
    batch, rejected = collate.split(rows)
    assert [s.id for s in batch.samples] == ["seen"]
    assert [e.rule for e in rejected] == ["box hidden by crop"] * 2
    assert "50% of a box" in str(rejected[0]) and "prompt.min_visible" in str(rejected[0])


def test_the_worst_of_several_boxes_counts_and_the_least_share_is_enough():
    seen, half = (15, 0, 45, 30), (0, 0, 30, 30)
    collate = replace(COLLATE, processor=CROPPING, settings=PromptConfig(min_visible=0.5))
    assert collate.error_of(sample(image=WIDE, answers=(), boxes=(half,))) is None
    strict = replace(collate, settings=PromptConfig(min_visible=0.51))
    for boxes in ((seen, half), (half, seen)):
        error = strict.error_of(sample(image=WIDE, answers=(), boxes=boxes))
        assert error is not None and error.rule == "box hidden by crop"


def test_a_cropped_box_is_learned_as_what_is_left_of_it_where_that_is_accepted():
    collate = replace(COLLATE, processor=CROPPING, codec=CODECS["llava"], settings=PromptConfig(min_visible=0.8))
    boxed = sample(image=WIDE, answers=(), boxes=((12, 0, 30, 30),))
    learned = collate([boxed]).labels[0]
    text = TOKENIZER.decode(learned[learned != IGNORED])
    assert text.removesuffix(TOKENIZER.eos_token).strip() == "[0.00, 0.00, 0.50, 1.00]"
    assert collate.codec.decode(text, collate.geometry(boxed)) == pytest.approx((15, 0, 30, 30))


def test_an_instruction_stands_behind_the_ocr_words_as_llava_writes_it():
    asked = sample(instruction="Answer with one word.")
    batch = replace(COLLATE, settings=PromptConfig(ocr_separator=", ", task_in_prompt=False))([asked])
    expected = "what colour is the square?\nReference OCR token: STOP, now\nAnswer with one word."
    assert expected in prompt_of(batch)


def test_every_answer_of_a_conversation_is_supervised_and_nothing_else():
    turns = (Turn(question="and the circle?", answer="blue"), Turn(question="sure?", answer="yes"))
    batch = COLLATE([sample(turns=turns, system="be brief")])
    learned = batch.labels[0][batch.labels[0] != IGNORED]
    spoken = [text.strip() for text in TOKENIZER.decode(learned).split(TOKENIZER.eos_token)]
    assert spoken == ["red", "blue", "yes", ""]
    text = prompt_of(batch)
    places = [text.index(part) for part in ("be brief", "[vqa] what", "and the circle?", "sure?")]
    assert places == sorted(places)
    assert torch.equal(batch.text_ids, COLLATE([sample()]).text_ids)  # gates: by the first question


def test_generation_answers_the_first_question_of_a_conversation():
    turns = (Turn(question="and the circle?", answer="blue"),)
    collate = replace(COLLATE, for_generation=True)
    assert torch.equal(collate([sample(turns=turns)]).input_ids, collate([sample()]).input_ids)


def test_text_alone_has_no_image_in_the_batch():
    text = sample(image=None, ocr=None)
    mixed = COLLATE([text, sample()])
    assert mixed.image_index.tolist() == [1] and mixed.image_mask.tolist() == [False, True]
    assert mixed.pixel_values.shape == (1, 3, 28, 28)
    assert (mixed.input_ids == PROCESSOR.image_token_id).sum(1).tolist() == [0, 4]
    alone = COLLATE([text])
    assert alone.image_mask.tolist() == [False]
    assert alone.pixel_values.shape == (1, 3, 28, 28)  # blank: every process runs its tower
    assert torch.equal(alone.input_ids[0], mixed.input_ids[0][mixed.attention_mask[0].bool()])


def test_the_image_token_is_refused_in_later_turns_too():
    with pytest.raises(BadSampleError, match="image token in text"):
        COLLATE([sample(turns=(Turn(question="is <image> one?", answer="yes"),))])
