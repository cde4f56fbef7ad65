"""An expert that joins a finished run: the others stay, it learns from its own source, the router grows."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from data.mixture import Mixture
from moa.build import build_model
from moa.checkpoint import load_model
from moa.config import RunConfig, load_config
from moa.routing.kinds import learned_router
from moa.routing.router import AnchorRouter, Evidence, Router, axes_of
from moa.training.stages import at_site, first_position, in_places, start_weights
from tests.support.toy import toy_rows, toy_world, write_rows
from tests.test_model import make_model
from tests.test_train import log_of, run_killed, run_once, same_expert, steps_of

OLD = ("vqa", "caption", "grounding", "ocr_vqa")


def four_experts(folder: Path) -> dict:
    """A config of four experts, each with its own source and task, as plain data."""
    world = toy_world(folder)
    sources = {}
    for number, task in enumerate((*OLD, "count")):
        rows = [row | {"task": task, "question": f"{task}? {number}"}
                for row in toy_rows(folder, "vqa", 12)]  # fmt: skip
        path = write_rows(folder / f"{task}.jsonl", rows)
        sources[task] = {"format": "jsonl", "path": str(path), "expert": task}
    return world | {
        "out": str(folder / "four"),
        "experts": {name: {"rank": 2, "alpha": 4} for name in OLD},
        "router": {"hidden": 8, "modality_dropout": 0.0},
        "data": {"sources": {name: sources[name] for name in OLD}, "tasks": list(OLD)},
        "train": {"batch_size": 8, "save_every": 100},
        "stages": {"joint": {"steps": 30, "lr": {"experts": 0.01, "router": 0.03}}},
        "every_source": sources,
    }


def read(world: dict, file: Path) -> RunConfig:
    file.write_text(json.dumps({k: v for k, v in world.items() if k != "every_source"}))
    return load_config(file)


def with_a_fifth(world: dict, folder: Path, out: str = "five") -> RunConfig:
    """The stages and the frozen experts of configs/new_expert.yaml, on the run of four."""
    recipe = yaml.safe_load(Path("configs/new_expert.yaml").read_text())
    stages = recipe["stages"]
    stages["experts"] |= {"init_from": world["out"], "steps": 4, "warmup_steps": 0}
    stages["router"] |= {"steps": 12, "warmup_steps": 0, "lr": {"router": 0.01}}
    old = {name: {**world["experts"][name], "frozen": recipe["experts"][name]["frozen"]}
           for name in OLD}  # fmt: skip
    five = world | {
        "out": str(folder / out),
        "experts": {"count": {"rank": 3, "alpha": 6}, **old},  # in another order
        "data": {"sources": world["every_source"], "tasks": ["count", *OLD]},
        "train": {"batch_size": 8, "save_every": 3},
        "stages": stages,
    }
    return read(five, folder / f"{out}.json")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("world")
    world = four_experts(folder)
    run_once(read(world, folder / "four.json"))
    return world


@pytest.fixture(scope="module")
def five(world) -> RunConfig:
    config = with_a_fifth(world, Path(world["out"]).parent)
    run_once(config)
    return config


@pytest.mark.slow
def test_the_old_experts_stay_and_the_new_one_learns_from_its_source_alone(world, five):
    before, after = load_model(world["out"])[0], load_model(five.out)[0]
    assert all(same_expert(before, after, name) for name in OLD)
    assert not same_expert(build_model(five), after, "count")
    sources = [
        {key.removeprefix("source_loss/") for key in line if key.startswith("source_loss/")} for line in steps_of(five)
    ]
    assert sources[:4] == [{"count"}] * 4
    assert set().union(*sources[4:]) == {*OLD, "count"}


def test_the_gates_of_the_old_tasks_are_nearly_kept_and_the_new_task_finds_its_expert(world, five):
    last = steps_of(read(world, Path(world["out"]).parent / "four.json"))[-1]
    now = steps_of(five)[-1]
    for task in OLD:
        assert now[f"gates/{task}/{task}"] > 0.8 * last[f"gates/{task}/{task}"] > 0.5
        assert now[f"gates/{task}/count"] < 0.2
    assert now["gates/count/count"] > 0.5


@pytest.mark.slow
def test_a_run_whose_stages_name_their_sources_resumes_exactly(five, world, tmp_path, monkeypatch):
    for step in (4, 8):  # one after a checkpoint, in either stage
        killed = replace(five, out=str(tmp_path / f"killed-{step}"))
        run_killed(killed, step, monkeypatch)
        assert log_of(killed) == log_of(five)


@pytest.mark.slow
def test_before_training_the_old_experts_have_the_old_logits(world, tmp_path):
    config = with_a_fifth(world, tmp_path)
    grown, old = build_model(config), load_model(world["out"])[0]
    lines = start_weights(grown, config, config.stages["experts"])
    assert lines[-1].startswith("router from ") and lines[-1].endswith(", fresh for expert count, task count")
    generator = torch.Generator().manual_seed(0)
    encoder = old.router.encoders["image"]
    evidence = {
        "image_tokens": torch.randn(4, 5, encoder.norm.weight.numel(), generator=generator),
        "image_mask": torch.ones(4, 5, dtype=torch.bool),
        "text_tokens": torch.randn(4, 3, 32, generator=generator),
        "text_mask": torch.ones(4, 3, dtype=torch.bool),
        "ocr_tokens": torch.zeros(4, 1, 32), "ocr_boxes": torch.zeros(4, 1, 4),
        "ocr_confidence": torch.zeros(4, 1), "ocr_mask": torch.zeros(4, 1, dtype=torch.bool),
    }  # fmt: skip
    ids = torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        was = old.router(Evidence(**evidence, task_ids=ids))
        now = grown.router.eval()(Evidence(**evidence, task_ids=ids + 1))
    assert torch.equal(now[..., 1:], was)


def test_a_run_that_lacks_an_expert_of_the_checkpoint_is_refused(world, tmp_path):
    config = with_a_fifth(world, tmp_path)
    fewer = replace(
        config,
        experts={name: e for name, e in config.experts.items() if name != "vqa"},
        data=replace(config.data, sources={n: s for n, s in config.data.sources.items() if n != "vqa"}),
    )
    with pytest.raises(ValueError, match=r"stages.experts.init_from: .* has the experts .*'vqa'"):
        start_weights(build_model(fewer), fewer, config.stages["experts"])


@pytest.mark.slow
def test_a_router_of_other_settings_starts_fresh_and_names_them(world, tmp_path):
    config = with_a_fifth(world, tmp_path)
    other = replace(config, router=replace(config.router, hidden=16))
    lines = start_weights(build_model(other), other, config.stages["experts"])
    assert lines[-1].endswith("has another router.hidden")
    shared = replace(config, experts=config.experts | {"vqa": replace(config.experts["vqa"], gate="always")})
    lines = start_weights(build_model(shared), shared, config.stages["experts"])
    assert lines[-1].endswith("has another experts.vqa.gate")


def test_every_tensor_of_every_router_grows_by_experts_and_tasks():
    dims = {"image": 6, "text": 5}
    sizes = {"experts": 2, "num_tasks": 3, "dims": dims}
    more = {"experts": 4, "num_tasks": 5, "dims": dims}
    places = {"expert": [3, 1], "task": [2, 0, 4]}
    learned = {"sites": 7, "per_site": True, "learned_threshold": True, "learned_noise": True}
    table = {"sites": 7, "per_site": True, "modality_dropout": 0.0, "score": "table"}
    pairs = [
        (Router(**sizes, **learned), Router(**more, **learned)),
        (AnchorRouter(**sizes), AnchorRouter(**more)),
        (learned_router(**sizes, **table), learned_router(**more, **table)),
    ]
    for small, large in pairs:
        own = {key: torch.randn_like(value) for key, value in large.state_dict().items()}
        for key, found in small.state_dict().items():
            found = torch.randn_like(found)
            whole, fresh = in_places(own[key], found, axes_of(key), places), own[key].clone()
            rows = [places.get(axis) for axis in axes_of(key)]
            for place in itertools.product(*map(range, found.shape)):
                there = tuple(rows[i][n] if i < len(rows) and rows[i] else n
                              for i, n in enumerate(place))  # fmt: skip
                fresh[there] = found[place]
            assert torch.equal(whole, fresh), key


def test_a_row_of_a_token_router_that_is_no_experts_stays_the_last_one():
    found, own = torch.randn(3, 4), torch.randn(5, 4)
    whole = in_places(own, found, axes_of("token_router.layer"), {"expert": [3, 1]})
    assert whole.equal(torch.stack([own[0], found[1], own[2], found[0], found[2]]))


def test_the_rows_of_a_token_router_are_those_of_its_sites_experts():
    model = make_model("softmax", granularity="token")
    layer, other = list(model.bank.sites)[:2]
    model.bank.experts["caption"] = replace(model.bank.experts["caption"], sites=(layer,))
    names = {"expert": ["vqa", "caption", "grounding"], "task": ["a"]}
    assert at_site(model, f"token_router.{layer}", names) == names
    assert at_site(model, "router.head.3.weight", names) == names
    assert at_site(model, f"token_router.{other}", names) == {**names, "expert": ["vqa", "grounding"]}


# Sources of a stage -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sources", "message"),
    [(["colour"], "no such source 'colour'; choices: .*'vqa'"), ([], "names none"),
     (["vqa", "vqa"], "names 'vqa' twice")],
)  # fmt: skip
def test_a_stage_names_sources_that_there_are(world, tmp_path, sources, message):
    changed = world | {"stages": {"joint": {"steps": 1, "sources": sources}}}
    with pytest.raises(ValueError, match=f"stages.joint.sources: {message}"):
        read(changed, tmp_path / "run.json")


@pytest.mark.slow
def test_a_stage_of_experts_draws_from_one_that_learns(world, tmp_path):
    frozen = {"rank": 2, "alpha": 4, "frozen": True}
    stages = {"experts": {"steps": 1, "sources": ["vqa"]}}
    changed = world | {"stages": stages, "experts": world["experts"] | {"vqa": frozen}}
    with pytest.raises(ValueError, match=r"stages.experts: .* frozen experts alone: \['vqa'\]"):
        read(changed, tmp_path / "run.json")


def test_some_sources_of_a_mixture_keep_their_relative_shares():
    sources = {"a": range(5), "b": range(7), "c": range(9)}
    weighted = Mixture(sources, {"a": 1.0, "b": 2.0, "c": 5.0}, seed=3).only(["c", "a"])
    assert weighted.names == ["a", "c"] and weighted.quotas == [167, 833]
    drawn = Mixture(sources, draws={"a": 10, "b": 7, "c": 3}, seed=3).only(["a", "c"])
    assert [share.draws for share in drawn.epoch()] == [10, 3]
    assert {drawn.locate(i)[0] for i in range(26)} == {"a", "c"}


def test_stages_of_the_same_sources_walk_on_and_others_begin_at_theirs(world, tmp_path):
    drawn = ((2, None), (3, ["vqa"]), (4, None), (5, ["vqa"]), (1, ["caption"]))
    stages = {f"stage_{number}": {"trains": "joint", "steps": steps, "sources": sources}
              for number, (steps, sources) in enumerate(drawn)}  # fmt: skip
    config = read(world | {"stages": stages}, tmp_path / "run.json")
    assert [first_position(config, n, 10) for n in range(5)] == [0, 0, 20, 30, 0]
