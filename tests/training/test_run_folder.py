"""A run folder: held by one training, cleared late, resumed only with the data that it began with."""

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from data.checks import BadSampleError
from moa.checkpoint import load_model, pointed
from moa.config import RunConfig, load_config
from moa.training.run_folder import held, lock
from moa.training.setup import make_accelerator, open_run
from tests.support.tiny import random_image
from tests.support.toy import toy_config, write_rows
from train import train

SHORT = {"data__validation": {}, "stages": {"experts": {"steps": 1}}}


def start(config: RunConfig, **flags: bool):
    AcceleratorState._reset_state(reset_partial_state=True)
    return open_run(config, make_accelerator(config), **flags)


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> RunConfig:
    """A finished run of one step, evaluated, with a user's file and a merge beside it."""
    world = tmp_path_factory.mktemp("world")
    config = toy_config(world, **SHORT)
    train(*start(config))
    for name in ("eval/routing.json", "others/base/eval/vqa.json", "notes.txt", "merged/ties/w"):
        file = Path(config.out, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("old")
    return config


def copied(old: RunConfig, folder: Path) -> RunConfig:
    shutil.copytree(Path(old.out), folder / "run")
    return replace(old, out=str(folder / "run"))


def content(out: str) -> dict[str, bytes]:
    files = (file for file in Path(out).rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model__targets": ["no_such_layer"]}, "matches no linear layer"),
        (
            {"experts__vqa__rank": 1000},
            r"experts\.vqa\.rank: 1000 is more than \d+, the larger side",
        ),
        ({"model__name": "no/such/base/here"}, "no/such/base/here"),
        ({"data__sources__vqa__path": "no.jsonl"}, "no.jsonl"),
        ({"experts__vqa__init_from": "no_adapter"}, "no_adapter"),
        ({"stages__experts__init_from": "no_run"}, r"stages\.experts\.init_from: no_run"),
        ({"eval__sources": {"e": {"format": "jsonl", "path": "none.jsonl"}}}, "none.jsonl"),
        ({"eval__sources": {"e": {"num_samples": 2, "benchmark": "x"}}}, "benchmark 'x'"),
        ({"eval__compare": ["nobody"]}, "gates=nobody: unknown; choices"),
    ],
)
def test_overwrite_removes_nothing_that_cannot_be_replaced(old, tmp_path, changes, expected):
    before = copied(old, tmp_path)
    files = content(before.out)
    world = Path(old.out).parent
    changed = toy_config(world, **{**SHORT, **changes, "out": before.out})
    with pytest.raises((ValueError, OSError), match=expected):
        start(changed, overwrite=True)
    assert content(before.out) == files


def test_overwrite_removes_all_that_the_old_run_wrote_and_nothing_else(old, tmp_path):
    config = replace(copied(old, tmp_path), seed=77)
    with pytest.raises(ValueError, match="holds a run already; choices: --resume, --overwrite"):
        start(config)
    start(config, overwrite=True)
    left = content(config.out)
    assert sorted(left) == [
        "config.yaml",
        "data.json",
        "merged/ties/w",
        "notes.txt",
        "versions.json",
    ]
    assert "seed: 77" in left["config.yaml"].decode()


@pytest.mark.slow
def test_a_later_stages_start_is_checked_first_and_may_be_corrected_by_resume(old, tmp_path):
    world = Path(old.out).parent
    stages = {"experts": {"steps": 1}, "joint": {"steps": 1}}
    for source, expected in (
        ("no_run", "neither a run with checkpoints/last"),
        ({"vqa": f"{old.out}/checkpoints/step-000001/experts/grounding"}, "scaling"),
        ({"vqa": str(world)}, "adapter_config.json: missing"),
    ):
        later = stages | {"joint": {"steps": 1, "init_from": source}}
        config = toy_config(world, out=str(tmp_path / "x"), data__validation={}, stages=later)
        with pytest.raises(ValueError, match=rf"^stages\.joint\.init_from: .*{expected}"):
            start(config)
    good = toy_config(world, out=str(tmp_path / "x"), data__validation={},
                      stages=stages | {"joint": {"steps": 1, "init_from": old.out}})  # fmt: skip
    run, state = start(good)
    run.stop.signal = signal.SIGTERM  # stops after the first step
    train(run, state)
    corrected = f"{old.out}/checkpoints/{pointed(Path(old.out), 'last')}"
    joint = replace(good.stages["joint"], init_from=corrected)
    good = replace(good, stages=good.stages | {"joint": joint})
    run, state = start(good, resume=True)
    train(run, state)
    assert run.done
    with pytest.raises(ValueError, match=r"stages\.joint\.init_from was"):  # it has begun
        joint = replace(joint, init_from=old.out)
        start(replace(good, stages=good.stages | {"joint": joint}), resume=True)


def reorder(world: Path) -> None:
    file = world / "vqa.jsonl"
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))


def shorten(world: Path) -> None:
    file = world / "vqa.jsonl"
    write_rows(file, [json.loads(line) for line in file.read_text().splitlines()[4:]])


def repaint(world: Path) -> None:
    for number in range(5):
        random_image(number + 50).save(world / f"{number}.png")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "expected"),
    [(reorder, "path is another file; sample 0 is another"), (shorten, "has 20 samples, had 24"),
     (repaint, r"data\.sources\.vqa: sample 0 is another \(24 of 24 compared\)")],
)  # fmt: skip
def test_a_resume_with_other_rows_or_images_is_refused(tmp_path, change, expected):
    config = toy_config(tmp_path, **SHORT)
    train(*start(config))
    start(config, resume=True)
    change(tmp_path)
    with pytest.raises(ValueError, match=rf"--resume: .*{expected}.*stages\.\*\.init_from"):
        start(config, resume=True)


def hold(folder: str, told) -> None:
    lock(Path(folder))
    told.set()
    signal.pause()


def test_a_folder_is_held_by_one_training_until_its_process_ends(tmp_path):
    context = multiprocessing.get_context("fork")
    told = context.Event()
    other = context.Process(target=hold, args=(str(tmp_path / "run"), told))
    other.start()
    assert told.wait(60)
    with pytest.raises(ValueError, match=rf"out=.*run: process {other.pid} on .* trains there"):
        lock(tmp_path / "run")
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    lock(tmp_path / "run")
    assert str(tmp_path / "run") in held


@pytest.mark.slow
def test_a_run_that_failed_at_its_first_sample_may_be_started_again(tmp_path):
    config = toy_config(tmp_path, **SHORT)
    (tmp_path / "0.png").write_bytes(b"no image")
    for number in range(1, 5):
        shutil.copy(tmp_path / "0.png", tmp_path / f"{number}.png")
    with pytest.raises(BadSampleError):
        train(*start(config))
    repaint(tmp_path)
    train(*start(config))
    assert pointed(Path(config.out), "last") == "step-000001"


@pytest.mark.parametrize("out", ["file/run", "x" * 300])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, out):
    (tmp_path / "file").write_text("")
    config = toy_config(tmp_path, out=str(tmp_path / out), **SHORT)
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ValueError, match=r"out=.*: cannot be written: (Not a dir|File name)"):
            start(config, **flags)


@pytest.mark.slow
def test_a_run_of_relative_paths_is_found_from_any_folder(tmp_path, monkeypatch):
    toy_config(tmp_path, **SHORT)  # writes the world
    file = tmp_path / "run.yaml"
    file.write_text(file.read_text().replace(f"{tmp_path}/", ""))
    overrides = ["data.validation={}", "stages={experts: {steps: 1}}"]
    monkeypatch.chdir(tmp_path)
    config = load_config("run.yaml", overrides)
    train(*start(config))
    start(config, resume=True)
    assert "name: base" in Path("run/config.yaml").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model, _, found = load_model("../run")
    assert found.model.name == str(tmp_path / "base") and model.bank.names
    assert found.data.sources["vqa"].path == str(tmp_path / "vqa.jsonl")
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path, moved, ignore=shutil.ignore_patterns("moved"))
    for name in ("base", "run"):
        shutil.rmtree(tmp_path / name)
    monkeypatch.chdir(moved)
    assert load_model("run")[0].bank.names == model.bank.names
