"""What a run prints and logs: console lines, a progress bar, log.jsonl, and Accelerate's trackers.

A line of log.jsonl is flat: `step`, `stage`, and metrics named `loss/<task>`, `gates/<task>/<expert>`,
`source_loss/<source>`, `aux/<loss>`, `lr/<group>`, `validation/<source>`. The main process alone writes.
"""

import json
import os
import resource
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from data.mixture import Mixture
from moa.cli.settings import to_yaml
from moa.config import RunConfig
from moa.files.atomic import write_file

LOG = "log.jsonl"


class Reporter:
    """Owns the console, the bar and the log file of a run; does nothing on other processes."""

    def __init__(self, config: RunConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.main = accelerator.is_main_process
        self.console = Console(quiet=not self.main, highlight=False, soft_wrap=True)
        self.path = Path(config.out) / LOG
        self.bar: Progress | None = None
        self.file: Any = None
        self.seconds = self.waited = 0.0  # of this process's steps, validation and saving aside

    def start(self, step: int, total: int) -> None:
        """Open the log after its line of `step`; later lines came from a run that was cut off."""
        if not self.main:
            return
        keep_lines(self.path, step)
        self.file = self.path.open("ab", buffering=0)  # a line is there, or was not written
        if self.config.logging.progress and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                       TimeRemainingColumn(), TextColumn("{task.fields[loss]}"))  # fmt: skip
            self.bar = Progress(*columns, console=self.console)
            self.bar.start()
            self.task = self.bar.add_task("training", total=total, completed=step, loss="")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.file is not None:
            self.file.close()

    def print(self, what: Any) -> None:
        self.console.print(what)

    def record(self, line: dict[str, Any]) -> None:
        """One line to log.jsonl and its metrics to the trackers."""
        if not self.main:
            return
        self.append(json.dumps(line) + "\n")
        if self.config.logging.trackers:
            metrics = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
            self.accelerator.log(metrics, step=line["step"])

    def append(self, text: str) -> None:
        data = text.encode()
        try:
            while data:  # a disk that gets full takes a part
                data = data[self.file.write(data) :]
        except OSError as error:
            raise OSError(error.errno, f"{self.path}: not written: {error.strerror}") from error

    def left_out(self, header: dict[str, Any], problem: str, count: int) -> None:
        """A step that updated nothing: a line without a loss."""
        self.record(header | {"not_finite": problem, "non_finite_steps": count})
        self.print(f"{header['stage']} {header['step']}  {problem}")

    def step(self, line: dict[str, Any]) -> None:
        self.record(line)
        self.seconds += line["step_s"]
        self.waited += line["data_wait_s"]
        if self.bar is not None:
            text = f"loss {line['loss']:.3f}"
            self.bar.update(self.task, completed=line["step"], description=line["stage"], loss=text)
        if line["step"] % self.config.logging.every == 0:
            self.print(step_text(line))

    def waiting(self) -> str:
        waited, share = self.waited, self.waited / max(self.seconds, 1e-9)
        return f"waited for data: {waited:.1f} s of {self.seconds:.1f} s in steps ({share:.1%})"

    def validation(self, line: dict[str, Any]) -> None:
        self.record(line)
        sources = "  ".join(f"{k[11:]} {v:.3f}" for k, v in line.items() if "/" in k)
        place, mean = f"{line['stage']} {line['step']}", line["validation"]
        self.print(f"{place}  validation {mean:.4f}  ({sources})")


def step_text(line: dict[str, Any]) -> str:
    tasks = "  ".join(f"{k[5:]} {v:.3f}" for k, v in line.items() if k.startswith("loss/"))
    guided = f"  guidance {line['aux/guidance']:.3f}" if "aux/guidance" in line else ""
    return (
        f"{line['stage']} {line['step']}  loss {line['loss']:.4f}  ({tasks}){guided}"
        f"  entropy {line['entropy']:.2f}  grad {line['grad_norm']:.2f}"
        f"  {line['samples_per_s']:.0f} samples/s  {line['tokens_per_s']:.0f} tokens/s"
        f"  {line['memory_gib']:.1f} GiB"
    )


def keep_lines(path: Path, step: int) -> None:
    """Cut a log after its last line of `step` or before; a half-written last line goes too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (json.JSONDecodeError, KeyError):
            break
        kept.append(line + "\n")
    write_file(path, "".join(kept))


def mixture_table(mixture: Mixture, draws: int) -> Table:
    """What an epoch holds of each source, and how often the whole run walks it."""
    epoch = mixture.epoch_length
    title = f"the mixture: an epoch is {epoch:,} samples, the run draws {draws:,}"
    table = Table("source", title=title)
    for column in ("samples", "weight", "draws per epoch", "passes per epoch", "passes in the run"):
        table.add_column(column, justify="right")
    for share in mixture.epoch():
        passes = share.passes * draws / epoch
        weight = "-" if share.weight is None else f"{share.weight:g}"
        each = f"{share.draws:,}", f"{share.passes:.2f}"
        table.add_row(share.name, f"{share.size:,}", weight, *each, f"{passes:.2f}")
    return table


def start_trackers(accelerator: Accelerator, config: RunConfig) -> None:
    """Without a key in the environment wandb writes offline, so that it works without an account."""
    if "wandb" in config.logging.trackers and "WANDB_API_KEY" not in os.environ:
        os.environ.setdefault("WANDB_MODE", "offline")
    kinds, settings = bool | int | float | str, flatten(yaml.safe_load(to_yaml(config)))
    plain = {key: v if isinstance(v, kinds) else str(v) for key, v in settings.items()}
    options = {"wandb": {"name": Path(config.out).name, "dir": config.out}}
    accelerator.init_trackers(config.logging.project, config=plain, init_kwargs=options)


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


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
