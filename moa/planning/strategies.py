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

from moa.planning.shape import ModelShape
from moa.planning.step import StepCosts

GATHERED = 1.05e9  # parameters: stage3_max_live_parameters, stage3_prefetch_bucket_size
BUCKET = 5e8  # numbers: reduce_bucket_size, allocated whole, whatever the model's size
FP32 = 4


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
