"""What a run needs, before it is started: memory, operations and traffic of a training step.

    python -m scripts.plan my.yaml --gpus 8 --gpu-memory 80 model.dtype=bf16 train.precision=bf16
    python -m scripts.plan my.yaml --gpus 1,8,64 --gpu-memory 24,40,80 --backbone llava-7b
    python -m scripts.plan my.yaml --gpu-memory 24 --backbone config model.quantization=4bit

Builds the real model with its experts and router on tensors without data, runs a step of it, and
says for each configuration of configs/accelerate/ what lies on each GPU, whether it fits, and which
micro-batch would; for several machines, which configuration to use on each. Nothing is downloaded
for the named backbones. docs/scaling.md explains the columns.
"""

import argparse
import json
import os
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rich.console import Console

from moa.backbones.shapes import LLAMA_2
from moa.cli.command import mistakes_in_one_line
from moa.config import load_config
from moa.planning.plan import Machine, Plan, plan_run
from moa.planning.report import describe_plan, grid_table, plan_table, record

T = TypeVar("T")


def numbers(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Parser of `1,8,64`."""

    def parse(text: str) -> list[T]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = "list"  # argparse says: invalid list value
    return parse


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    machine, names = Machine(), ",".join(LLAMA_2)
    parser.add_argument("config", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="one setting")
    parser.add_argument("--gpus", type=numbers(int), default=[machine.num_devices], metavar="N,...",
                        help="in all nodes together")  # fmt: skip
    parser.add_argument("--gpu-memory", type=numbers(float), default=[machine.memory],
                        metavar="GIB,...", help="of each")  # fmt: skip
    parser.add_argument("--backbone", type=numbers(str), default=names.split(","),
                        metavar="NAME,...", help=f"{names} (default: all three); config: the config's "
                        "own; a folder with a config.json; a model of the hub")  # fmt: skip
    parser.add_argument("--tokens", type=int, help="of a sample (default: prompt.max_length)")
    parser.add_argument("--answer", type=int, default=256, help="of them supervised (%(default)s)")
    parser.add_argument("--reserve", type=float, default=machine.reserve,
                        help="GiB of each GPU to leave free (%(default)s)")  # fmt: skip
    parser.add_argument("--bandwidth", type=float, default=machine.bandwidth,
                        help="GB/s that a GPU sends to others (%(default)s)")  # fmt: skip
    parser.add_argument("--host-bandwidth", type=float, default=machine.host_bandwidth,
                        help="GB/s to and from its host (%(default)s)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the record instead of tables")
    return parser.parse_intermixed_args(argv)


def machines(arguments: argparse.Namespace) -> list[Machine]:
    """Every number of GPUs with every memory."""
    return [
        Machine(
            num_devices=count,
            memory=size,
            reserve=arguments.reserve,
            bandwidth=arguments.bandwidth,
            host_bandwidth=arguments.host_bandwidth,
        )
        for size in arguments.gpu_memory
        for count in arguments.gpus
    ]


def show(plans: list[Plan], console: Console) -> None:
    """A table for each backbone; on several machines one table for all."""
    if len({plan.machine for plan in plans}) > 1:
        console.print(grid_table(plans))
        return
    for plan in plans:
        console.print(plan_table(plan))
        for line in describe_plan(plan):
            console.print(line, soft_wrap=True)
        console.print()


def main(argv: Sequence[str] | None = None) -> None:
    warnings.simplefilter("ignore")  # of libraries, about models that will not run
    arguments = parse_arguments(argv)
    with mistakes_in_one_line(), Console(stderr=True).status("") as status:
        plans = plan_run(
            load_config(arguments.config, arguments.overrides),
            arguments.backbone,
            machines(arguments),
            tokens=arguments.tokens,
            answer=arguments.answer,
            say=status.update,
        )
    if arguments.json:
        print(json.dumps([record(plan) for plan in plans], indent=2))
    else:
        show(plans, Console(highlight=False))


if __name__ == "__main__":
    main()
