"""A tiny random LLaVA of the real classes: what every test of the model stands on.

Built from configs in a fraction of a second, without a download. `vision_feature_layer=-2` leaves
the last vision layer unused, as in the LLaVA checkpoints people have.
"""

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
    image_processor = ClipImageProcessor(
        size={"height": image_size, "width": image_size}, do_center_crop=False
    )
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


def random_image(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


if __name__ == "__main__":
    model, processor = tiny_llava()
    message = {
        "role": "user",
        "content": [{"type": "image", "image": random_image(0)}, {"type": "text", "text": "what?"}],
    }
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red <loc0003>"}]}
    batch = processor.apply_chat_template(
        [[message, answer]] * 2,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True},
    )
    mask = torch.as_tensor(batch.pop("assistant_masks")).bool()
    print({k: tuple(v.shape) for k, v in batch.items()})
    print(repr(processor.tokenizer.decode(batch["input_ids"][0][mask[0]])))
    print(processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0]))
    out = model(**batch, labels=batch["input_ids"].masked_fill(~mask, -100))
    print(out.loss, sum(p.numel() for p in model.parameters()))
