"""A loss or gradient that is not finite: the run stops, or leaves the step out and counts it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from moa.checkpoint import load_model, pointed, verify
from moa.cli.settings import as_mapping
from moa.config import RunConfig
from moa.training.run import Run
from moa.training.setup import make_accelerator, open_run
from moa.training.step import TrainingError
from tests import ROOT
from tests.support.launching import launch, launch_command
from tests.support.toy import read_log, toy_config
from tests.test_train import assert_close, steps_of
from train import train

JOINT = {"stages": {"joint": {"steps": 4}}, "data__validation": {}, "train__save_every": 1,
         "train__keep_last": 9}  # fmt: skip
SKIP = {"train__on_non_finite": "skip", **JOINT}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("world")


def spoil(run: Run, **steps: int) -> None:
    """The language head gives NaN at step `loss`; at step `gradient` its gradient is NaN alone."""

    def hook(head, arguments, logits):
        if run.step == steps.get("loss"):
            return logits * float("nan")
        if run.step == steps.get("gradient"):
            logits.register_hook(lambda gradient: gradient * float("nan"))
        return None

    run.model.model.lm_head.register_forward_hook(hook)


def run_spoiled(config: RunConfig, *, resume: bool = False, **steps: int) -> Run:
    AcceleratorState._reset_state(reset_partial_state=True)
    run, state = open_run(config, make_accelerator(config), resume=resume)
    spoil(run, **steps)
    train(run, state)
    return run


def checksums(config: RunConfig, step: int) -> dict[str, str]:
    """Of what a step may change: experts, router, moments."""
    manifest = Path(config.out) / "checkpoints" / f"step-{step:06d}" / "manifest.json"
    files = json.loads(manifest.read_text())
    return {
        name: entry["sha256"]
        for name, entry in files.items()
        if name.endswith(".safetensors") and not name.startswith("rng")
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loss", pytest.param("gradient", marks=pytest.mark.slow)])
def test_a_run_stops_at_its_first_and_goes_on_from_the_checkpoint_before(world, tmp_path, kind):
    config = toy_config(world, out=str(tmp_path / "run"), **JOINT)
    with pytest.raises(TrainingError) as error:
        run_spoiled(config, **{kind: 3})
    for part in ("step 3:", "not finite; nothing was updated", "rank 0: source",
                 "train.on_non_finite=skip"):  # fmt: skip
        assert part in str(error.value)
    assert pointed(tmp_path / "run", "last") == "step-000002"
    verify(tmp_path / "run" / "checkpoints" / "step-000002")
    model, *_ = load_model(config.out)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    skipping = replace(config, train=replace(config.train, on_non_finite="skip"))
    assert run_spoiled(skipping, resume=True, **{kind: 3}).non_finite_steps == 1
    assert [line["step"] for line in steps_of(config)] == [1, 2, 4]


@pytest.mark.slow
def test_a_step_that_is_left_out_changes_nothing_and_is_counted_in_log_state_and_at_the_end(world, tmp_path, capsys):
    config = toy_config(world, out=str(tmp_path / "run"), **SKIP)
    run_spoiled(config, loss=2, gradient=3)
    assert checksums(config, 1) == checksums(config, 2) == checksums(config, 3)
    assert checksums(config, 4).keys() == checksums(config, 3).keys()
    assert not checksums(config, 4).items() & checksums(config, 3).items()
    first, second = (line for line in read_log(config.out) if "not_finite" in line)
    assert (first["step"], first["non_finite_steps"]) == (2, 1)
    assert (second["step"], second["non_finite_steps"]) == (3, 2)
    assert "the loss is not finite" in first["not_finite"] and "rank 0" in first["not_finite"]
    assert "the norm of the gradient is nan" in second["not_finite"]
    assert [line["non_finite_steps"] for line in steps_of(config)] == [0, 2]
    assert "not updated at 2 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_more_such_steps_than_allowed_stop_the_run(world, tmp_path):
    config = toy_config(world, out=str(tmp_path / "run"), train__max_non_finite_steps=1, **SKIP)
    with pytest.raises(TrainingError, match=r"step 3: .*max_non_finite_steps=1 were before"):
        run_spoiled(config, loss=2, gradient=3)
    assert pointed(tmp_path / "run", "last") == "step-000002"


@pytest.mark.slow
def test_a_stage_whose_first_step_is_left_out_resumes_exactly(world, tmp_path):
    whole = toy_config(world, out=str(tmp_path / "whole"), **SKIP)
    run_spoiled(whole, loss=1)
    broken = replace(whole, out=str(tmp_path / "broken"))
    fewer = replace(broken, train=replace(broken.train, max_non_finite_steps=1))
    with pytest.raises(TrainingError):
        run_spoiled(fewer, loss=1, gradient=2)
    run_spoiled(broken, resume=True)
    assert read_log(broken.out) == read_log(whole.out)
    assert checksums(broken, 4) == checksums(whole, 4)


@pytest.mark.slow
def test_anchors_are_put_back_where_a_step_is_left_out(world, tmp_path):
    config = toy_config(
        world, out=str(tmp_path / "run"), **SKIP | {"stages": {"router": {"steps": 3}}},
        router={"hidden": 8, "kind": "anchors"},
    )  # fmt: skip
    run_spoiled(config, loss=2)
    assert checksums(config, 1) == checksums(config, 2) != checksums(config, 3)


# In several processes ---------------------------------------------------------------------------

ALIKE = {"router__modality_dropout": 0, "losses__load_balancing": 0, "train__micro_batch_size": 1}


def assert_left_out(config: RunConfig, plain: RunConfig) -> None:
    """Steps 2 and 3 were left out on both processes; the others are those of one process."""
    left_out = {line["step"]: line["not_finite"] for line in read_log(config.out) if "not_finite" in line}
    assert "rank 1: source" in left_out[2] and "rank 0" not in left_out[2]
    assert "rank 0: source" in left_out[3] and "rank 1: source" in left_out[3]
    assert_close(steps_of(config), steps_of(plain))
    (one, *_), (two, *_) = load_model(config.out), load_model(plain.out)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name


@pytest.mark.slow
def test_two_processes_with_offload_leave_out_the_step_of_one(world, tmp_path):
    """Every other way to share a model: test_distributed.py."""
    plain = toy_config(world, out=str(tmp_path / "plain"), **SKIP, **ALIKE)
    run_spoiled(plain, loss=2, gradient=3)
    offloaded = replace(plain, out=str(tmp_path / "spoiled"))
    (tmp_path / "run.json").write_text(json.dumps(as_mapping(offloaded)))
    script = str(ROOT / "tests" / "support" / "distributed.py")
    launch(launch_command("zero3_offload", script, str(tmp_path / "run.json")))
    assert_left_out(offloaded, plain)
