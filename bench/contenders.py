"""What one could train instead of the mixture, on the same random LLaVA, batch and loss.

frozen     the model alone, with the gradient of its embeddings
lora       PEFT LoRA of the experts' total rank
loop       our gates, one expert after the other (as LoRAMoE, HydraLoRA and CoIN compute it)
xlora      PEFT X-LoRA with trainable adapters
crosstalk  ours, with the penalty of losses.crosstalk
tokens     ours, each token routed by one router for each block
per-sample PEFT's `adapter_names`: a LoRA for each sample, one after the other. PEFT refuses it
           in training mode; there is no dropout here, so that evaluation mode computes the same
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, XLoraConfig, get_peft_model
from torch import Tensor, nn

from bench.bench_model import make_backbone, make_batch, make_mixture, race, ratio, saved_bytes
from bench.settings import Setting
from data.batch import Batch
from moa.backbones.llava import Backbone
from moa.experts.bank import ExpertBank
from moa.experts.crosstalk import Watch
from moa.experts.penalties import PENALTIES
from moa.experts.rank_gates import RankGates
from moa.experts.ties import Ties
from moa.model import LanguageMixture, MixtureModel


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A model with its loss on the batch."""

    model: nn.Module
    loss: Callable[[], Tensor]
    setting: Setting

    def forward(self) -> Tensor:
        """The loss, in bf16 under autocast as the training loop has it."""
        bf16 = self.setting.dtype == torch.bfloat16
        with torch.autocast(self.setting.device, torch.bfloat16, enabled=bf16):
            return self.loss()

    def stepper(self) -> Callable[[], None]:
        """One optimiser step: forward, backward, AdamW."""
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5, fused=True)

        def step() -> None:
            self.forward().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step


def backbone_of(setting: Setting) -> Backbone:
    return make_backbone(setting.size, setting.device, setting.dtype, shared=True)


def ours(setting: Setting) -> Contender:
    return _contender(_mixture(setting), setting)


def crosstalk(setting: Setting) -> Contender:
    def loss(model: Any, batch: Batch) -> Tensor:
        model.bank.context.watch = Watch(sites=frozenset(model.bank.sites), gradient=True)
        output = model(batch)
        return _mean(output) + 0.1 * output.aux["crosstalk"]

    return _contender(_mixture(setting), setting, loss)


def penalties(setting: Setting) -> Contender:
    """With the losses of moa/experts/penalties.py."""
    names = tuple(PENALTIES)

    def loss(model: Any, batch: Batch) -> Tensor:
        watch = Watch(sites=frozenset(), gradient=True, penalties=names, routed=frozenset(model.bank.names))
        model.bank.context.watch = watch
        output = model(batch)
        return _mean(output) + sum(0.1 * output.aux[name] for name in names)

    return _contender(_mixture(setting), setting, loss)


def ranks(setting: Setting) -> Contender:
    """Each token keeps an eighth of an expert's ranks at each layer."""
    model = _mixture(setting)
    for name in model.bank.names:
        model.bank.gate_ranks(name, RankGates(kind="token", keep=max(setting.rank // 8, 1)))
    return _contender(model, setting)


def tokens(setting: Setting) -> Contender:
    return _contender(_mixture(setting, share="block"), setting)


def frozen(setting: Setting) -> Contender:
    model = without_bank(backbone_of(setting))
    probe = nn.Parameter(torch.zeros((), device=setting.device))
    model.model.get_input_embeddings().register_forward_hook(lambda m, args, out: out + probe.to(out.dtype))
    model.register_parameter("embedding_probe", probe)
    return _plain(model, setting)


def lora(setting: Setting) -> Contender:
    backbone = backbone_of(setting)
    config = LoraConfig(r=setting.rank * setting.num_experts, target_modules=setting.targets)
    peft: Any = get_peft_model(backbone.model, config).base_model
    return _plain(without_bank(replace(backbone, model=peft.model)), setting)


def loop(setting: Setting) -> Contender:
    model = _mixture(setting)
    loops = []
    for name, site in model.bank.sites.items():
        loops.append(LoopLinear(site.base_layer, setting.num_experts, setting.rank))
        model.model.set_submodule(name, loops[-1].to(setting.device))

    def loss(model: Any, batch: Batch) -> Tensor:
        gates = model.compute_gates(batch).gates  # decided per sample
        for layer in loops:
            layer.gates = gates
        return _mean(model(batch, gates))

    return _contender(model, setting, loss)


def xlora(setting: Setting) -> Contender:
    """On the language model, called as PEFT wants it."""
    batch = make_batch(setting.size, setting.device)
    with tempfile.TemporaryDirectory() as folder:
        config = LoraConfig(r=setting.rank, target_modules=setting.targets, init_lora_weights=False)
        get_peft_model(backbone_of(setting).model, config).save_pretrained(folder)
        base = backbone_of(setting).model
        base.config.use_cache = False
        gated: dict[str, Any] = {"task_type": "CAUSAL_LM", "use_trainable_adapters": True}
        gated |= {"adapters": {str(i): folder for i in range(setting.num_experts)}}
        mixed = XLoraConfig(hidden_size=setting.size.width, xlora_depth=1, **gated)
        model = get_peft_model(base, mixed).to(setting.device).train()
    inputs: dict[str, Any] = {key: getattr(batch, key) for key in ("input_ids", "attention_mask")}
    inputs |= {"pixel_values": batch.pixel_values.to(setting.dtype), "labels": batch.labels}
    return Contender(model=model, loss=lambda: model(**inputs).loss, setting=setting)


def per_sample(setting: Setting) -> Contender:
    """Each sample has one adapter: less arithmetic than a mixture, and no gates to learn."""
    backbone = backbone_of(setting)
    config = LoraConfig(r=setting.rank, target_modules=setting.targets)
    peft: Any = get_peft_model(backbone.model, config, adapter_name="0")
    for i in range(1, setting.num_experts):
        peft.add_adapter(str(i), config)
    names = [str(i % setting.num_experts) for i in range(setting.size.batch)]
    for name, parameter in peft.named_parameters():  # PEFT trains the active one alone
        parameter.requires_grad_("lora_" in name)
    plain = _plain(without_bank(replace(backbone, model=peft.base_model.model)), setting)
    peft.eval()  # in training mode PEFT refuses adapter_names

    def loss() -> Tensor:
        with peft.base_model._enable_peft_forward_hooks(adapter_names=names):
            return plain.loss()

    return replace(plain, loss=loss)


CONTENDERS = {
    f.__name__.replace("_", "-"): f
    for f in (frozen, lora, ours, crosstalk, penalties, ranks, tokens, loop, xlora, per_sample)
}


class LoopLinear(nn.Module):
    """The mixture as most of the field computes it: one expert after the other, gated at the end."""

    def __init__(self, base: nn.Linear, num_experts: int, rank: int) -> None:
        super().__init__()
        self.base = base
        shape_a, shape_b = (rank, base.in_features), (base.out_features, rank)
        self.a = nn.ParameterList([torch.randn(shape_a) * 0.02 for _ in range(num_experts)])
        self.b = nn.ParameterList([torch.randn(shape_b) * 0.02 for _ in range(num_experts)])
        self.gates = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        for i, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            out = out + self.gates[:, :, i : i + 1] * F.linear(F.linear(x, a), b)
        return out


def without_bank(backbone: Backbone) -> MixtureModel:
    """A MixtureModel whose bank has no experts: our forward and loss, and none of our layers."""
    bank = ExpertBank.attach(backbone.model, [r"model\.multi_modal_projector\.linear_1"])
    return LanguageMixture(backbone, bank, kind="fixed")


def _mixture(setting: Setting, share: str | None = None) -> MixtureModel:
    sizes = backbone_of(setting), setting.num_experts, setting.rank, setting.device, setting.targets
    return make_mixture(*sizes, share)


def _plain(model: MixtureModel, setting: Setting) -> Contender:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return _contender(model.to(setting.device), setting)


def _mean(output: Any) -> Tensor:
    return output.loss_per_sample.mean()


def _contender(
    model: MixtureModel,
    setting: Setting,
    loss: Callable[[Any, Batch], Tensor] = lambda model, batch: _mean(model(batch)),
) -> Contender:
    if setting.checkpointing:
        model.enable_gradient_checkpointing()
    batch = make_batch(setting.size, setting.device)
    return Contender(model=model.train(), loss=partial(loss, model, batch), setting=setting)


def measure_layer(setting: Setting, rounds: int) -> tuple[dict[str, dict[str, float]], float]:
    """Milliseconds and saved MiB of one linear layer, forward and backward; its ratio to LoRA."""
    torch.manual_seed(0)
    size, rank, count = setting.size, setting.rank, setting.num_experts
    device, dtype, width = setting.device, setting.dtype, setting.size.width
    base = nn.Linear(width, width).requires_grad_(False).to(device, dtype)
    banks, own = {}, {}
    for name in ("ours", "shared A"):
        holder = nn.ModuleDict({"site": base})
        banks[name] = ExpertBank.attach(holder, ["site"])
        for i in range(count):
            banks[name].add(f"expert{i}", rank=rank, alpha=rank)
        own[name] = holder["site"]
    if count > 1:
        banks["shared A"].tie({name: Ties(share_a="all") for name in banks["shared A"].names})
    plain = nn.Linear(width, width).requires_grad_(False).to(dtype)
    config = LoraConfig(r=rank * count, target_modules=["site"])
    peft = get_peft_model(nn.ModuleDict({"site": plain}), config)  # type: ignore[arg-type]
    lora = peft.get_submodule("base_model.model.site").to(device)
    loop = LoopLinear(base, count, rank).to(device)
    layers = {"frozen": base, "lora": lora, "loop": loop, **own}
    shape = size.batch, size.image_tokens + size.prompt + size.answer, width
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    loop.gates = gates = torch.rand(size.batch, 1, count, device=device, requires_grad=True)
    grad = torch.randn(shape, device=device, dtype=dtype)

    def run(name: str) -> Tensor:
        if name in banks:
            banks[name].set_gates(gates)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return layers[name](x).to(dtype)

    steps = {name: lambda name=name: run(name).backward(grad) for name in layers}
    seconds = race(steps, rounds, device)
    owned = [p for layer in layers.values() for p in layer.parameters()]
    memory = {name: saved_bytes(partial(run, name), owned) for name in layers}
    found = {n: {"ms": min(seconds[n]) * 1e3, "MiB": memory[n] / 2**20} for n in layers}
    return found, ratio(seconds, "ours", "lora")
