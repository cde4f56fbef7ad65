"""A plan as a table to read and as a record to keep."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from moa.planning.plan import GB, GIB, Choice, Plan

MEMORY = {"trained": "experts, router", "optimizer": "AdamW"}  # headings that are not the part's
PARTS = ("base", "trained", "gradients", "optimizer", "buffers", "activations")


def plan_table(plan: Plan) -> Table:
    where = f"{gpus(plan.machine.num_devices)} of {plan.machine.memory:g} GiB"
    table = Table(title=f"{plan.backbone} on {where}: GiB on each")
    table.add_column("", overflow="fold")
    columns = [MEMORY.get(part, part) for part in PARTS]
    for column in (*columns, "total", "fits", "micro-batch", "host", "GB sent", "s"):
        table.add_column(column, justify="right", overflow="fold")
    for choice in plan.choices:
        table.add_row(*cells(choice), style="bold" if choice is plan.recommended else "")
    return table


def cells(choice: Choice) -> list[str]:
    held, sent = choice.memory, choice.traffic
    memory = [getattr(held, part) for part in PARTS]
    return [
        choice.name,
        *(f"{size / GIB:.1f}" for size in (*memory, held.total)),
        "yes" if choice.fits else "no",
        str(choice.largest_micro_batch or "-"),
        f"{held.host / GIB:.1f}",
        f"{(sent.gradients + sent.parameters) / GB:.1f}",
        f"{choice.seconds:.1f}",
    ]


def describe_plan(plan: Plan) -> Iterator[str]:
    shape, lengths, layout, machine = plan.shape, plan.lengths, plan.layout, plan.machine
    yield (
        f"{shape.numbers / 1e6:,.1f}M parameters, {shape.trained_numbers / 1e6:.1f}M trained; "
        f"{lengths.tokens:,} tokens a sample ({lengths.images} x {lengths.image} image, {lengths.answer} answer)"
        + (f", rows of {lengths.pack:,}" if lengths.pack else "")
    )
    yield (
        f"a step: {layout.batch_size} samples = {layout.num_processes} GPUs x "
        f"{layout.accumulation} x {layout.micro_batch_size}; {plan.flops / 1e12:,.1f} TFLOP on each; "
        f"{plan.costs.kept / GIB:.1f} GiB kept for the backward pass"
    )
    yield (
        f"{machine.reserve:g} GiB of each stay free; {machine.bandwidth:g} GB/s between GPUs, "
        f"{machine.host_bandwidth:g} GB/s to the host"
    )
    yield advice(plan)


def advice(plan: Plan) -> str:
    """The configuration to use, or what would bring the nearest one in."""
    best = plan.recommended
    if best is not None:
        micro = f" with train.micro_batch_size={plan.micro_batch}" if not best.fits else ""
        return f"use: {best.name}{micro}"
    least = min(plan.choices, key=lambda choice: choice.memory.total)
    step = least.memory.activations
    return (
        f"nothing fits. {least.name} is nearest: {(least.memory.total - step) / GIB:.1f} GiB before a sample "
        f"is read, and {step / GIB:.1f} GiB for a micro-batch of {plan.layout.micro_batch_size}. Shorter samples, "
        "train.gradient_checkpointing=true, model.dtype=bf16 or more GPUs would help"
    )


def grid_table(plans: Sequence[Plan]) -> Table:
    """Backbone and memory against GPUs: the configuration to use, and its largest micro-batch."""
    counts = sorted({plan.machine.num_devices for plan in plans})
    table = Table(title="configuration to use, and the largest micro-batch that fits")
    table.add_column("")
    table.add_column("GiB", justify="right")
    for count in counts:
        table.add_column(gpus(count))
    rows: dict[tuple[str, float], dict[int, str]] = {}
    for plan in plans:
        best, machine = plan.recommended, plan.machine
        shown = f"{best.name}, {best.largest_micro_batch}" if best is not None else "-"
        rows.setdefault((plan.backbone, machine.memory), {})[machine.num_devices] = shown
    for (name, size), row in rows.items():
        table.add_row(name, f"{size:g}", *(row[count] for count in counts))
    return table


def gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"


def record(plan: Plan) -> dict[str, Any]:
    best = plan.recommended
    return {
        **asdict(plan),
        "accumulation": plan.layout.accumulation,
        "flops_per_device": plan.flops,
        "recommended": best.name if best is not None else None,
        "micro_batch": plan.micro_batch,
    }
