"""The tiny LLaVA itself: tokenizer, processor, and a model with its first weights."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_SIZE, PATCH, WIDTH, LAYERS, NUM_BINS = 96, 12, 192, 4, 32
NUM_PATCHES = (IMAGE_SIZE // PATCH) ** 2
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>' }}"
    "{% elif m['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + c['text'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ c['text'] + '\nanswer:' }}{% endif %}{% endfor %}{% endfor %}"
)


def byte_level(texts: list[str], *, blank: bool, **options: Any) -> Tokenizer:
    """Byte-level BPE over texts; `blank`: one is put before each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=blank)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False, **options)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Over the questions' words; capitals, as on signs, stay single characters."""
    special = ["<pad>", "<s>", "</s>"]
    tokenizer = byte_level(texts, blank=False, vocab_size=800, min_frequency=4, special_tokens=special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        model_max_length=512,
    )  # fmt: skip
    fast.add_tokens([AddedToken(f"<loc{i:04d}>", normalized=False) for i in range(NUM_BINS)])
    fast.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    fast.image_token = "<image>"
    return fast


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Images are squeezed to a square, so that boxes keep their place in parts of the side."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, do_center_crop=False), tokenizer=tokenizer,
        patch_size=PATCH, chat_template=CHAT_TEMPLATE, num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )  # fmt: skip


def cut_layers(model: Any, count: int) -> None:
    """Leave the first layers of the language model alone; they need training before they answer."""
    language = model.model.language_model
    language.layers = language.layers[:count]
    language.config.num_hidden_layers = model.config.text_config.num_hidden_layers = count


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=6, image_size=IMAGE_SIZE, patch_size=PATCH, projection_dim=WIDTH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=512,
        num_hidden_layers=LAYERS, num_attention_heads=6, num_key_value_heads=6,
        max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.05,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_seq_length=NUM_PATCHES,
        image_token_index=int(tokenizer.convert_tokens_to_ids("<image>")),  # type: ignore[arg-type]
        vision_feature_layer=-1, vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    # Equal queries and keys: a token first attends to tokens like its own (Trockman & Kolter 2023, section 3)
    for layer in model.model.language_model.layers:
        attention: Any = layer.self_attn
        attention.q_proj.weight.data.copy_(attention.k_proj.weight.data)
    return model
