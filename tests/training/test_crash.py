"""What ends a run early: signals, kills, a full disk, dead data workers; and that nothing is lost."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

import train as train_script
from moa.checkpoint import pointed, verify
from moa.config import RunConfig
from moa.files.atomic import atomic_folder, remove_folder, write_file
from moa.training import run as run_module
from moa.training import step as step_module
from moa.training.batches import dead_worker
from moa.training.signals import EXIT_STATUS, STOPPING, StopRequest, leave_to_parent
from tests import crash_trials
from tests.support.ranks import SECONDS, free_port
from tests.support.toy import read_log, toy_config
from tests.test_train import assert_same_weights, log_of, run_once

SHORT = {"stages": {"joint": {"steps": 4}}, "data__validation": {}, "train__save_every": 2}
SETTINGS = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in SHORT.items()]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("world")


# Signals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_noted_and_its_handler_put_back(number):
    before, stop = signal.getsignal(number), StopRequest()
    with stop.on_signals():
        os.kill(os.getpid(), number)
        assert stop.signal == number and str(stop) == number.name
    assert signal.getsignal(number) is before


def test_a_second_interrupt_ends_at_once_and_a_second_sigterm_does_not():
    stop = StopRequest()
    with stop.on_signals():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def working(ready) -> None:
    leave_to_parent(0)
    ready.set()
    time.sleep(60)


def test_a_data_worker_outlives_signals_to_the_group_but_not_its_parents():
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    worker = fork.Process(target=working, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(20)
    for number in STOPPING:  # sent by a process that is not its parent
        subprocess.run(["kill", f"-{number.value}", str(worker.pid)], check=True)
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


def signal_in_forward(monkeypatch, step: int) -> None:
    """SIGTERM comes when the forward pass of `step` is done, and the backward pass is not."""
    calls, objective = count(1), step_module.objective

    def struck(*arguments):
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return objective(*arguments)

    monkeypatch.setattr(step_module, "objective", struck)


def main(config: RunConfig, world: Path, monkeypatch, *flags: str) -> int | str | None:
    """The exit status or last words of train.py, in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = ["--config", str(world / "run.yaml"), f"out={config.out}", *SETTINGS]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, *flags])
    try:
        train_script.main()
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.mark.slow
def test_sigterm_saves_the_step_under_way_and_resume_goes_on_to_the_unbroken_losses(
    world, tmp_path, monkeypatch, capsys
):
    whole = toy_config(world, out=str(tmp_path / "whole"), **SHORT)
    run_once(whole)
    config = replace(whole, out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        signal_in_forward(patch, step=3)
        assert main(config, world, patch) == EXIT_STATUS
    assert pointed(tmp_path / "run", "last") == "step-000003"
    assert "stopped by SIGTERM after step 3: the same command with --resume" in (
        capsys.readouterr().out.replace("\n", " ")
    )
    assert main(config, world, monkeypatch, "--resume") == 0
    assert log_of(config) == log_of(whole)
    assert_same_weights(config, whole)


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step_though_one_of_them_was_signalled(world, tmp_path):
    toy_config(world)
    arguments = ["--config", str(world / "run.yaml"), "train.save_every=100"]
    rendezvous = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}

    def pair(name: str, *flags: str):
        more, port = [*arguments, f"out={tmp_path / name}", *flags], free_port()
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        environments = [rendezvous | {"MASTER_PORT": str(port)} | rank for rank in ranks]
        return [
            crash_trials.start(more, tmp_path / f"{name}-{rank}.txt", **environment)
            for rank, environment in enumerate(environments)
        ]

    def ends(processes) -> list[int | None]:
        for process in processes:
            process.join(SECONDS)
        return [process.exitcode for process in processes]

    assert ends(pair("whole")) == [0, 0]
    processes = pair("run")
    log = tmp_path / "run" / "log.jsonl"
    crash_trials.wait_until(lambda: log.exists() and log.stat().st_size > 0, processes[0])
    os.kill(crash_trials.pid_of(processes[1]), signal.SIGTERM)
    assert ends(processes) == [EXIT_STATUS] * 2
    stopped = read_log(tmp_path / "run")[-1]["step"]
    assert pointed(tmp_path / "run", "last") == f"step-{stopped:06d}"
    assert "stopped by a signal to another process" in (tmp_path / "run-0.txt").read_text()
    assert ends(pair("run", "--resume")) == [0, 0]
    assert crash_trials.difference(tmp_path / "run", tmp_path / "whole") == ""


# Strikes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> crash_trials.Course:
    return crash_trials.make_course(tmp_path_factory.mktemp("course"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", crash_trials.KINDS)
def test_a_strike_tears_no_checkpoint_and_the_resumed_run_is_the_unbroken_one(course, kind):
    for outcome in crash_trials.trials(kind, 2, course, seed=os.getpid()):
        assert not (outcome.torn or outcome.unequal or outcome.wrong_end), outcome


def test_a_judge_sees_what_is_torn(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step-000001").mkdir(parents=True)
    assert "manifest.json: missing" in crash_trials.torn_in(tmp_path)
    shutil.rmtree(checkpoints / "step-000001")
    (checkpoints / "last").write_text("step-000001\n")
    assert crash_trials.torn_in(tmp_path) == "last names step-000001, which is not there"


def test_only_the_death_of_a_data_worker_is_told_as_one():
    by_signal = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    by_exit = RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly")
    assert "died (worker (pid 7) is killed by signal: Killed)" in str(dead_worker(by_signal))
    assert "died (worker (pid(s) 7, 8) exited unexpectedly)" in str(dead_worker(by_exit))
    assert dead_worker(ConnectionResetError("of a tracker")) is None
    assert dead_worker(RuntimeError("Caught KeyError in DataLoader worker process 0.")) is None


# The disk ---------------------------------------------------------------------------------------


@pytest.fixture
def events(monkeypatch, tmp_path) -> list[str]:
    """What is forced onto the disk and what is renamed, in turn, by names below `tmp_path`."""
    seen: list[str] = []
    fsync, rename = os.fsync, os.rename

    def synced(handle):
        name = os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path)
        seen.append(f"sync {name}")
        fsync(handle)

    def renamed(self, target):
        seen.append(f"rename {Path(target).name}")
        rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Path, "replace", renamed)
    return seen


def test_a_folder_is_on_the_disk_before_its_name_and_the_name_before_the_end(events, tmp_path):
    with atomic_folder(tmp_path / "step") as folder:
        (folder / "experts").mkdir()
        (folder / "experts" / "a").write_text("a")
        (folder / "b").write_text("b")
    *before, renamed, last = events
    hidden = folder.name
    assert sorted(before) == [
        f"sync {hidden}", f"sync {hidden}/b", f"sync {hidden}/experts", f"sync {hidden}/experts/a"
    ]  # fmt: skip
    assert (renamed, last) == ("rename step", "sync .")


def test_a_file_is_on_the_disk_before_its_name_and_the_name_before_the_end(events, tmp_path):
    write_file(tmp_path / "last", "step-000001\n")
    (hidden, *rest) = events
    assert hidden.startswith("sync .last.") and rest == ["rename last", "sync ."]


def test_a_checkpoint_loses_its_name_before_its_files(tmp_path, monkeypatch):
    folder = tmp_path / "step-000001"
    folder.mkdir()

    def killed(path, **options):
        if not options:
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(folder)
    assert [path.name for path in tmp_path.iterdir()] == [".step-000001.deleted"]


@pytest.mark.slow
def test_a_full_disk_ends_train_py_with_one_message_that_names_the_last_checkpoint(world, tmp_path, monkeypatch):
    config = toy_config(world, out=str(tmp_path / "run"), **SHORT)
    save, saves = run_module.save_checkpoint, count(1)

    def full(*arguments):
        limit = (100 if next(saves) == 2 else resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        try:
            return save(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    monkeypatch.setattr(run_module, "save_checkpoint", full)
    error, hint = str(main(config, world, monkeypatch)).splitlines()
    assert error.startswith("error: [Errno 27] checkpoint step-000004 not written; the checkpoint")
    last = tmp_path / "run" / "checkpoints" / "step-000002"
    assert hint == f"the same command with --resume continues from {last}"
    verify(last)
