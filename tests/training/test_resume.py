"""One run that goes on with other processes, and shares its model in other ways, along its way."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moa.checkpoint import load_model
from moa.config import RunConfig, load_config
from moa.training.setup import changed_launch, make_accelerator, open_run
from tests.support.ranks import run_ranks
from tests.support.toy import toy_config
from tests.test_train import run_once, steps_of
from train import train

# no draws: they belong to a process; and losses that are sums over samples
CHANGES = {"router__modality_dropout": 0, "losses__load_balancing": 0, "train__save_every": 1,
           "train__keep_last": 9, "train__micro_batch_size": 1, "data__validation": {},
           "stages": {"experts": {"steps": 1}, "joint": {"steps": 6}}}  # fmt: skip


def go_on(out: str, file: str, overrides: list[str], environment: dict[str, str]) -> None:
    """What train.py --resume does."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    config = load_config(file, [*overrides, f"out={out}"])
    train(*open_run(config, make_accelerator(config), resume=True))


def resume_at(config: RunConfig, step: int) -> None:
    """Let the run go on from its checkpoint of `step`."""
    (Path(config.out) / "checkpoints" / "last").write_text(f"step-{step:06d}\n")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles an operator")
def test_a_run_goes_on_from_one_process_to_zero_3_to_ddp_to_one(tmp_path, capsys):
    pytest.importorskip("deepspeed")
    whole = toy_config(tmp_path, out=str(tmp_path / "whole"), **CHANGES)
    run_once(whole)
    moving = replace(whole, out=str(tmp_path / "moving"))
    shutil.copytree(whole.out, moving.out)
    overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in CHANGES.items()]
    settings = tmp_path / "zero.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}  # shard every tensor
    settings.write_text(json.dumps({"zero_optimization": zero}))
    sharded = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu",
               "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(settings),
               "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}  # fmt: skip
    plain = {"ACCELERATE_USE_CPU": "true"}
    for step, kind, environment in ((3, "zero3", sharded), (4, "multi_cpu", plain)):
        resume_at(moving, step)
        arguments = (moving.out, str(tmp_path / "run.yaml"), overrides, environment)
        assert run_ranks(go_on, *arguments, preload="tests.test_train") == [None, None]
        state = json.loads((Path(moving.out) / "checkpoints/step-000006/state.json").read_text())
        assert (state["num_processes"], state["distributed"]) == (2, kind)
        assert_same(moving, whole)
    resume_at(moving, 5)
    capsys.readouterr()
    run_once(moving, resume=True)
    assert "saved by 2 x multi_cpu, goes on with 1 x no: experts" in capsys.readouterr().out
    assert_same(moving, whole)


def assert_same(run: RunConfig, other: RunConfig) -> None:
    """Losses, norms and final weights, to fp32 rounding."""
    for one, two in zip(steps_of(run), steps_of(other), strict=True):
        for key in ("step", "loss", "grad_norm", "lr/experts", "tokens_read"):
            assert one[key] == pytest.approx(two[key], rel=1e-5), (key, one, two)
    (one, *_), (two, *_) = load_model(run.out), load_model(other.out)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_the_resume_says_what_carries_over():
    one, two = ({"num_processes": n, "distributed": kind} for n, kind in ((1, "no"), (2, "ddp")))
    zero = {"num_processes": 2, "distributed": "deepspeed"}
    assert changed_launch(two, two) == ""
    assert "moments and step counts carry over; random states do not" in changed_launch(one, two)
    assert changed_launch(zero, two).endswith("random states too")
