"""What a run needs, before it is started: memory, operations and traffic of a training step.

    python -m scripts.plan config=my.yaml gpus=[8] gpu_memory=[80] model.dtype=bf16 train.precision=bf16
    python -m scripts.plan config=my.yaml gpus=[1,8,64] gpu_memory=[24,40,80] backbone=[llava-7b]
    python -m scripts.plan config=my.yaml gpu_memory=[24] backbone=[config] model.quantization=4bit

Builds the real model with its experts and router on tensors without data, runs a step of it, and
prints for each configuration of configs/accelerate/ what each GPU holds, whether it fits, and which
micro-batch would; for several machines, which configuration to use on each. Nothing is downloaded
for the named backbones. docs/scaling.md explains the columns. Other keys than the ones below are the
run's.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console

from moa.cli.command import mistakes_in_one_line, settings_parser
from moa.cli.ranges import Count, FilePath, NotNegative, Positive
from moa.cli.settings import load
from moa.config import load_config

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass(frozen=True, kw_only=True)
class Settings:
    config: FilePath  # YAML file of a run
    gpus: list[Count] = field(default_factory=lambda: [1])  # in all nodes together
    gpu_memory: list[Positive] = field(default_factory=lambda: [80.0])  # GiB of each
    # of these sizes; config: the config's own; a folder with a config.json; a model of the hub
    backbone: list[str] = field(default_factory=lambda: ["llava-7b", "llava-13b", "llava-70b"])
    tokens: Count | None = None  # of a sample; null: prompt.max_length
    answer: Count = 256  # of them supervised
    images: Count = 1  # of a sample
    reserve: NotNegative = 2.0  # GiB of each GPU to leave free
    bandwidth: Positive = 50.0  # GB/s that a GPU sends to others
    host_bandwidth: Positive = 25.0  # GB/s to and from its host
    json: bool = False  # print the record instead of tables


def show(settings: Settings, run_overrides: Sequence[str], laid_over: Sequence[str] = ()) -> None:
    """A table for each backbone; on several machines one table for all. `laid_over` are files over the run's config."""
    import json
    import warnings

    from moa.planning.plan import Machine, plan_run
    from moa.planning.report import describe_plan, grid_table, plan_table, record

    warnings.simplefilter("ignore")  # of libraries, about models that will not run
    speeds = {name: getattr(settings, name) for name in ("reserve", "bandwidth", "host_bandwidth")}
    sizes = [(size, count) for size in settings.gpu_memory for count in settings.gpus]
    machines = [Machine(num_devices=count, memory=size, **speeds) for size, count in sizes]
    config = load_config([settings.config, *laid_over], run_overrides)
    lengths = {name: getattr(settings, name) for name in ("tokens", "answer", "images")}
    with Console(stderr=True).status("") as status:
        plans = plan_run(config, settings.backbone, machines, note=status.update, **lengths)
    # rich takes what is not a terminal to be 80 columns wide, where the table would break inside words
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 132)
    if settings.json:
        print(json.dumps([record(plan) for plan in plans], indent=2))
    elif len(machines) > 1:
        console.print(grid_table(plans))
    else:
        for plan in plans:
            console.print(plan_table(plan), *describe_plan(plan), "", sep="\n", soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = settings_parser(Settings, __doc__).parse_intermixed_args(argv)
    overrides = args.overrides
    names = [f.name for f in dataclasses.fields(Settings)]
    own = [text for text in overrides if re.split(r"[.=]", text)[0] in names]
    with mistakes_in_one_line():
        show(load(Settings, None, own), [text for text in overrides if text not in own], args.config or ())


if __name__ == "__main__":
    main()
