"""The contract of every preset: what its stages train, what decides its gates, checkpoints, exports and restarts."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from moa.build import build_mixture, import_to_train, open_adapters
from moa.checkpoint import TrainState, restore_model, save_checkpoint
from moa.config import RunConfig, load_config
from moa.merging import adapters
from moa.merging.run import plan_merge
from moa.merging.settings import MergeExperts
from moa.merging.source import Source, check_linear
from moa.model import MixtureModel
from moa.training.stages import parameter_groups, set_trainable, stage_gates
from scripts import presets
from tests.cli.test_presets import DEMO, backbone, preset_config, shrunk
from tests.support.tiny import tiny_batch
from tests.support.toy import read_log, toy_world
from tests.test_model import close, rows
from tests.test_train import assert_same_weights, run_killed, run_once


def all_random(model: MixtureModel, config: RunConfig) -> None:
    """Whatever any stage may train, and the means of a router that learns by these."""
    torch.manual_seed(0)
    for group in parameter_groups(model, config).values():
        for parameter in group.values():
            torch.nn.init.normal_(parameter, std=0.3)
    if model.routing.kind.learns == "means":
        model.update_anchors(tiny_batch(backbone().processor, experts=[0, 1, 2, 3]))


def every_stage_trains_by_any_sample(model: MixtureModel, config: RunConfig) -> None:
    """As processes that add their gradients up must: each parameter of a stage has one, whatever the batch holds."""
    one, weights = rows(tiny_batch(backbone().processor), [1]), dataclasses.asdict(config.losses)
    for stage in config.stages.values():
        groups = set_trainable(model, parameter_groups(model, config), stage)
        learned = {key: p for group in groups.values() for key, p in group.items()}
        if learned:  # else by means
            out = model(one, stage_gates(model, one, stage))
            (out.loss_per_sample.sum() + sum(weights[key] * value for key, value in out.aux.items())).backward()
        assert [key for key, p in learned.items() if p.grad is None] == []
        model.zero_grad()


def samples_decide_alone_and_before_they_answer(model: MixtureModel, whole: torch.Tensor) -> None:
    """Given the logits of the answers: in another batch, with padding behind other answers, and with a cache."""
    processor, experts = backbone().processor, [0, 1, 2, 3]
    part = model(rows(tiny_batch(processor, experts=experts), [3, 0])).logits
    close(part[:, :2], whole[[3, 0], :2])
    other = tiny_batch(processor, experts=experts, answers=["yes", "no", "<loc0001> and more", "blue"], pad=3)
    close(model(other).logits[:, 0], whole[:, 0])  # what follows the prompt
    prompt = tiny_batch(processor, experts=experts, answers=None, left=True)
    length = {"max_new_tokens": 2, "min_new_tokens": 2, "suppress_tokens": [model.model.config.image_token_id]}
    cached, again = (model.answering().generate(prompt, use_cache=use, **length) for use in (True, False))
    assert torch.equal(cached, again)


def exported(config: RunConfig, step: Path) -> str:
    """What scripts.merge does with a run: `refused`, `approximate` where it has to be asked for, or `exact`."""
    try:
        check_linear(config, config.experts)
    except ValueError as error:
        assert str(error).startswith("experts.")
        return "refused"
    folders = [step / "experts" / name for name in config.experts]
    source = Source(experts=adapters.open_adapters(folders), folders=folders, base_name=None, config=config)
    settings = MergeExperts(run=str(step), weights=dict.fromkeys(config.experts, 1.0))
    try:
        plan_merge(settings, source, Console(quiet=True))
    except ValueError as error:
        assert "approximate=true" in str(error)
        plan_merge(dataclasses.replace(settings, approximate=True), source, Console(quiet=True))
        return "approximate"
    return "exact"


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMO)
def test_a_preset_keeps_the_contract(name, tmp_path):
    config, base = shrunk(preset_config(name)), backbone()
    model = build_mixture(config, base, {}).eval()
    try:
        all_random(model, config)
        every_stage_trains_by_any_sample(model, config)
        batch = tiny_batch(base.processor, experts=[0, 1, 2, 3])
        with torch.no_grad():
            whole = model(batch).logits
            samples_decide_alone_and_before_they_answer(model, whole)
            step = save_checkpoint(tmp_path, 1, model, config, TrainState(progress={}))
            model.bank.detach(base.model)
            headers = open_adapters(config, step / "experts")
            model = build_mixture(config, base, headers, import_to_train).eval()
            restore_model(model, step, config)
            assert torch.equal(model(batch).logits, whole)
        assert exported(config, step) == presets.exportable(config).split()[0]
    finally:
        model.bank.detach(base.model)


RESUMED = ["adapter_fusion", "comol", "smolora", "tc_moa"]  # mechanisms that no other test kills


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_run_of_a_preset_goes_on_to_the_losses_of_the_unbroken_one(name, tmp_path, monkeypatch):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(toy_world(tmp_path)))
    steps = ["stages.experts.warmup_steps=0", *(f"stages.{s}.steps=1" for s in ("experts", "router", "joint"))]
    changes = [*steps, "train.save_every=1", "train.gradient_checkpointing=true", "data.validation={}"]
    whole, broken = (
        shrunk(load_config([file, presets.path_of(name)], [*changes, f"out={tmp_path / run}"])) for run in ("a", "b")
    )
    run_once(whole)
    run_killed(broken, 2, monkeypatch)
    assert read_log(broken.out) == read_log(whole.out)
    assert_same_weights(broken, whole)
