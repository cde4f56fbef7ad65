"""Tiny random models of every architecture of the family, of the real classes, and their processors.

Built from configs in a fraction of a second, without a download: hidden sizes of 16, two layers.
The processors are put together from their parts around the tokenizer of tests/support/tiny.py.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from moa.backbones.llava import Backbone
from tests.support.tiny import tiny_llava, tiny_tokenizer

TEMPLATE = (  # as most of the hub's: without marks around the answer
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{{ '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def tokenizer_with(**named: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with more special tokens, each an attribute too (image_token=...)."""
    tiny = tiny_tokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=named,
    )


def text_config(tokenizer: PreTrainedTokenizerFast, model_type: str, **more: Any) -> dict[str, Any]:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {**TEXT, "model_type": model_type, "vocab_size": len(tokenizer), **ids, **more}


def siglip(image_size: int) -> dict[str, Any]:
    return {
        **VISION,
        "model_type": "siglip_vision_model",
        "image_size": image_size,
        "patch_size": 14,
        "vision_use_head": False,
    }


def llava_next() -> tuple[Any, Any]:
    tokenizer = tokenizer_with(image_token="<image>")
    grid = [[28, 56], [56, 28], [56, 56]]
    processor = transformers.LlavaNextProcessor(
        image_processor=transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28},
            image_grid_pinpoints=grid,
        ),
        tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE.replace("IMAGE", "<image>\n"),
    )  # fmt: skip
    config = transformers.LlavaNextConfig(
        vision_config={**VISION, "num_hidden_layers": 3, "model_type": "clip_vision_model",
                       "image_size": 28, "patch_size": 14, "projection_dim": 16},
        text_config=text_config(tokenizer, "llama"), image_grid_pinpoints=grid,
        image_token_index=tokenizer.image_token_id,
    )  # fmt: skip
    return config, processor


def llava_onevision() -> tuple[Any, Any]:
    tokenizer = tokenizer_with(image_token="<image>", video_token="<video>")
    grid = [[28, 28], [28, 56], [56, 28], [56, 56]]
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessorPil(
            size={"height": 28, "width": 28}, image_grid_pinpoints=grid
        ),
        tokenizer=tokenizer, video_processor=transformers.LlavaOnevisionVideoProcessor(),
        num_image_tokens=4, vision_feature_select_strategy="full",
        chat_template=TEMPLATE.replace("IMAGE", "<image>\n"),
    )  # fmt: skip
    config = transformers.LlavaOnevisionConfig(
        vision_config=siglip(28), text_config=text_config(tokenizer, "qwen2"),
        image_grid_pinpoints=grid, image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
    )  # fmt: skip
    return config, processor


def qwen(version: str) -> tuple[Any, Any]:
    tokenizer = tokenizer_with(
        image_token="<|image_pad|>", video_token="<|video_pad|>",
        vision_bos_token="<|vision_start|>", vision_eos_token="<|vision_end|>",
    )  # fmt: skip
    start, end = tokenizer.vision_bos_token, tokenizer.vision_eos_token
    name = {"2": "Qwen2VL", "2_5": "Qwen2_5_VL", "3": "Qwen3VL"}[version]
    video = "Qwen3VL" if version == "3" else "Qwen2VL"
    processor = getattr(transformers, f"{name}Processor")(
        image_processor=transformers.Qwen2VLImageProcessorPil(
            patch_size=7, size={"shortest_edge": 14 * 14, "longest_edge": 42 * 42}
        ),
        tokenizer=tokenizer, video_processor=getattr(transformers, f"{video}VideoProcessor")(),
        chat_template=TEMPLATE.replace("IMAGE", f"{start}<|image_pad|>{end}"),
    )  # fmt: skip
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 7, "hidden_size": 16}
    if version == "2":
        vision |= {"embed_dim": 16, "mlp_ratio": 2}
    else:
        vision |= {"out_hidden_size": 16, "intermediate_size": 32}
    if version == "2_5":
        vision |= {"window_size": 28, "fullatt_block_indexes": [1]}
    if version == "3":
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 36}
    text_type = {"2": "qwen2_vl_text", "2_5": "qwen2_5_vl_text", "3": "qwen3_vl_text"}[version]
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision, text_config=text_config(tokenizer, text_type, rope_parameters=rope),
        image_token_id=tokenizer.image_token_id, video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_bos_token_id,
        vision_end_token_id=tokenizer.vision_eos_token_id,
    )  # fmt: skip
    return config, processor


def idefics(name: str) -> tuple[Any, Any]:
    corners = {f"cell_{i}_{j}": f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)}
    tokenizer = tokenizer_with(
        image_token="<image>", fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>", end_of_utterance_token="<end_of_utterance>", **corners,
    )  # fmt: skip
    video = {"video_processor": transformers.SmolVLMVideoProcessor()} if name == "SmolVLM" else {}
    processor = getattr(transformers, f"{name}Processor")(
        image_processor=getattr(transformers, f"{name}ImageProcessorPil")(
            size={"longest_edge": 56}, max_image_size={"longest_edge": 28}
        ),
        tokenizer=tokenizer, image_seq_len=4, **video,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )  # fmt: skip
    config = getattr(transformers, f"{name}Config")(
        vision_config={**VISION, "image_size": 28, "patch_size": 7},
        text_config=text_config(tokenizer, "llama"), scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return config, processor


def paligemma() -> tuple[Any, Any]:
    tokenizer = tokenizer_with(image_token="<image>")
    image_processor = transformers.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    image_processor.image_seq_length = 4
    processor = transformers.PaliGemmaProcessor(image_processor=image_processor, tokenizer=tokenizer)
    config = transformers.PaliGemmaConfig(
        vision_config={**siglip(28), "projection_dim": 16},
        text_config=text_config(tokenizer, "gemma2", final_logit_softcapping=3.0, query_pre_attn_scalar=8),
        image_token_index=tokenizer.image_token_id, projection_dim=16, hidden_size=16,
        vocab_size=len(tokenizer),
    )  # fmt: skip
    return config, processor


def internvl() -> tuple[Any, Any]:
    tokenizer = tokenizer_with(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )  # fmt: skip
    processor = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessorPil(
            size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=4
        ),
        tokenizer=tokenizer, video_processor=transformers.InternVLVideoProcessor(),
        image_seq_length=4, chat_template=TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>\n"),
    )  # fmt: skip
    config = transformers.InternVLConfig(
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [7, 7]},
        text_config=text_config(tokenizer, "qwen2"),
        image_token_id=tokenizer.context_image_token_id, image_seq_length=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    return config, processor


def gemma3() -> tuple[Any, Any]:
    tokenizer = tokenizer_with(
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"
    )
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
        tokenizer=tokenizer, image_seq_length=4,
        chat_template=TEMPLATE.replace("IMAGE", "<start_of_image>"),
    )  # fmt: skip
    config = transformers.Gemma3Config(
        vision_config=siglip(28), mm_tokens_per_image=4,
        text_config=text_config(tokenizer, "gemma3_text", sliding_window=64,
                                layer_types=["sliding_attention", "full_attention"]),
        image_token_index=tokenizer.image_token_id, boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )  # fmt: skip
    return config, processor


CONFIGS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": lambda: qwen("2"),
    "qwen2_5_vl": lambda: qwen("2_5"),
    "qwen3_vl": lambda: qwen("3"),
    "idefics3": lambda: idefics("Idefics3"),
    "smolvlm": lambda: idefics("SmolVLM"),
    "paligemma": paligemma,
    "internvl": internvl,
    "gemma3": gemma3,
}
NAMES = ("llava", *CONFIGS)


def tiny_family(name: str, seed: int = 0) -> Backbone:
    """A random frozen backbone in eval mode, float32; the same seed gives the same weights."""
    if name == "llava":
        model, processor = tiny_llava(hidden=16, seed=seed)
        return Backbone(model=model.requires_grad_(False), processor=processor, name=name)
    config, processor = CONFIGS[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForImageTextToText.from_config(config)
        if name == "gemma3":  # starts at zero, and no gradient would reach the tower
            torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return Backbone(model=model.eval().requires_grad_(False), processor=processor, name=name)
