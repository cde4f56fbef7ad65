"""A model before it runs: how its parameters are spread over layers."""

from dataclasses import dataclass

from torch import Tensor, nn

from moa.model import MixtureModel
from moa.planning.step import bytes_of

SMALL = 1e5  # numbers: stage3_param_persistence_threshold, below which DeepSpeed cuts nothing
# Bytes of a weight, with the scales of its blocks: QLoRA (arXiv:2305.14314), section 3; LLM.int8()
QUANTIZED = {"4bit": 0.5 + 0.127 / 8, "8bit": 1.0}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Numbers are parameters, bytes are theirs as stored."""

    numbers: int
    trained_numbers: int
    base_bytes: int
    all_bytes: int
    small_bytes: int  # of parameters that ZeRO-3 leaves whole
    largest_layer: int  # bytes of one block of the language model or the tower
    outside_layers: int  # bytes of embeddings, output layer, projector, router
    unpacking: int  # bytes of the widest weight, unpacked from 4 or 8 bits while it is used


def shape_of(model: MixtureModel, quantization: str | None = None) -> ModelShape:
    """The shape of a model whose trained parameters require gradients."""
    every, unpacking = [*model.parameters()], 0
    base = bytes_of(p for p in every if not p.requires_grad)
    if quantization is not None:
        packed = [*packed_weights(model)]
        base -= sum(p.nbytes - round(p.numel() * QUANTIZED[quantization]) for p in packed)
        unpacking = max(p.nbytes for p in packed)
    trained = [p for p in every if p.requires_grad]
    layers = [bytes_of(layer.parameters()) for layer in layers_of(model)]
    return ModelShape(
        numbers=sum(p.numel() for p in every),
        trained_numbers=sum(p.numel() for p in trained),
        base_bytes=base,
        all_bytes=base + bytes_of(trained),
        small_bytes=bytes_of(p for p in every if p.numel() < SMALL),
        largest_layer=max(layers, default=0),
        outside_layers=bytes_of(every) - sum(layers),
        unpacking=unpacking,
    )


def layers_of(model: MixtureModel) -> list[nn.Module]:
    """The blocks that transformers names as not to be split: what FSDP2 gathers one by one."""
    names = model.model._no_split_modules or ()
    return [module for module in model.model.modules() if type(module).__name__ in names]


def packed_weights(model: MixtureModel) -> list[Tensor]:
    """What bitsandbytes packs: the weights of the base's linear layers, without the output layer."""
    head = model.model.get_output_embeddings()
    layers = (module for module in model.model.modules() if isinstance(module, nn.Linear))
    return [layer.weight for layer in layers if layer is not head]
