"""What the speed benchmarks share: a random LLaVA of a chosen size, a batch for it, and clocks."""

import time
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from bench.settings import TARGETS, Size
from data.batch import Batch
from moa.backbones.llava import Backbone
from moa.experts.bank import ExpertBank
from moa.model import LanguageMixture, MixtureModel
from moa.routing.router import Router

PAD, IMAGE, BEGIN, END = range(4)


def make_backbone(size: Size, device: str, dtype: torch.dtype, *, shared: bool = False) -> Backbone:
    """A random frozen LLaVA, always the same; `shared` weights are in memory once, for models never written to."""
    torch.manual_seed(0)
    model = _make_model(size, device, dtype)
    if shared:  # strict: every weight is replaced, and the model's own are freed
        model.load_state_dict(_weights(size, device, dtype), assign=True)
    backbone = Backbone(model=model.requires_grad_(False).eval(), processor=None)
    vars(backbone)["_end"] = END  # the token that ends an answer, else read off the processor
    return backbone


@lru_cache(maxsize=1)
def _weights(size: Size, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return _make_model(size, device, dtype).state_dict()


def _make_model(size: Size, device: str, dtype: torch.dtype) -> nn.Module:
    side = int(size.image_tokens**0.5)
    vision = CLIPVisionConfig(
        image_size=14 * side, patch_size=14, num_hidden_layers=size.vision_layers,
        hidden_size=size.vision_width, intermediate_size=4 * size.vision_width,
        num_attention_heads=size.vision_heads,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=size.vocab, hidden_size=size.width, intermediate_size=size.mlp,
        num_hidden_layers=size.layers, num_key_value_heads=size.heads,
        num_attention_heads=size.heads, pad_token_id=PAD, bos_token_id=BEGIN, eos_token_id=END,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE,
        image_seq_length=side**2, vision_feature_layer=-1,
    )  # fmt: skip
    with torch.device(device):
        model: nn.Module = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    return model


def make_batch(size: Size, device: str, *, generate: bool = False) -> Batch:
    """Random prompts with one image each, and answers unless they are to be generated."""
    generator = torch.Generator().manual_seed(1)

    def ids(*shape: int) -> Tensor:
        return torch.randint(4, size.vocab, shape, generator=generator)

    side, count = int(size.image_tokens**0.5), size.batch
    answer = 0 if generate else size.answer
    prompt = torch.cat([torch.full((count, side**2), IMAGE), ids(count, size.prompt + answer)], 1)
    labels = prompt.clone()
    labels[:, : side**2 + size.prompt] = -100
    return Batch(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        labels=None if generate else labels,
        pixel_values=torch.randn(count, 3, 14 * side, 14 * side, generator=generator),
        image_index=torch.arange(count),
        text_ids=ids(count, 16),
        text_mask=torch.ones(count, 16, dtype=torch.bool),
        ocr_ids=ids(count, 4, 6),
        ocr_char_mask=torch.ones(count, 4, 6, dtype=torch.bool),
        ocr_boxes=torch.rand(count, 4, 4, generator=generator),
        ocr_confidence=torch.ones(count, 4),
        ocr_mask=torch.ones(count, 4, dtype=torch.bool),
        task_ids=torch.arange(count) % 4,
        expert_ids=torch.arange(count) % 2,
        image_mask=torch.ones(count, dtype=torch.bool),
    ).to(device)


def make_mixture(
    backbone: Backbone, num_experts: int, rank: int, device: str, targets: str = TARGETS, share: str | None = None
) -> MixtureModel:
    """Experts with values in B, as after training, and the whole router before them; with `share` token routers."""
    bank = ExpertBank.attach(backbone.model, [targets], stream_of=backbone.stream_of)
    for i in range(num_experts):
        bank.add(f"expert{i}", rank=rank, alpha=rank)
    for site in bank.sites.values():
        for b in site.lora_B.values():
            torch.nn.init.normal_(b, std=0.02)
    if share is not None:
        bank.add_token_routers(share=share)
        return LanguageMixture(backbone, bank, kind="softmax", granularity="token").to(device)
    router = Router(experts=num_experts, sites=len(bank.sites), dims=backbone.dims, num_tasks=4)
    return LanguageMixture(backbone, bank, router, kind="softmax").to(device)


def clock(device: str) -> float:
    """Seconds; of this process's own work where it has one thread, so that others do not count."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def race(runs: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each run in each round, the runs taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):  # the first one warms up
        for name, run in runs.items():
            start = clock(device)
            run()
            if turn:
                seconds[name].append(clock(device) - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], one: str, other: str) -> float:
    """Median over the rounds of one run's time over another's: what slows a round slows both."""
    return median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def ratios(seconds: Mapping[str, list[float]], pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    return {f"{one} / {other}": ratio(seconds, one, other) for one, other in pairs}


def saved_bytes(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes kept for the backward pass, each storage once, parameters left out."""
    skip = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        held = tensor.detach()  # its history would keep the graph alive, which holds this function
        storage = held.untyped_storage()
        if storage.data_ptr() not in skip:
            kept[storage.data_ptr()] = storage.nbytes(), held
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    size = sum(nbytes for nbytes, _ in kept.values())
    del out
    return size


def peak_bytes(step: Callable[[], object]) -> int:
    """The most memory that a step holds on a GPU, all models on it included."""
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def flops_of(step: Callable[[], object]) -> int:
    """Floating point operations of a step, attention and products alone."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Floating point operations per second of one large matrix product."""
    width = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    seconds = race({"product": lambda: a @ b}, 5, device)
    return 2 * width**3 / min(seconds["product"])
