"""From chats to ids and labels with every family's own template: an answer is learned as it is, and it ends."""

import re
from functools import cache
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from data.audit import audit_rows
from data.boxes import CODECS
from data.chat import EDGE, ChatEncoder, message, special_tokens
from data.checks import BadSampleError, RefusedError
from data.collate import IGNORED, ChatCollator
from data.config import PromptConfig
from data.sample import OcrWord, Sample, Turn
from moa.backbones import processors as opening
from moa.backbones.llava import Backbone, open_intake
from moa.training.batches import source_loader
from tests.support.chat_templates import HUB, IDEFICS, QWEN2
from tests.support.families import CONFIGS, NAMES
from tests.support.tiny import random_image, tiny_llava, tiny_processor

PIECES = sorted({hub.end[i:j] for hub in HUB.values() for i in range(18) for j in range(i + 1, 19)})
each_template = pytest.mark.parametrize("name", HUB)
processor_of = cache(lambda name: HUB[name].processor())


@cache
def special_of(name: str) -> re.Pattern[str]:
    tokens = sorted(special_tokens(processor_of(name)), reverse=True)
    return re.compile("|".join(map(re.escape, [*tokens, EDGE])))


def text_of(rng: Random, special: re.Pattern[str]) -> str:
    """A short text, most of it parts of end tokens, as a reader gives it: no special token, not blank."""
    while True:
        rare = [chr(rng.choice([rng.randrange(32, 0x250), rng.randrange(0xE000, 0x1F700)]))]
        parts = rng.choices([*PIECES, *"<|/>s_ aeniof\n.3", "red", "a dog", *rare], k=rng.randint(1, 3))
        text = "".join(parts).strip()
        if text and not special.search(text):
            return text


def chat_of(rng: Random, name: str) -> list[dict]:
    """One to three questions and answers; some begin with a system prompt."""
    special = special_of(name)
    roles = ["user", "assistant"] * rng.choice([1, 1, 2, 3])
    if rng.random() < 0.2 and name != "pixtral":  # it puts the system prompt before the last question
        roles = ["system", *roles]
    return [message(role, text_of(rng, special)) for role in roles]


@pytest.mark.slow
@each_template
@settings(max_examples=4, deadline=None, database=None)
@given(rng=st.randoms(use_true_random=True))
def test_an_answer_and_one_end_token_are_learned_behind_the_prompt_of_generation(name, rng):
    encoder, tokenizer = ChatEncoder(processor_of(name)), processor_of(name).tokenizer
    chats = [chat_of(rng, name) for _ in range(60)]
    end = tokenizer.convert_tokens_to_ids(HUB[name].end)
    learned = encoder.encode(chats, [[]] * len(chats), prompts=False)
    asked = encoder.encode(chats, [[]] * len(chats), prompts=True)["input_ids"]
    for chat, prompt, ids, mask in zip(chats, asked, learned["input_ids"], learned["assistant_masks"], strict=True):
        first = mask.index(1)
        assert ids[:first] == prompt  # of the first answer
        said = [i for i, m in zip(ids, mask, strict=True) if m]
        assert said[-1] == end and ids[-1] == end
        spoken = tokenizer.decode(said).split(HUB[name].end)
        answers = [m["content"][0]["text"] for m in chat if m["role"] == "assistant"]
        assert [text.lstrip() for text in spoken] == [*answers, ""]
        assert ids.count(end) - prompt.count(end) >= said.count(end) == len(answers)


def collator(processor, **changes) -> ChatCollator:
    fields = {"tasks": ["vqa"], "experts": [], "codec": CODECS["qwen2_vl"]}
    fields["settings"] = PromptConfig(task_in_prompt=False)
    return ChatCollator(processor=processor, **fields | changes)


def sample(number: int = 0, **changes) -> Sample:
    fields = {"question": "what?", "answers": ("red",), "task": "vqa", "source": "s"}
    image = random_image(number)
    return Sample(**{"id": str(number), "image_id": "i", "image": image, **fields, **changes})


def learned(processor, chat) -> str:
    encoder = ChatEncoder(processor)
    ids, mask = encoder.replies(encoder.dialogue(chat))
    return processor.tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])


def with_template(template: str, *specials: str, like: str = "</s>"):
    processor = tiny_processor()
    processor.tokenizer.add_tokens([*specials], special_tokens=True)
    processor.chat_template = template.replace("<|im_end|>", like)
    return processor


CHAT = [message("user", "what?"), message("assistant", "red"),
        message("user", "and?"), message("assistant", "end")]  # fmt: skip


@each_template
def test_with_an_image_the_prompt_is_still_the_one_of_generation(name):
    turns = (Turn(question="and?", answer="end"),)
    batches = [collator(processor_of(name), for_generation=g)([sample(turns=turns)]) for g in (0, 1)]
    (whole,), (prompt,) = (batch.input_ids for batch in batches)
    start = int((batches[0].labels[0] != IGNORED).nonzero()[0])
    assert whole[:start].equal(prompt)
    assert batches[0].pixel_values.equal(batches[1].pixel_values)


def test_a_first_word_has_the_tokens_that_it_has_behind_its_prompt():
    """Llama's tokenizers write a blank before every text, so that a lone answer would have two."""
    processor = processor_of("llava-1.5")
    tokenizer = processor.tokenizer
    encoder = ChatEncoder(processor)
    ids, _ = encoder.replies(encoder.dialogue(CHAT[:2]))
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁red", "</s>"]
    text = processor.apply_chat_template(CHAT[:1], add_generation_prompt=True) + " red</s>"
    assert tokenizer(text)["input_ids"][-2:] == ids


def test_a_prompt_whose_template_writes_the_begin_token_has_one():
    processor = HUB["gemma3"].processor()
    begin = [("<s>", 1)]
    backend = processor.tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=begin)
    for prompts in (True, False):
        batch = collator(processor, for_generation=prompts)([sample()])
        assert (batch.input_ids == processor.tokenizer.bos_token_id).sum() == 1


MARKED = "{% generation %}{{ m['content'][0]['text'] }}{% endgeneration %}"
THINK = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' }}"
    "{% if m['role'] == 'assistant' %}ANSWER{{ eos_token }}"
    "{% else %}{{ m['content'][0]['text'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (MARKED, "red</s>end</s>"),
        ("<think></think>" + MARKED, "red</s>end</s>"),  # the mark leaves out what is before it
        (MARKED.replace("{{", "<think></think>{{"), "<think></think>red</s><think></think>end</s>"),
        ("<think></think>{{ m['content'][0]['text'] }}", "<think></think>red</s><think></think>end</s>"),
        ("{% if loop.last %}" + MARKED + "{% else %}{{ m['content'][0]['text'] }}{% endif %}", "end</s>"),
        (MARKED.replace("{%", "{%- ").replace("%}", " -%}"), "red</s>end</s>"),
        ("{{ messages | length }}" + MARKED, "red</s>end</s>"),
    ],
)  # fmt: skip
def test_a_mark_decides_what_is_learned(answer, expected):
    assert learned(with_template(THINK.replace("ANSWER", answer)), CHAT) == expected


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("{{ messages | length }}{{ m['content'][0]['text'] }}", None),
        ("{{ m['content'][0]['text'] | upper }}", "does not write the answer as it is"),
        ("{{ m['content'][0]['text'] * 2 }}", "does not write the answer as it is"),
        ("nothing", "does not write the answer as it is"),
        ("{% generation %}{% endgeneration %}{{ m['content'][0]['text'] }}", "marks no answer"),
    ],
)
def test_a_template_that_hides_the_answer_is_refused(answer, error):
    processor = with_template(THINK.replace("ANSWER", answer))
    if error is None:  # a count before the answer is learned with it: generation must write it
        assert learned(processor, CHAT[:2]) == "2red</s>"
        return
    with pytest.raises(ValueError, match=error):
        ChatEncoder(processor).dialogue(CHAT)


def test_what_generation_stops_at_ends_an_answer():
    """A token that is special without a name, one that only the generation's config names, and eos."""
    processor = with_template(QWEN2, "<|im_start|>", "<end_of_turn>", like="<end_of_turn>")
    assert learned(processor, CHAT) == "red<end_of_turn>end<end_of_turn>"
    processor = with_template(QWEN2, "<|im_start|>", like="<loc0031>")  # a plain token
    assert learned(processor, CHAT) == "red</s>end</s>"
    stop = processor.tokenizer.convert_tokens_to_ids("<loc0031>")
    assert ChatEncoder(processor, (stop,)).dialogue(CHAT).end == stop


def test_generation_stops_at_the_token_that_is_learned_as_the_end():
    model, processor = tiny_llava()
    processor.chat_template = processor.chat_template.replace("+ eos_token", "+ '<loc0031>'")
    end = processor.tokenizer.convert_tokens_to_ids("<loc0031>")
    processor.tokenizer.add_tokens(["<loc0031>"], special_tokens=True)
    always = {"sequence_bias": {(end,): 1e9}, "do_sample": False, "max_new_tokens": 4}
    backbone = Backbone(model=model, processor=processor)
    batch = collator(processor, for_generation=True)([sample()])
    assert backbone.generate(batch, backbone.features(batch), **always).tolist() == [[end]]
    assert backbone.intake.stops == (processor.tokenizer.eos_token_id,)


@pytest.mark.parametrize("name", [*NAMES])
def test_a_special_token_in_the_data_is_a_bad_sample_wherever_it_is(name):
    processor = tiny_processor() if name == "llava" else CONFIGS[name]()[1]
    collate = collator(processor)
    for token in special_tokens(processor):
        text = f"use {token} now"
        rows = [
            {"question": text}, {"answers": (text,)}, {"system": text}, {"instruction": text},
            {"turns": (Turn(question=text, answer="a"),)}, {"turns": (Turn(question="q", answer=text),)},
            {"ocr": (OcrWord(text=token, box=(0, 0, 5, 5), confidence=1),)},
        ]  # fmt: skip
        for row in rows:
            error = collate.error_of(sample(**row))
            assert error is not None and repr(token) in str(error)
            assert error.rule in ("special token in text", "image token in text")
    assert {"</s>", "<pad>"} <= special_tokens(processor)
    if name not in ("llava", "llava_next", "paligemma", "gemma3", "idefics3"):
        assert any("video" in token for token in special_tokens(processor))
    reference = sample(answers=("use </s> now",))  # not read for generation
    assert collator(processor, for_generation=True).error_of(reference) is None


def test_tokens_that_boxes_are_written_with_are_no_special_tokens_in_data():
    processor, box = processor_of("qwen2-vl"), "<|box_start|>(1,2),(3,4)<|box_end|>"
    assert collator(processor).error_of(sample(answers=(box,))) is None
    assert "<|box_start|>" in str(collator(processor, codec=None).error_of(sample(answers=(box,))))
    located = sample(answers=("<loc0001><loc0002> a cat",))
    assert collator(tiny_processor(), codec=CODECS["location_tokens"]).error_of(located) is None


WIDE = random_image(0, 2500, 10)


def refused_by(error: BadSampleError, number: int) -> bool:
    named = f"source 's', sample {number}: refused by processor: " in str(error)
    return error.rule == "refused by processor" and named


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_sample_that_a_processor_refuses_is_named_and_the_others_are_read(num_workers):
    rows = [sample(0), sample(1, image=WIDE), sample(2)]
    collate = collator(CONFIGS["qwen2_vl"]()[1])
    ((batch, rejected),) = source_loader(rows, "s", collate, batch_size=3, num_workers=num_workers)
    assert [s.id for s in batch.samples] == ["0", "2"]
    assert torch.equal(batch.input_ids, collate([sample(0), sample(2)]).input_ids)
    assert len(rejected) == 1 and refused_by(rejected[0], 1) and "aspect ratio" in str(rejected[0])
    audit = audit_rows(range(3), rows, "s", collate)
    assert {rule: f.count for rule, f in audit.found.items()} == {"refused by processor": 1}


def test_a_sample_that_a_template_refuses_is_named_in_a_batch_and_by_the_check():
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    collate = collator(with_template(refuse + QWEN2, "<|im_start|>"))
    rows = [sample(0, image=None), sample(1, image=None, system="be brief")]
    batch, rejected = collate.split(rows)
    assert [s.id for s in batch.samples] == ["0"]
    assert refused_by(rejected[0], 1) and "no system here" in str(rejected[0])
    found = audit_rows(range(2), rows, "s", collate).found
    assert found["refused by processor"].count == 1
    assert collate.split(rows[1:])[0] is None


def test_a_batch_that_is_refused_though_no_sample_is_raises():
    class Odd(ChatCollator):
        def encode(self, samples):
            if len(samples) > 1:
                raise RefusedError("only one at a time")
            return super().encode(samples)

    fields = {"tasks": ["vqa"], "experts": [], "codec": None}
    with pytest.raises(RefusedError, match="only one at a time"):
        Odd(processor=tiny_processor(), **fields)([sample(0), sample(1)])


def saved(folder, **changes):
    """A base's processor on the disk with other parts, and the config that it is read with."""
    model, processor = tiny_llava()
    for name, value in changes.items():
        setattr(processor if name == "chat_template" else processor.tokenizer, name, value)
    processor.save_pretrained(folder)
    model.config.save_pretrained(folder)
    return str(folder)


def test_a_base_without_a_pad_token_pads_with_its_end_token_and_says_so(tmp_path):
    with pytest.warns(UserWarning, match="has no pad token; </s> pads"):
        processor = open_intake(saved(tmp_path, pad_token=None)).processor
    batch = collator(processor)([sample(), sample(1, answers=("a longer answer",))])
    ends = (batch.labels == processor.tokenizer.eos_token_id).sum(1)
    assert ends.tolist() == [1, 1] and batch.attention_mask.sum(1).unique().numel() == 2


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token": None}, "has no eos_token: name one of its tokens in tokenizer_config.json"),
        ({"chat_template": None}, "has no chat template.*copy chat_template.jinja"),
        ({"chat_template": "{% if %}"}, "its chat template fails.*repair chat_template.jinja: "),
        ({"chat_template": "{{ raise_exception('never') }}"}, "chat template fails.*: never"),
        ({"chat_template": "{{ messages[9]['role'] }}"}, "chat template fails.*: "),
        ({"chat_template": "hello"}, "chat template fails.*does not write the answer"),
        ({"chat_template": ENDLESS + IDEFICS}, "chat template fails.*not done after 0.2 seconds"),
    ],
)
def test_a_base_whose_processor_lacks_a_part_is_refused_with_a_way_out(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(opening, "TEMPLATE_SECONDS", 0.2)
    with pytest.raises(ValueError, match=rf"^model: {tmp_path}: .*{message}") as error:
        open_intake(saved(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_a_collator_refuses_such_a_processor_too_and_blames_no_sample():
    processor = tiny_processor()
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="has no pad_token") as error:
        collator(processor).split([sample()])
    assert not isinstance(error.value, BadSampleError)
    bare = CONFIGS["paligemma"]()[1]
    assert bare.chat_template is None and len(collator(bare)([sample()])) == 1


@pytest.mark.parametrize("template", ["{task", "{question}", "{}", "{task:>999999999}", "{task!r}", "}"])  # fmt: skip
def test_a_prompt_template_with_another_place_is_named(template):
    with pytest.raises(ValueError, match=r"^task_template: may have \{task\} as its only"):
        PromptConfig(task_template=template)
    with pytest.raises(ValueError, match=r"^ocr_template: may have \{words\} as its only"):
        PromptConfig(ocr_template=template.replace("task", "word"))
    PromptConfig(task_template="{{{task}}} ", ocr_template="")
