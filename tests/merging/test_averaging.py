"""SWA over a run's steps: the mean of every trained part, in a folder that loads like a step."""

import json
import shutil

import pytest
import torch

from moa.build import build_model
from moa.checkpoint import TrainState, load_model, load_tensors, save_checkpoint
from moa.merging.checkpoints.averaging import average_steps, choose_steps, mean_state
from scripts import average_checkpoints as script
from tests.support.toy import toy_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three steps of a run, whose trained parts drift."""
    config = toy_config(tmp_path_factory.mktemp("toy"))
    folder = tmp_path_factory.mktemp("run")
    model = build_model(config)
    generator = torch.Generator().manual_seed(5)
    for step in (1, 2, 3):
        for parameter in (*model.bank.parameters(), *model.router.parameters()):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        save_checkpoint(folder, step, model, config, TrainState(progress={"step": step}))
    return folder


def tensors(folder):
    files = sorted(folder.glob("**/*.safetensors"))
    kept = [f for f in files if f.name not in ("optimizer.safetensors", "rng.safetensors")]
    return {f"{f.relative_to(folder)}:{k}": t for f in kept for k, t in load_tensors(f).items()}


@pytest.mark.slow
@pytest.mark.parametrize(("decay", "weights"), [(1.0, (1, 1)), (0.5, (1 / 3 * 2, 2 / 3 * 2))])
def test_the_average_is_the_weighted_mean_of_every_trained_part(run, tmp_path, decay, weights):
    script.main([f"run={run}", "last=2", f"decay={decay}", f"out={tmp_path / 'out'}"])
    two, three = (tensors(run / "checkpoints" / f"step-00000{step}") for step in (2, 3))
    found = tensors(tmp_path / "out")
    assert found.keys() == three.keys()
    for key, tensor in found.items():
        expected = (weights[0] * two[key].double() + weights[1] * three[key].double()) / 2
        torch.testing.assert_close(tensor, expected.to(tensor.dtype))
    assert any(not torch.equal(two[key], three[key]) for key in two if "experts" in key)
    assert any(not torch.equal(two[key], three[key]) for key in two if "router" in key)


@pytest.mark.slow
def test_the_average_loads_like_a_step(run, tmp_path):
    average_steps(tmp_path / "out", choose_steps(run, [1, 3], None))
    model, _, config = load_model(tmp_path / "out")
    name = next(iter(config.experts))
    stored = tensors(tmp_path / "out")
    for key, tensor in model.bank.state(name).items():
        assert any(t.shape == tensor.shape and torch.equal(t, tensor) for t in stored.values()), key
    assert json.loads((tmp_path / "out/average.json").read_text())["steps"] == ["step-000001", "step-000003"]
    with pytest.raises(ValueError, match="holds other things"):
        average_steps(run, choose_steps(run, [1], None))


def test_what_is_no_float_is_the_last_ones():
    states = [{"w": torch.tensor([float(i)]), "n": torch.tensor(i)} for i in (1, 2)]
    found = mean_state(states, torch.tensor([0.5, 0.5], dtype=torch.float64), "x")
    assert found["w"] == 1.5 and found["n"] == 2
    with pytest.raises(ValueError, match="x: w differs in shape or dtype"):
        mean_state([states[0], {**states[1], "w": torch.zeros(2)}], torch.ones(2, dtype=torch.float64), "x")


def test_wrong_steps_are_named(run, tmp_path, capsys):
    for arguments, message in (
        (["steps=[2,7]"], "has no step 7; choices: [1, 2, 3]"),
        (["last=9"], "last: must be 1 to 3"),
        ([], "steps, last: give one of the two"),
        (["steps=[2,2]"], "names one twice"),
        (["last=2", "decay=0"], "decay: must be above 0"),
    ):
        with pytest.raises(SystemExit):
            script.main([f"run={run}", f"out={tmp_path / 'out'}", *arguments])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_steps_of_other_experts_and_changed_files_are_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    steps = choose_steps(tmp_path / "run", [], 2)
    next(steps[0].glob("experts/*/adapter_config.json")).write_text("{}")
    with pytest.raises(ValueError, match="adapter_config.json"):
        average_steps(tmp_path / "out", steps)
