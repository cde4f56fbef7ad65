"""Training speed and activation memory of the mixture, against what else one could run.

    python benchmarks/mixture.py [--size small|large] [--device cpu|cuda] [--dtype fp32|bf16]

One expert layer, and one whole training step (router, forward, backward, AdamW), beside the frozen
model, PEFT LoRA of the same total rank, a loop over experts (as LoRAMoE, HydraLoRA and CoIN
compute it) and PEFT X-LoRA. The last line is JSON; ratios are ours over theirs, the worst over all
numbers of experts.
"""

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, XLoraConfig, get_peft_model
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.bench_model import (
    DTYPES,
    SIZES,
    TARGETS,
    Size,
    make_backbone,
    make_batch,
    make_mixture,
    make_parser,
    race,
    ratio,
    saved_bytes,
    where,
)
from moa.backbones.llava import Backbone
from moa.experts import ExpertBank
from moa.model import MixtureModel


class LoopLinear(nn.Module):
    """The mixture as most of the field computes it: one expert after the other, gated at the end."""

    def __init__(
        self, base: nn.Module, num_experts: int, rank: int, width: tuple[int, int]
    ) -> None:
        super().__init__()
        self.base = base
        self.a = nn.ParameterList([torch.randn(rank, width[0]) * 0.02 for _ in range(num_experts)])
        self.b = nn.ParameterList([torch.randn(width[1], rank) * 0.02 for _ in range(num_experts)])
        self.gates = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        for i, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            out = out + self.gates[:, :, i : i + 1] * F.linear(F.linear(x, a), b)
        return out


def peft_layer(base: nn.Linear, rank: int) -> nn.Module:
    """One LoRA of the given rank as PEFT computes it, without dropout."""
    config = LoraConfig(r=rank, target_modules=["site"])
    model = get_peft_model(nn.ModuleDict({"site": base}), config)  # type: ignore[arg-type]
    return model.get_submodule("base_model.model.site")


def layer_figures(
    num_experts: int, rank: int, size: Size, device: str, rounds: int
) -> dict[str, dict[str, float]]:
    """Milliseconds and saved MiB of one linear layer, forward and backward."""
    torch.manual_seed(0)
    width = size.width
    base = nn.Linear(width, width).requires_grad_(False).to(device)
    holder = nn.ModuleDict({"site": base})
    bank = ExpertBank.attach(holder, ["site"])
    for i in range(num_experts):
        bank.add(f"expert{i}", rank=rank, alpha=rank)
    lora = peft_layer(nn.Linear(width, width).requires_grad_(False), rank * num_experts)
    loop = LoopLinear(base, num_experts, rank, (width, width))
    layers = {
        "frozen": base,
        "lora": lora.to(device),
        "ours": holder["site"],
        "loop": loop.to(device),
    }
    tokens = size.image_tokens + size.prompt + size.answer
    x = torch.randn(size.batch, tokens, width, device=device, requires_grad=True)
    gates = torch.rand(size.batch, 1, num_experts, device=device, requires_grad=True)
    loop.gates = gates
    grad = torch.randn(size.batch, tokens, width, device=device)

    def run(name: str) -> Tensor:
        bank.set_gates(gates)
        return layers[name](x)

    def step(name: str) -> Callable[[], None]:
        return lambda: run(name).backward(grad)

    seconds = race({name: step(name) for name in layers}, rounds, device)
    owned = [p for layer in layers.values() for p in layer.parameters()]
    memory = {name: saved_bytes(partial(run, name), owned) for name in layers}
    return {n: {"ms": min(seconds[n]) * 1e3, "MiB": memory[n] / 2**20} for n in layers}


def training_step(
    loss: Callable[[], Tensor], model: nn.Module, dtype: torch.dtype, device: str
) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """(one optimiser step, its forward pass) of a model on its loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True) if trained else None

    def forward() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return loss()

    def step() -> None:
        forward().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step, forward


def plain_loss(model: MixtureModel, size: Size, device: str) -> Callable[[], Tensor]:
    """The same forward and loss without experts of ours: for the frozen model, LoRA and the loop."""
    batch = make_batch(size, device)
    return lambda: model(batch).loss_per_sample.mean()


def without_bank(backbone: Backbone) -> MixtureModel:
    """A MixtureModel whose bank has no experts: our forward and loss, and none of our layers."""
    bank = ExpertBank.attach(backbone.model, [r"model\.multi_modal_projector\.linear_1"])
    return MixtureModel(backbone, bank, kind="fixed")


def step_runs(
    num_experts: int, rank: int, size: Size, device: str, dtype: torch.dtype
) -> dict[str, tuple[Callable[[], None], Callable[[], Tensor]]]:
    """Each contender's step and forward pass, on the same batch and with the same loss."""
    batch = make_batch(size, device)
    runs = {}

    frozen = without_bank(make_backbone(size, device, dtype))
    probe = nn.Parameter(torch.zeros((), device=device))  # asks for the gradient of the embeddings
    embed = frozen.model.get_input_embeddings()
    embed.register_forward_hook(lambda m, args, out: out + probe.to(out.dtype))
    frozen.register_parameter("probe", probe)
    runs["frozen"] = training_step(plain_loss(frozen, size, device), frozen, dtype, device)

    backbone = make_backbone(size, device, dtype)
    config = LoraConfig(r=rank * num_experts, target_modules=TARGETS)
    lora = without_bank(
        replace(backbone, model=get_peft_model(backbone.model, config).base_model.model)
    )
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    lora.train()
    runs["lora"] = training_step(plain_loss(lora, size, device), lora, dtype, device)

    ours = make_mixture(make_backbone(size, device, dtype), num_experts, rank, device).train()
    runs["ours"] = training_step(lambda: ours(batch).loss_per_sample.mean(), ours, dtype, device)
    return runs


def loop_run(
    num_experts: int, rank: int, size: Size, device: str, dtype: torch.dtype
) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """Our router and gates, with the loop in place of our layers."""
    model = make_mixture(make_backbone(size, device, dtype), num_experts, rank, device)
    loops = []
    for name, site in model.bank.sites.items():
        base = site.base_layer
        width = base.in_features, base.out_features
        loops.append(LoopLinear(base, num_experts, rank, width).to(device))
        model.model.set_submodule(name, loops[-1])
    batch = make_batch(size, device)

    def loss() -> Tensor:
        gates = model.compute_gates(batch).gates
        assert gates is not None  # they are decided per sample
        for loop in loops:
            loop.gates = gates
        return model(batch, gates).loss_per_sample.mean()

    return training_step(loss, model.train(), dtype, device)


def xlora_run(
    num_experts: int, rank: int, size: Size, device: str, dtype: torch.dtype
) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """PEFT X-LoRA with trainable adapters, on the language model, called as PEFT wants it."""
    batch = make_batch(size, device)
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for i in range(num_experts):
            config = LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False)
            adapter = get_peft_model(make_backbone(size, device, dtype).model, config)
            adapter.save_pretrained(f"{folder}/{i}")
            paths[str(i)] = f"{folder}/{i}"
        base = make_backbone(size, device, dtype).model
        base.config.use_cache = False
        xlora = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=size.width,
            xlora_depth=1,
            adapters=paths,
            use_trainable_adapters=True,
        )
        model = get_peft_model(base, xlora).to(device).train()

    def loss() -> Tensor:
        return model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            pixel_values=batch.pixel_values.to(dtype),
            labels=batch.labels,
        ).loss

    return training_step(loss, model, dtype, device)


def print_row(label: str, values: dict[str, float]) -> None:
    print(f"{label:34s}" + "".join(f"{name} {value:9.2f}   " for name, value in values.items()))


def main() -> None:
    warnings.simplefilter("ignore")  # PEFT and transformers disagree on names
    parser = make_parser(__doc__, experts=[2, 4, 8, 16, 32, 64], rounds=8)
    parser.add_argument(
        "--slow-experts",
        type=int,
        default=4,
        help="the loop and X-LoRA run for numbers of experts up to this",
    )
    arguments = parser.parse_args()
    size, device, dtype = SIZES[arguments.size], arguments.device, DTYPES[arguments.dtype]
    print(f"{size}, {device}, {arguments.dtype}, {torch.get_num_threads()} threads")

    activations, to_lora, memory = [], [], []
    to_loop: dict[int, float] = {}
    to_xlora: dict[int, float] = {}
    for count in arguments.experts:
        layer = layer_figures(count, arguments.rank, size, device, arguments.rounds)
        for name, values in layer.items():
            print_row(f"layer, {count} experts, {name}", values)
        activations.append(layer["ours"]["MiB"] / layer["lora"]["MiB"])

        runs = step_runs(count, arguments.rank, size, device, dtype)
        if count <= arguments.slow_experts:
            runs["loop"] = loop_run(count, arguments.rank, size, device, dtype)
            runs["xlora"] = xlora_run(count, arguments.rank, size, device, dtype)
        seconds = race({name: step for name, (step, _) in runs.items()}, arguments.rounds, device)
        saved = {n: saved_bytes(forward, ()) / 2**20 for n, (_, forward) in runs.items()}
        for name in runs:
            print_row(
                f"step, {count} experts, {name}",
                {"ms": min(seconds[name]) * 1e3, "MiB": saved[name]},
            )
        to_lora.append(ratio(seconds, "ours", "lora"))
        memory.append(saved["ours"] / saved["lora"])
        if "loop" in seconds:
            to_loop[count] = ratio(seconds, "ours", "loop")
        if "xlora" in seconds:
            to_xlora[count] = ratio(seconds, "ours", "xlora")
        print_row(f"{count} experts, ours over", {"lora": to_lora[-1]})
    figures = {
        "step_vs_lora": max(to_lora),
        "step_vs_xlora": max(to_xlora.values(), default=None),
        "step_vs_loop": max(to_loop.values(), default=None),
        "activations_vs_lora": max(activations),
        "step_activations_vs_lora": max(memory),
        "step_vs_lora_by_experts": dict(zip(arguments.experts, to_lora, strict=True)),
        "step_vs_xlora_by_experts": to_xlora,
        **where(arguments),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
