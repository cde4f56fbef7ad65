"""A run's plan: from a config and a machine to memory and traffic, on shapes alone.

    config + backbone -> fake model (the project's own build) -> one fake step -> each configuration

What a step needs is affine in the micro-batch: two steps give the whole line, and which micro-batch fits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moa.backbones.llava import only_one_image
from moa.backbones.shapes import find_shape, random_backbone
from moa.build import DTYPES, build_mixture, open_adapters
from moa.config import RunConfig
from moa.experts.bank import ExpertBank
from moa.experts.kinds import KINDS, kind_of
from moa.files.peft import ExpertHeader
from moa.planning.batch import Lengths, example_batch, image_tokens
from moa.planning.step import StepCosts, measure_step
from moa.planning.strategies import Memory, ModelShape, Traffic, memory, offered, shape_of, traffic
from moa.planning.tensors import fake_mode
from moa.sections import StageConfig
from moa.training.batches import Layout, make_layout
from moa.training.stages import parameter_groups, set_trainable

GIB, GB = 2**30, 1e9


@dataclass(frozen=True, kw_only=True)
class Machine:
    num_devices: int = 1
    memory: float = 80.0  # GiB of each
    reserve: float = 2.0  # GiB of it for the CUDA context, libraries and gaps between tensors
    bandwidth: float = 50.0  # GB/s that each can send to the others
    host_bandwidth: float = 25.0  # GB/s to and from its host

    def __post_init__(self) -> None:
        if not self.reserve < self.memory:
            raise ValueError(f"reserve: must be below {self.memory:g} GiB, got {self.reserve}")


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What two steps of a run have shown, the second one of twice as many samples."""

    backbone: str
    lengths: Lengths
    shape: ModelShape
    samples: int
    low: StepCosts
    high: StepCosts

    def costs(self, samples: int) -> StepCosts:
        steps = (samples - self.samples) / self.samples
        grown = {n: round(getattr(self.low, n) + steps * self.growth(n)) for n in ("kept", "peak", "flops")}
        return replace(self.low, **grown)

    def growth(self, name: str) -> int:
        return getattr(self.high, name) - getattr(self.low, name)


@dataclass(frozen=True, kw_only=True)
class Choice:
    name: str
    memory: Memory
    traffic: Traffic
    fits: bool
    largest_micro_batch: int  # of samples that would fit; 0: none
    seconds: float  # of communication in an optimiser step, none of it hidden behind computation


@dataclass(frozen=True, kw_only=True)
class Plan:
    backbone: str
    machine: Machine
    layout: Layout
    lengths: Lengths
    shape: ModelShape
    costs: StepCosts
    choices: list[Choice]

    @property
    def recommended(self) -> Choice | None:
        """The first with room for a sample: choices are in the order of what they send, and
        micro-batches of any size add up to the same step."""
        return next((choice for choice in self.choices if choice.largest_micro_batch), None)

    @property
    def micro_batch(self) -> int:
        """Of the recommended configuration, the largest that divides what each device gets; or 0."""
        most = self.recommended.largest_micro_batch if self.recommended is not None else 0
        own = self.layout.batch_size // self.layout.num_processes
        return max((n for n in range(1, own + 1) if own % n == 0 and n <= most), default=0)

    @property
    def flops(self) -> float:
        """Of one device in an optimiser step."""
        return float(self.costs.flops * self.layout.accumulation)


class FakeRun:
    """A model of a config on fake tensors, set up as for the stage that trains most."""

    def __init__(self, config: RunConfig, backbone: str) -> None:
        self.config = config
        adapters = open_adapters(config)
        with fake_mode():
            base = random_backbone(find_shape(backbone), DTYPES[config.model.dtype])
            self.image_tokens = image_tokens(base, config.model)
            self.model = build_mixture(config, base, adapters, place=add_fresh)
        by_kind = {stage.kind: stage for stage in config.stages.values()}
        found = [by_kind[kind] for kind in ("joint", "experts", "router") if kind in by_kind]
        self.stage = found[0] if found else StageConfig(name="joint", steps=1)
        self.groups = set_trainable(self.model, parameter_groups(self.model, config), self.stage)
        if not self.groups:
            raise ValueError(f"router.kind={config.router.kind}: no stage trains anything")
        if config.train.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.model.train()
        self.shape = shape_of(self.model, config.model.quantization)

    def lengths(self, *, tokens: int | None = None, answer: int = 256, images: int = 1) -> Lengths:
        """Of a sample of `tokens` (default: prompt.max_length), of which `images` images and the answer are a part."""
        if images > 1 and (rule := only_one_image(self.model.backbone.family)):
            raise ValueError(f"images={images}: {rule}")
        tokens, pack = tokens or self.config.prompt.max_length, self.config.train.pack_length
        return Lengths(tokens=tokens, answer=answer, image=self.image_tokens, images=images, pack=pack)

    def measure(self, lengths: Lengths, num_samples: int) -> StepCosts:
        batch = example_batch(self.config, self.model.model.config, lengths, num_samples)
        return measure_step(self.model, self.groups, self.stage, self.config.train, batch)


def add_fresh(bank: ExpertBank, name: str, header: ExpertHeader, init: str) -> None:
    """An expert of an adapter's sites and usual rank, whose weights are not read."""
    kind = kind_of(header.config)
    made: dict[str, Any] = {"rank": header.config["r"], "alpha": 1}
    made = {key: value for key, value in made.items() if key in KINDS[kind].made_of}
    bank.add(name, kind=kind, targets=list(header.ranks), **made)


def trace(
    config: RunConfig, backbone: str, samples: int, *, note: Callable[[str], Any] = lambda line: None, **about: Any
) -> Traced:
    """Run the steps of a config with a backbone, around a micro-batch of `samples`, which are of
    `FakeRun.lengths(**about)`."""
    note(f"{backbone}: building")
    run = FakeRun(config, backbone)
    lengths = run.lengths(**about)
    samples = max(samples, 2)  # one alone has no padding, and so no mask
    note(f"{backbone}: steps of {samples} and {2 * samples} samples")
    low, high = (run.measure(lengths, count) for count in (samples, 2 * samples))
    return Traced(backbone=backbone, lengths=lengths, shape=run.shape, samples=samples, low=low, high=high)


def make_plan(traced: Traced, layout: Layout, machine: Machine, quantized: bool) -> Plan:
    """What was traced, on a machine, in every configuration for so many devices."""
    return Plan(
        backbone=traced.backbone,
        machine=machine,
        layout=layout,
        lengths=traced.lengths,
        shape=traced.shape,
        costs=traced.costs(layout.micro_batch_size),
        choices=[choose(n, traced, layout, machine) for n in offered(machine.num_devices, quantized)],
    )


def choose(name: str, traced: Traced, layout: Layout, machine: Machine) -> Choice:
    costs, devices = traced.costs(layout.micro_batch_size), machine.num_devices
    held = memory(name, traced.shape, costs, devices)
    sent = traffic(name, traced.shape, costs, devices, layout.accumulation)
    limit = (machine.memory - machine.reserve) * GIB
    per_sample = traced.growth("peak") / traced.samples
    room = layout.micro_batch_size + (limit - held.total) / per_sample
    across = (sent.gradients + sent.parameters) / (machine.bandwidth * GB)
    return Choice(
        name=name,
        memory=held,
        traffic=sent,
        fits=held.total <= limit,
        largest_micro_batch=max(int(room), 0),
        seconds=across + sent.host / (machine.host_bandwidth * GB),
    )


def plan_run(config: RunConfig, backbones: Sequence[str], machines: Sequence[Machine], **options: Any) -> list[Plan]:
    """A plan for each backbone ("config" is the config's own) on each machine; `options` are `trace`'s."""
    layouts = [make_layout(config.train, machine.num_devices) for machine in machines]
    samples = min(layout.micro_batch_size for layout in layouts)
    quantized, plans = config.model.quantization is not None, list[Plan]()
    for name in backbones:
        traced = trace(config, config.model.name if name == "config" else name, samples, **options)
        pairs = zip(machines, layouts, strict=True)
        plans += [make_plan(traced, layout, machine, quantized) for machine, layout in pairs]
    return plans
