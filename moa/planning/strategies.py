"""How each configuration of configs/accelerate/ spreads a step over devices: memory and traffic.

    single    everything on one device
    ddp       everything on each; gradients are summed once a step
    zero2     gradients and AdamW's moments are cut into a piece per device
    zero3     the parameters too, frozen ones included: gathered again for every forward and backward
    zero3_offload  the host's memory holds those pieces
    fsdp2     as zero3 by PyTorch itself: a layer is gathered as a whole, the next one while it runs,
              and gradients stay whole until the last micro-batch
    multi_node  is ddp over several machines

What is gathered or buffered follows the defaults of DeepSpeed (zero/config.py) and of FSDP2.
"""

from dataclasses import asdict, dataclass

from torch import Tensor, nn

from moa.model import MixtureModel
from moa.planning.step import StepCosts, bytes_of

GATHERED = 1.05e9  # parameters: stage3_max_live_parameters, stage3_prefetch_bucket_size
BUCKET = 5e8  # numbers: reduce_bucket_size, allocated whole, whatever the model's size
FP32 = 4
SMALL = 1e5  # numbers: stage3_param_persistence_threshold, below which DeepSpeed cuts nothing
# Bytes of a weight, with the scales of its blocks: QLoRA (arXiv:2305.14314), section 3; LLM.int8()
QUANTIZED = {"4bit": 0.5 + 0.127 / 8, "8bit": 1.0}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
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


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """What is cut into a piece per device, by which library, and where the pieces are stored."""

    cuts_moments: bool = False
    cuts_gradients: bool = False
    cuts_parameters: bool = False
    deepspeed: bool = False
    offloads: bool = False
    alone: bool = False  # makes sense on one device
    together: bool = True  # makes sense on several


PIECES = {"cuts_moments": True, "cuts_gradients": True, "deepspeed": True}
# In order of what they send: the first one that fits is the one to use.
STRATEGIES = {
    "single": Strategy(alone=True, together=False),
    "ddp": Strategy(),
    "zero2": Strategy(**PIECES),
    "fsdp2": Strategy(cuts_moments=True, cuts_parameters=True),
    "zero3": Strategy(**PIECES, cuts_parameters=True),
    "zero3_offload": Strategy(**PIECES, cuts_parameters=True, offloads=True, alone=True),
}


def offered(num_devices: int, quantized: bool) -> list[str]:
    """Strategies for so many devices; bitsandbytes' weights cannot be cut as they are loaded here."""
    return [
        name
        for name, strategy in STRATEGIES.items()
        if (strategy.alone if num_devices == 1 else strategy.together) and not (quantized and strategy.cuts_parameters)
    ]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each device, and of its host."""

    base: float
    trained: float
    gradients: float
    optimizer: float
    buffers: float  # gathered parameters, and those of communication
    activations: float  # and all else that a step holds for a while
    host: float

    @property
    def total(self) -> float:
        return sum(value for name, value in asdict(self).items() if name != "host")


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that each device sends in an optimiser step, and moves to and from its host."""

    gradients: float
    parameters: float
    host: float


def memory(name: str, shape: ModelShape, costs: StepCosts, num_devices: int) -> Memory:
    """What a device holds at the highest point of a step."""
    strategy, piece = STRATEGIES[name], 1 / num_devices
    base, own = float(shape.base_bytes), float(sum(costs.trained.values()))
    gradients = costs.gradients * (piece if strategy.cuts_gradients else 1.0)
    moments = costs.optimizer * (piece if strategy.cuts_moments else 1.0)
    buffers = float(BUCKET * FP32) if strategy.deepspeed else 0.0
    if strategy.deepspeed and (strategy.offloads or not strategy.cuts_parameters):
        moments += shape.trained_numbers * FP32 * piece  # of parameters, the copy that it updates
    if strategy.cuts_parameters:
        buffers += gathered(strategy, shape)
        base, own = base * piece, own * piece
    host = 0.0
    if strategy.offloads:
        host = base + own + moments + gradients
        base = own = moments = gradients = 0.0
    return Memory(base=base, trained=own, gradients=gradients, optimizer=moments, buffers=buffers,
                  activations=float(costs.peak + shape.unpacking), host=host)  # fmt: skip


def gathered(strategy: Strategy, shape: ModelShape) -> float:
    """Bytes of whole parameters at a time."""
    if not strategy.deepspeed:
        return float(shape.outside_layers + 2 * shape.largest_layer)
    return shape.all_bytes * min(1.0, GATHERED / shape.numbers) + shape.small_bytes


def traffic(name: str, shape: ModelShape, costs: StepCosts, num_devices: int, accumulation: int) -> Traffic:
    """By rings: a sum over all devices sends its bytes twice, a gathering or a cut sum once.

    Parameters that are cut are gathered for each forward, and what gradients go through for each
    backward; a recomputed layer is still there.
    """
    strategy, ring = STRATEGIES[name], (num_devices - 1) / num_devices
    if not strategy.cuts_moments:
        return Traffic(gradients=2 * ring * costs.gradients, parameters=0.0, host=0.0)
    # where each device keeps a piece of the gradients alone, every micro-batch sends them
    gradients = float(costs.gradients * (accumulation if strategy.cuts_gradients else 1))
    if not strategy.cuts_parameters:
        updated = shape.trained_numbers * FP32
        return Traffic(gradients=ring * gradients, parameters=ring * updated, host=0.0)
    passes = (shape.all_bytes + costs.backward) * accumulation
    host = (passes + gradients) / num_devices if strategy.offloads else 0.0
    return Traffic(gradients=ring * gradients, parameters=ring * passes, host=host)
