"""Shapes of a mixture in training: shared experts, upcycling, and schedules of gates."""

import pytest
import torch

from moa.build import build_model
from moa.checkpoint import load_model
from moa.config import RunConfig
from moa.sections import StageConfig
from moa.training.stages import copy_expert
from tests.support.toy import read_log, toy_config
from tests.test_train import run_killed, run_once

EQUAL = {"vqa": {"rank": 2, "alpha": 4}, "grounding": {"rank": 2, "alpha": 4}}
SHARED = {"common": {"rank": 2, "gate": "always"}, **EQUAL}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tmp_path_factory.mktemp("world")


def factors(config: RunConfig, step: str, name: str) -> dict[str, torch.Tensor]:
    return load_model(f"{config.out}/checkpoints/{step}")[0].bank.state(name)


def steps_of(config: RunConfig) -> list[dict]:
    return [line for line in read_log(config.out) if "loss" in line]


@pytest.mark.slow
def test_a_shared_expert_learns_from_every_sample_and_the_run_resumes_exactly(world, tmp_path, monkeypatch):
    experts = {"steps": 3, "gates": {"leak": 0.2, "dropout": 0.3}}
    stages = {"experts": experts, "joint": {"steps": 2, "gates": {"blend": 0.5, "blend_to": "sum"}}}
    changes = {"experts": SHARED, "stages": stages, "train__save_every": 1}
    whole = toy_config(world, out=str(tmp_path / "whole"), **changes)
    broken = toy_config(world, out=str(tmp_path / "broken"), **changes)
    run_once(whole)
    lines = steps_of(whole)
    gates = [{k[6:]: v for k, v in line.items() if k.startswith("gates/")} for line in lines]
    assert all(v == 1 for row in gates for k, v in row.items() if k.endswith("/common"))
    leaked = [(row["vqa/vqa"], row["vqa/grounding"]) for row in gates[:3]]  # means, 0 where all were dropped
    assert all(own == pytest.approx(9 * other) for own, other in leaked) and max(leaked) > (0, 0)
    run_killed(broken, 4, monkeypatch)
    assert read_log(broken.out) == read_log(whole.out)


@pytest.mark.slow
def test_upcycling_trains_one_expert_on_all_samples_and_copies_it_into_the_others(world, tmp_path):
    copied = {"steps": 1, "copy_of": "vqa", "lr": {"experts": 0.0}}
    stages = {"one": {"trains": "experts", "expert": "vqa", "steps": 2}, "experts": copied}
    config = toy_config(world, out=str(tmp_path / "run"), experts=EQUAL, stages=stages, train__save_every=1)
    run_once(config)
    one, other = (factors(config, "step-000002", name) for name in EQUAL)
    assert all(bool(t.any()) for t in one.values())
    assert not any(bool(t.any()) for key, t in other.items() if "lora_B" in key)  # it has learned nothing
    assert steps_of(config)[0]["gates/grounding/vqa"] == 1
    for name in EQUAL:
        copy = factors(config, "step-000003", name)
        assert all(torch.equal(one[key], copy[key]) for key in one)


@pytest.mark.slow
def test_a_null_expert_takes_its_share_of_the_copies_and_a_line_says_so(world):
    model = build_model(toy_config(world, experts=EQUAL, router__null_expert=True))
    lines = copy_expert(model, StageConfig(name="joint", steps=1, copy_of="vqa"))
    assert lines == ["experts grounding as copies of vqa, less the null expert's share of the gates"]


@pytest.mark.slow
def test_a_copy_of_a_fresh_expert_is_refused(world, tmp_path):
    config = toy_config(world, out=str(tmp_path / "run"), experts=EQUAL, stages__experts__copy_of="vqa")
    with pytest.raises(ValueError, match=r"stages\.experts\.copy_of: vqa is fresh in the first stage"):
        run_once(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages__experts__copy_of": "nobody"}, "stages.experts.copy_of: no such expert 'nobody'"),
        ({"stages__experts__gates__dropout": 0.5}, "stages.experts.gates.dropout: leaves samples without any expert"),
        ({"stages__joint__gates__leak": 0.5}, "stages.joint.gates.leak: needs trains=experts"),
        ({"stages__joint__expert": "vqa"}, "stages.joint.expert: needs trains=experts"),
        (
            {"experts__third": {"rank": 2}, "experts__vqa__gate": "confidence"},
            "stages.experts.gates.leak: experts.vqa has the gate 0 here",
        ),
        ({"experts__vqa__gate": "with:other"}, "experts.vqa.gate: no such expert 'other'"),
        ({"stages__experts__copy_of": "grounding"}, "vqa has another rank, alpha, targets, init or rank_gates"),
        ({"experts": {"one": {"gate": "always"}}, "data__expert": "one"}, "router.kind: softmax has nothing to choose"),
    ],
)
def test_a_shape_that_cannot_work_is_refused_by_its_key(world, changes, message):
    with pytest.raises(ValueError) as caught:
        toy_config(world, **changes)
    assert message in str(caught.value)
