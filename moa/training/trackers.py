"""wandb and tensorboard: metrics and gate maps while a run trains, by Accelerate; images and tables of its evaluation.

Both get the resolved config. Without a key in the environment wandb writes offline: it works without an account.
"""

import os
from collections.abc import Mapping, Sequence
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


def start_trackers(accelerator: Accelerator, config: RunConfig) -> None:
    offline_without_a_key(config)
    kinds, settings = bool | int | float | str, flatten(yaml.safe_load(to_yaml(config)))
    plain = {key: v if isinstance(v, kinds) else str(v) for key, v in settings.items()}
    name = Path(config.out).name
    options = {"wandb": {"name": name, "group": name, "dir": config.out}}
    accelerator.init_trackers(config.logging.project, config=plain, init_kwargs=options)


def send_images(accelerator: Accelerator, config: RunConfig, images: Mapping[str, Path], step: int) -> None:
    for name in config.logging.trackers:
        TRACKERS[name](accelerator.get_tracker(name, unwrap=True)).images(images, step)


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
    for name in config.logging.trackers:
        tracker = TRACKERS[name].start(config, run, job)
        tracker.numbers(numbers, step)
        tracker.images(images, step)
        for title, rows in tables.items():
            tracker.table(title, rows, step)
        tracker.stop()


def offline_without_a_key(config: RunConfig) -> None:
    if "wandb" in config.logging.trackers and "WANDB_API_KEY" not in os.environ:
        os.environ.setdefault("WANDB_MODE", "offline")


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    pairs = enumerate(values) if isinstance(values, list) else values.items()
    flat: dict[str, Any] = {}
    for key, value in pairs:
        if isinstance(value, dict | list) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@dataclass(frozen=True)
class Tensorboard:
    """What tensorboard takes that is no metric of a step; `writer` is Accelerate's, or that of another job."""

    writer: Any

    @classmethod
    def start(cls, config: RunConfig, run: Path, job: str) -> "Tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run / config.logging.project / job))
        writer.add_text("config", f"```\n{to_yaml(config)}```")
        return cls(writer)

    def numbers(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def images(self, images: Mapping[str, Path], step: int) -> None:
        for name, file in images.items():
            pixels = np.array(Image.open(file).convert("RGB"))
            self.writer.add_image(f"images/{name}", pixels, step, dataformats="HWC")

    def table(self, name: str, rows: Rows, step: int) -> None:
        """As markdown, which tensorboard draws."""
        head, *body = [[str(cell).replace("|", r"\|").replace("\n", " ") for cell in row] for row in rows]
        lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
        self.writer.add_text(f"tables/{name}", "\n".join(lines), step)

    def stop(self) -> None:
        self.writer.close()


@dataclass(frozen=True)
class Wandb:
    """The same of wandb; `run` is one of its own."""

    run: Any

    @classmethod
    def start(cls, config: RunConfig, run: Path, job: str) -> "Wandb":
        import wandb

        about: dict[str, Any] = {"name": f"{run.name} {job}", "group": run.name, "job_type": job}
        about |= {"dir": str(run), "config": yaml.safe_load(to_yaml(config))}
        return cls(wandb.init(project=config.logging.project, **about))

    def numbers(self, numbers: Mapping[str, float], step: int) -> None:
        self.run.log(dict(numbers), step=step)

    def images(self, images: Mapping[str, Path], step: int) -> None:
        import wandb

        self.run.log({f"images/{name}": wandb.Image(str(file)) for name, file in images.items()}, step=step)

    def table(self, name: str, rows: Rows, step: int) -> None:
        import wandb

        table = wandb.Table(columns=[*rows[0]], data=[[*row] for row in rows[1:]])
        self.run.log({f"tables/{name}": table}, step=step)

    def stop(self) -> None:
        self.run.finish()


TRACKERS: dict[str, type[Tensorboard] | type[Wandb]] = {"tensorboard": Tensorboard, "wandb": Wandb}
