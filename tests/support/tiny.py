"""A tiny random LLaVA of the real classes and a batch for it: what tests of the model stand on.

Built from configs in a fraction of a second, without a download. `vision_feature_layer=-2` leaves
the last vision layer unused, as in the LLaVA checkpoints people have.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from data.batch import Batch

try:
    from transformers import CLIPImageProcessorPil as ClipImageProcessor
except ImportError:  # transformers < 5.20
    from transformers import CLIPImageProcessor as ClipImageProcessor

NUM_BINS = 32
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ c['text'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"  # the answer brings its space
)
CORPUS = ["USER: what colour is the square? ASSISTANT: red", "where is the dog", "a cat"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with `<image>` and the location tokens `<loc0000>` ... `<loc0031>`."""
    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=256,
    )
    locations = [f"<loc{i:04d}>" for i in range(NUM_BINS)]
    fast.add_tokens([AddedToken(t, special=False, normalized=False) for t in locations])
    fast.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    fast.image_token = "<image>"
    return fast


def tiny_processor(image_size: int = 28, patch_size: int = 14) -> LlavaProcessor:
    image_processor = ClipImageProcessor(size={"height": image_size, "width": image_size}, do_center_crop=False)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tiny_tokenizer(),
        patch_size=patch_size,
        chat_template=CHAT_TEMPLATE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def tiny_llava(
    *,
    hidden: int = 32,
    num_layers: int = 2,
    num_vision_layers: int = 3,
    image_size: int = 28,
    patch_size: int = 14,
    seed: int = 0,
    tie_word_embeddings: bool = False,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A random `(model, processor)` in eval mode, float32; the same seed gives the same weights."""
    processor = tiny_processor(image_size, patch_size)
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_vision_layers,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=hidden,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=tie_word_embeddings,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    return model.eval(), processor


def save_tiny_llava(folder: Path) -> None:
    """The same as a base on the disk."""
    for part in tiny_llava():
        part.save_pretrained(folder)


def random_image(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


QUESTIONS = ("what is this?", "where is the dog?", "read", "what colour is the small cat?")
ANSWERS = ("red", "<loc0003><loc0004>", "a dog on the left", "no")


def tiny_batch(
    processor: LlavaProcessor,
    *,
    questions: Sequence[str] = QUESTIONS,
    answers: Sequence[str] | None = ANSWERS,
    images: Sequence[int] | None = None,
    tasks: Sequence[int] | None = None,
    experts: Sequence[int] | None = None,
    words: Sequence[Sequence[str]] = ((), ("stop",), ("exit", "here"), ()),
    pad: int = 0,
    left: bool = False,
) -> Batch:
    """One sample per question, with one picture each; `answers=None` makes a batch to generate.

    `images` are seeds of the pictures, `pad` adds padding to every padded axis. Tokenised by hand
    and not by the collator: the tests of the model stand without it.
    """
    count, tokenizer = len(questions), processor.tokenizer
    seeds = images if images is not None else range(count)
    pixels = processor.image_processor([random_image(seed) for seed in seeds], return_tensors="pt").pixel_values
    patches = (pixels.shape[-1] // processor.patch_size) ** 2
    rows, labels = [], []
    for i, question in enumerate(questions):
        prompt = tokenizer.encode("USER: " + "<image>" * patches + f"{question} ASSISTANT:")
        answer = tokenizer.encode(f" {answers[i]}</s>") if answers is not None else []
        rows.append(prompt + answer)
        labels.append([-100] * len(prompt) + answer)
    texts = [tokenizer.encode(question) for question in questions]
    length, long_text = max(map(len, rows)) + pad, max(map(len, texts)) + pad
    spelled = [[tokenizer.encode(word) for word in found] for found in list(words)[:count]]
    num_words = max(max(map(len, spelled), default=0), 1) + pad
    num_chars = max((len(ids) for found in spelled for ids in found), default=1) + pad
    ocr_ids = torch.zeros(count, num_words, num_chars, dtype=torch.long)
    ocr_char_mask = torch.zeros(count, num_words, num_chars, dtype=torch.bool)
    for i, found in enumerate(spelled):
        for j, ids in enumerate(found):
            ocr_ids[i, j, : len(ids)] = torch.tensor(ids)
            ocr_char_mask[i, j, : len(ids)] = True
    ocr_mask = ocr_char_mask.any(-1)
    boxes = torch.tensor([0.1, 0.2, 0.5, 0.4]).expand(count, num_words, 4) * ocr_mask[..., None]
    return Batch(
        input_ids=_padded(rows, length, tokenizer.pad_token_id, left),
        attention_mask=_padded([[1] * len(row) for row in rows], length, 0, left),
        labels=_padded(labels, length, -100, left) if answers is not None else None,
        pixel_values=pixels,
        image_index=torch.arange(count),
        text_ids=_padded(texts, long_text, tokenizer.pad_token_id, left),
        text_mask=_padded([[1] * len(text) for text in texts], long_text, 0, left).bool(),
        ocr_ids=ocr_ids,
        ocr_char_mask=ocr_char_mask,
        ocr_boxes=boxes,
        ocr_confidence=0.9 * ocr_mask,
        ocr_mask=ocr_mask,
        task_ids=torch.tensor(tasks if tasks is not None else [i % 3 for i in range(count)]),
        expert_ids=torch.tensor(experts if experts is not None else [i % 3 for i in range(count)]),
        image_mask=torch.ones(count, dtype=torch.bool),
    )


def _padded(rows: Sequence[list[int]], length: int, value: int, left: bool) -> torch.Tensor:
    filled = [[value] * (length - len(row)) for row in rows]
    pairs = zip(filled, rows, strict=True)
    return torch.tensor([f + r if left else r + f for f, r in pairs])
