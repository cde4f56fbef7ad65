"""What a run prints and logs: console lines, a progress bar, log.jsonl, and Accelerate's trackers.

A line of log.jsonl is flat: `step`, `stage`, and metrics named `loss/<task>`, `gates/<task>/<expert>`,
`source_loss/<source>`, `aux/<loss>`, `lr/<group>`, `validation/<source>`. The main process alone writes.
"""

import json
import resource
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from data.mixture import Mixture
from moa.analysis.routing import mutual_information
from moa.config import RunConfig
from moa.files.atomic import write_file
from moa.training.trackers import send_images

LOG = "log.jsonl"
RECENT = 50  # steps whose mean gates a map shows


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
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT)  # lines of steps

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
        self.recent.append(line)
        self.seconds += line["step_s"]
        self.waited += line["data_wait_s"]
        if self.bar is not None:
            text = f"loss {line['loss']:.3f}"
            self.bar.update(self.task, completed=line["step"], description=line["stage"], loss=text)
        if line["step"] % self.config.logging.every == 0:
            self.print(step_text(line))

    def waiting(self) -> str:
        share = self.waited / max(self.seconds, 1e-9)
        return f"waited for data: {self.waited:.1f} s of {self.seconds:.1f} s in steps ({share:.1%})"

    def validation(self, line: dict[str, Any]) -> None:
        self.record(line)
        sources = "  ".join(f"{k[11:]} {v:.3f}" for k, v in line.items() if "/" in k)
        place, value = f"{line['stage']} {line['step']}", line["validation"]
        self.print(f"{place}  validation {value:.4f}  ({sources})")
        if self.main and self.config.logging.trackers:
            self.show_gates(line["step"])

    def show_gates(self, step: int) -> None:
        """The mean gates of the last steps by task, as an image to the trackers."""
        from moa.analysis.plots import gate_heat_map

        file = self.path.parent / "pictures" / "gates_in_training.png"
        if routing := mean_gates(self.recent, [*self.config.experts]):
            gate_heat_map(file, routing)
            send_images(self.accelerator, self.config, {"gates": file}, step)


def mean_gates(lines: Iterable[Mapping[str, Any]], experts: Sequence[str]) -> dict[str, Any]:
    """Gates by task as a map of them takes them, the mean over lines of steps that have the task; empty without one."""
    tasks = dict.fromkeys(key[5:] for line in lines for key in line if key.startswith("loss/"))
    found = {
        task: [mean(line[key] for line in lines if (key := f"gates/{task}/{name}") in line) for name in experts]
        for task in tasks
    }
    if not found:
        return {}
    information = mutual_information(torch.tensor([*found.values()]), [*found])
    return {"experts": experts, "per_kind": found, "held_out": [], "mutual_information": information}


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


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
