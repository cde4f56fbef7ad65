"""The folder of a run: locked while one trains, cleared only once the next run could begin.

claim   lock it; refuse a folder that holds a run; find the step folder to continue from
begin   when model and data are open: remove the old run, write config, versions and data.json
"""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from data.digest import changes
from moa.checkpoint import (
    CONFIG,
    STATE,
    load_train_state,
    point,
    pointed,
    prune,
    read_json,
    step_name,
    verify,
    write_run_header,
)
from moa.cli.settings import anchor_at, to_yaml, visit
from moa.config import RunConfig, load_config
from moa.files.atomic import write_json
from moa.training.report import LOG
from moa.training.trackers import flatten

T = TypeVar("T")
DATA, LOCK = "data.json", ".lock"
# What train.py, federate.py, eval.py, scripts.summary and scripts.report write into a run folder, and not the user.
OWN_FOLDERS = ("checkpoints", "eval", "others", "pictures", "server")
OWN_FILES = (LOG, CONFIG, "versions.json", DATA, "summary.json", "report.html", "federated.yaml", "federated.json")
# Settings that may differ on --resume: none of them changes what was learned until then.
FREE_ON_RESUME = ("out", "root", "logging", "eval", "data.num_workers", "data.validation",
                  "model.fingerprint", "model.other_base",  # the base has been checked by now
                  "train.save_every", "train.keep_last", "train.keep_best", "train.statistics",
                  "train.on_non_finite", "train.max_non_finite_steps")  # fmt: skip
WAY_OUT = "To start from its weights with other settings or data, use stages.*.init_from and another out="
held: dict[str, Any] = {}  # open lock files by run folder: closing one would unlock it


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """The result of `work()` on the main process, for all; its ValueError or OSError ends all."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except (ValueError, OSError) as error:
            outcome[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None and not accelerator.is_main_process:
        raise SystemExit(2)  # the main process prints the line
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


def claim(config: RunConfig, *, resume: bool, overwrite: bool) -> str | None:
    """Lock the folder; the step folder to continue from, or None for a start."""
    run = Path(config.out)
    lock(run)
    if not resume:
        log = run / LOG  # a run that failed at its first sample leaves nothing in it
        learned = pointed(run, "last") is not None or (log.is_file() and log.stat().st_size > 0)
        if learned and not overwrite:
            raise ValueError(f"out={run}: holds a run already; choices: --resume, --overwrite, another out=")
        return None
    last = pointed(run, "last")
    step = run / "checkpoints" / last if last else None
    if step is not None:
        verify(step)
    if (run / CONFIG).is_file():
        same_config(config, run, stages_begun(step))
    return str(step) if step else None


def begin(config: RunConfig, data: Mapping[str, Any], step: str | None, *, clear: bool) -> None:
    """Remove the old run of this folder where asked to; write what the new one is."""
    run = Path(config.out)
    if clear:  # what the old run and its evaluations wrote, and nothing else
        for name in OWN_FOLDERS:
            shutil.rmtree(run / name, ignore_errors=True)
        for name in OWN_FILES:
            (run / name).unlink(missing_ok=True)
    if step is not None:
        same_data(run, data)
        # what a run killed between its checkpoint and what follows it has not done
        best = [score["step"] for score in load_train_state(Path(step)).progress["best"]]
        if best:
            point(run, "best", step_name(best[0]))
        prune(run, config.train.keep_last, best)
    write_run_header(run, config)
    write_json(run / DATA, data)


def lock(run: Path) -> None:
    """Hold `run` until this process ends, by a POSIX lock: it works over NFS, and data workers have no part in it."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / LOCK).open("a+")
    except OSError as error:
        raise OSError(f"out={run}: cannot be written: {error.strerror}") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        who = file.read().strip() or "another process"
        raise ValueError(f"out={run}: {who} trains there; wait for its end, or choose another out=") from None
    except OSError as error:
        print(f"out={run}: not locked ({error.strerror}); start no second training there")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    held[str(run.resolve())] = file


def stages_begun(step: Path | None) -> int:
    """How many stages of a checkpoint have loaded what they start from."""
    if step is None:
        return 0
    progress = read_json(step / STATE)
    return progress["stage"] + (progress["stage_step"] > 0)


def same_config(config: RunConfig, run: Path, begun: int) -> None:
    """ValueError naming the settings in which a resumed run differs from its beginning."""
    before, now = (anchored(c) for c in (load_config(run / CONFIG), config))
    later = [f"stages.{name}.init_from" for name in [*config.stages][begun:]]
    free = [*FREE_ON_RESUME, *later]
    if before["model.fingerprint"] or now["model.other_base"]:  # so that its folder may have moved
        free.append("model.name")
    different = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == name or key.startswith(f"{name}.") for name in free)
    ]
    if different:
        raise ValueError(f"--resume: {run / CONFIG} differs: {'; '.join(different)}. {WAY_OUT}")


def anchored(config: RunConfig) -> dict[str, Any]:
    """The settings by their whole keys, with relative paths in full where something is there."""
    raw = yaml.safe_load(to_yaml(config))
    flat = flatten(visit(RunConfig, raw, "", anchor_at(os.getcwd())))
    order = {"experts": raw["experts"], "sources": raw["data"]["sources"], "stages": raw["stages"]}
    return flat | {f"the order of {key}": [*names] for key, names in order.items()}


def same_data(run: Path, data: Mapping[str, Any]) -> None:
    """ValueError naming the sources that are not what they were when the run began."""
    file = run / DATA
    if not file.is_file():
        print(f"{file}: missing, so it is unknown whether the data is the same")
        return
    before = json.loads(file.read_text())
    for name, now in data.items():
        if found := changes(before.get(name, now), now):
            raise ValueError(f"--resume: data.sources.{name}: {'; '.join(found)}. {WAY_OUT}")
