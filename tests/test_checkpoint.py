"""Checkpoints: whole or absent, strict, without pickle, and what they hold loads back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from moa import checkpoint
from moa.build import build_model
from moa.checkpoint import (
    TrainState,
    load_model,
    load_strictly,
    load_train_state,
    point,
    pointed,
    prune,
    save_checkpoint,
    save_tensors,
    step_folder,
    verify,
)
from moa.config import RunConfig, load_config
from tests.data.test_collate import sample
from tests.support.toy import toy_config


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    return toy_config(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def model(config):
    """A model whose every trained part differs from its start."""
    model = build_model(config)
    generator = torch.Generator().manual_seed(5)
    for parameter in (*model.bank.parameters(), *model.router.parameters()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


STATE = TrainState(
    progress={"step": 3, "best": []},
    optimizer={"experts/a:exp_avg": torch.arange(3.0)},
    rng={"cpu": torch.get_rng_state()[None]},
)


@pytest.fixture
def run(tmp_path, model, config) -> Path:
    save_checkpoint(tmp_path, 3, model, config, STATE)
    return tmp_path


@pytest.mark.slow
def test_a_checkpoint_loads_back_bit_for_bit(run, model):
    from data.sources import make_collator

    loaded, _, config = load_model(run)
    collate = make_collator(config, loaded.backbone.intake)
    batch = collate([sample(expert="vqa"), sample(task="grounding", expert="vqa", ocr=None)])
    with torch.no_grad():
        own, other = model(batch), loaded(batch)
    assert torch.equal(own.logits, other.logits) and torch.equal(own.gates, other.gates)
    state = load_train_state(step_folder(run))
    assert state.progress == STATE.progress
    assert torch.equal(state.optimizer["experts/a:exp_avg"], torch.arange(3.0))
    assert torch.equal(state.rng["cpu"], STATE.rng["cpu"])


def test_a_checkpoint_holds_plain_files_without_pickle(run):
    files = {p.suffix for p in run.rglob("*") if p.is_file()}
    assert files <= {".json", ".md", ".safetensors", ".yaml", ".jinja", ""}
    adapter = run / "checkpoints" / "step-000003" / "experts" / "vqa"
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_run_names_its_best_checkpoint_and_else_its_last(run, model, config):
    save_checkpoint(run, 6, model, config, STATE)
    assert step_folder(run).name == "step-000006"
    point(run, "best", "step-000003")
    assert step_folder(run).name == "step-000003"
    assert step_folder(run, prefer="last").name == "step-000006"
    assert step_folder(run / "checkpoints" / "step-000006").name == "step-000006"


@pytest.mark.parametrize(
    "name",
    ["experts/vqa/adapter_model.safetensors", "router.safetensors", "state.json", "manifest.json"],
)
def test_a_missing_file_is_named(run, name):
    (run / "checkpoints" / "step-000003" / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: missing"):
        load_model(run / "checkpoints" / "step-000003" if name != "manifest.json" else run)


def test_a_shortened_or_changed_file_is_named(run):
    folder = run / "checkpoints" / "step-000003"
    file = folder / "router.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"router\.safetensors: has \d+ bytes"):
        verify(folder)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"router\.safetensors: its content"):
        verify(folder)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a run"):
        load_model(tmp_path)


def test_tensors_of_another_config_are_refused_by_name():
    own = {"router.a": torch.zeros(2), "router.b": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"file: made for another config: lacks 1 .*router\.b"):
        load_strictly(own, {"router.a": torch.ones(2)}, Path("file"))
    with pytest.raises(ValueError, match=r"router\.b is \[4\] in the file, \[3\] in the model"):
        load_strictly(own, {"router.a": torch.ones(2), "router.b": torch.ones(4)}, Path("file"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # of a tokenizer
    ],
)
def test_a_full_disk_leaves_the_checkpoint_before_whole(run, model, config, monkeypatch, error):
    def full(file, tensors):
        if file.name == "optimizer.safetensors":
            file.write_bytes(b"half")
            raise error
        checkpoint.save_file(dict(tensors), file)

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with pytest.raises(OSError, match="step-000006 not written.*step-000003, is whole.*No space") as e:
        save_checkpoint(run, 6, model, config, STATE)
    assert e.value.errno == 28
    assert pointed(run, "last") == "step-000003"
    verify(run / "checkpoints" / "step-000003")
    assert [p.name for p in (run / "checkpoints").iterdir() if p.is_dir()] == ["step-000003"]


def test_old_checkpoints_go_and_the_best_and_the_newest_stay(run, model, config):
    point(run, "best", "step-000003")
    for step in (6, 9, 12):
        save_checkpoint(run, step, model, config, STATE)
    remnant = run / "checkpoints" / ".step-000015.abc"
    remnant.mkdir()
    prune(run, keep_last=2)
    left = sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_dir())
    assert left == ["step-000003", "step-000009", "step-000012"]


def test_the_best_steps_stay_beside_the_newest_and_those_with_a_name(run, model, config):
    for step in (6, 9, 12, 15):
        save_checkpoint(run, step, model, config, STATE)
    point(run, "best", "step-000009")
    prune(run, keep_last=1, best=[9, 3])
    left = sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_dir())
    assert left == ["step-000003", "step-000009", "step-000015"]


def test_an_expert_with_a_nan_is_not_written(run, model, config):
    factor = next(model.bank.parameters("vqa"))
    before = factor.data.clone()
    factor.data[0, 0] = float("nan")
    try:
        with pytest.raises(ValueError, match="expert vqa.*NaN"):
            save_checkpoint(run, 6, model, config, STATE)
    finally:
        factor.data.copy_(before)
    assert pointed(run, "last") == "step-000003"


@pytest.mark.slow
def test_the_projector_is_saved_where_it_is_trained(tmp_path, config):
    config = replace(config, model=replace(config.model, train_projector=True))
    model = build_model(config)
    weight = model.model.model.multi_modal_projector.linear_1.weight
    weight.data += 1
    save_checkpoint(tmp_path, 1, model, config, STATE)
    loaded, _, read = load_model(tmp_path)
    assert read == load_config(step_folder(tmp_path) / "config.yaml")
    assert replace(read, root=None) == config
    assert torch.equal(loaded.model.model.multi_modal_projector.linear_1.weight, weight)


def test_an_empty_tensor_is_never_written(tmp_path, model, config):
    """ZeRO-3 leaves empty tensors where it keeps the real ones in pieces."""
    file = tmp_path / "router.safetensors"
    with pytest.raises(ValueError, match=r"router\.safetensors: b is empty, and 1 others"):
        save_tensors(file, {"a": torch.ones(2), "c": torch.ones(2, 0), "b": torch.ones(0)})
    assert not file.exists()
    parameter = next(model.router.parameters())
    whole, parameter.data = parameter.data, torch.empty(0)
    with pytest.raises(ValueError, match=r"router\.safetensors: .* is empty"):
        save_checkpoint(tmp_path / "run", 3, model, config, STATE)
    parameter.data = whole
    assert not [*(tmp_path / "run" / "checkpoints").iterdir()]
