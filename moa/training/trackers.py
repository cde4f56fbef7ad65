"""wandb and tensorboard: metrics and gate maps while a run trains, by Accelerate; images and tables of its evaluation.

Both get the resolved config. Without a key in the environment wandb writes offline: it works without an account.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import Accelerator
from PIL import Image

from moa.cli.settings import to_yaml
from moa.config import RunConfig

Rows = Sequence[Sequence[Any]]  # of a table, the head first


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """How a tracker takes what is no metric of a step; `start` is for a job that is no training."""

    start: Callable[[RunConfig, Path, str], Any]
    numbers: Callable[[Any, Mapping[str, float], int], None]
    images: Callable[[Any, Mapping[str, Path], int], None]
    table: Callable[[Any, str, Rows, int], None]
    stop: Callable[[Any], None]


def start_trackers(accelerator: Accelerator, config: RunConfig) -> None:
    """Those of a training."""
    offline_without_a_key(config)
    kinds, settings = bool | int | float | str, flatten(yaml.safe_load(to_yaml(config)))
    plain = {key: v if isinstance(v, kinds) else str(v) for key, v in settings.items()}
    name = Path(config.out).name
    options = {"wandb": {"name": name, "group": name, "dir": config.out}}
    accelerator.init_trackers(config.logging.project, config=plain, init_kwargs=options)


def send_images(accelerator: Accelerator, config: RunConfig, images: Mapping[str, Path], step: int) -> None:
    """To the trackers of a training, by the main process."""
    for name in config.logging.trackers:
        TRACKERS[name].images(accelerator.get_tracker(name, unwrap=True), images, step)


def send(
    config: RunConfig,
    run: Path,
    job: str,
    step: int,
    numbers: Mapping[str, float],
    images: Mapping[str, Path],
    tables: Mapping[str, Rows],
) -> None:
    """What a job such as an evaluation found at a step, beside the training: of the same group in wandb."""
    offline_without_a_key(config)
    for tracker in (TRACKERS[name] for name in config.logging.trackers):
        handle = tracker.start(config, run, job)
        tracker.numbers(handle, numbers, step)
        tracker.images(handle, images, step)
        for name, rows in tables.items():
            tracker.table(handle, name, rows, step)
        tracker.stop(handle)


def offline_without_a_key(config: RunConfig) -> None:
    if "wandb" in config.logging.trackers and "WANDB_API_KEY" not in os.environ:
        os.environ.setdefault("WANDB_MODE", "offline")


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as `key.0.sub: value`."""
    pairs = enumerate(values) if isinstance(values, list) else values.items()
    flat: dict[str, Any] = {}
    for key, value in pairs:
        if isinstance(value, dict | list) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# -- tensorboard ----------------------------------------------------------------------------------


def board_start(config: RunConfig, run: Path, job: str) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run / config.logging.project / job))
    writer.add_text("config", f"```\n{to_yaml(config)}```")
    return writer


def board_numbers(writer: Any, numbers: Mapping[str, float], step: int) -> None:
    for name, value in numbers.items():
        writer.add_scalar(name, value, step)


def board_images(writer: Any, images: Mapping[str, Path], step: int) -> None:
    for name, file in images.items():
        writer.add_image(f"images/{name}", np.array(Image.open(file).convert("RGB")), step, dataformats="HWC")


def board_table(writer: Any, name: str, rows: Rows, step: int) -> None:
    """As markdown, which tensorboard draws."""
    head, *body = [[str(cell).replace("|", r"\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
    writer.add_text(f"tables/{name}", "\n".join(lines), step)


# -- wandb ----------------------------------------------------------------------------------------


def wandb_start(config: RunConfig, run: Path, job: str) -> Any:
    import wandb

    about: dict[str, Any] = {"name": f"{run.name} {job}", "group": run.name, "job_type": job}
    about |= {"dir": str(run), "config": yaml.safe_load(to_yaml(config))}
    return wandb.init(project=config.logging.project, **about)


def wandb_numbers(run: Any, numbers: Mapping[str, float], step: int) -> None:
    run.log(dict(numbers), step=step)


def wandb_images(run: Any, images: Mapping[str, Path], step: int) -> None:
    import wandb

    run.log({f"images/{name}": wandb.Image(str(file)) for name, file in images.items()}, step=step)


def wandb_table(run: Any, name: str, rows: Rows, step: int) -> None:
    import wandb

    run.log({f"tables/{name}": wandb.Table(columns=[*rows[0]], data=[[*row] for row in rows[1:]])}, step=step)


TRACKERS = {
    "tensorboard": Tracker(
        start=board_start, numbers=board_numbers, images=board_images, table=board_table, stop=lambda w: w.close()
    ),
    "wandb": Tracker(
        start=wandb_start, numbers=wandb_numbers, images=wandb_images, table=wandb_table, stop=lambda r: r.finish()
    ),
}
