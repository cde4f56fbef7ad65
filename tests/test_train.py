"""Training end to end on the toy world: stages, kill and resume, checks, and what a run leaves."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file

from data.checks import BadSampleError
from moa.build import build_model
from moa.checkpoint import load_model, manifest_of, pointed
from moa.config import RunConfig
from moa.files.atomic import write_json
from moa.files.peft import save_expert
from moa.merging.adapters import expert_from_folder
from moa.merging.export.export import export_adapter
from moa.merging.merge import merge
from moa.sections import StageConfig
from moa.training import run as run_module
from moa.training.batches import Layout, make_layout
from moa.training.optimizer import rate_factor
from moa.training.report import keep_lines
from moa.training.setup import make_accelerator, open_run
from moa.training.step import TrainingError
from tests.support.tiny import random_image
from tests.support.toy import read_log, toy_config, toy_rows, write_rows
from train import train

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("world")


def run_once(config: RunConfig, *, resume: bool = False, overwrite: bool = False):
    AcceleratorState._reset_state(reset_partial_state=True)
    run, state = open_run(config, make_accelerator(config), resume=resume, overwrite=overwrite)
    train(run, state)
    return run


def log_of(config: RunConfig) -> list[dict]:
    return read_log(config.out)


def steps_of(config: RunConfig) -> list[dict]:
    return [line for line in log_of(config) if "loss" in line]


@pytest.fixture(scope="module")
def unbroken(world) -> RunConfig:
    """Three stages of 5, 4 and 3 steps without a break."""
    config = toy_config(world)
    run_once(config)
    return config


def test_a_run_goes_through_its_stages_and_logs_every_step(unbroken):
    lines = steps_of(unbroken)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["stage"] for line in lines] == ["experts"] * 5 + ["router"] * 4 + ["joint"] * 3
    assert {"loss/vqa", "gates/vqa/grounding", "entropy", "grad_norm", "lr/router"} <= set(lines[9])
    validated = [line["step"] for line in log_of(unbroken) if "validation" in line]
    assert validated == [4, 5, 8, 9, 12]


def test_the_log_has_each_sources_loss(world, unbroken):
    for line in steps_of(unbroken):
        tasks = {key[5:]: value for key, value in line.items() if key.startswith("loss/")}
        sources = {k[12:]: v for k, v in line.items() if k.startswith("source_loss/")}
        assert sources == pytest.approx(tasks)  # in the toy world a source is a task


@pytest.mark.slow
def test_packed_rows_give_the_same_losses_and_counts(world, unbroken, tmp_path):
    packed = toy_config(
        world,
        out=str(tmp_path / "packed"),
        train__pack_length=300,
        prompt__max_length=300,
    )
    run_once(packed)
    for line, other in zip(log_of(packed), log_of(unbroken), strict=True):
        assert line.pop("stage") == other.pop("stage")
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_a_grouped_order_resumes_to_the_same_losses(world, tmp_path, monkeypatch):
    changes = {"data__group_by_length": True, "data__group_window": 3}
    config = toy_config(world, out=str(tmp_path / "whole"), **changes)
    run_once(config)
    again = toy_config(world, out=str(tmp_path / "killed"), **changes)
    kill_at(8, monkeypatch)
    with pytest.raises(Killed):
        run_once(again)
    monkeypatch.undo()
    run_once(again, resume=True)
    assert log_of(again) == log_of(config)


def test_the_stage_experts_uses_the_samples_own_expert(unbroken):
    for line in steps_of(unbroken)[:5]:
        assert line.get("gates/vqa/vqa", 1.0) == 1.0
        assert line.get("gates/grounding/vqa", 0.0) == 0.0


@pytest.mark.slow
def test_training_lowers_the_loss_and_the_router_learns_its_guidance(world):
    config = toy_config(
        world, out=str(world / "longer"), data__validation={}, losses__load_balancing=0,
        stages={"experts": {"steps": 30, "lr": {"experts": 0.05}},
                "router": {"steps": 20, "lr": {"router": 0.02}}},
    )  # fmt: skip
    run_once(config)
    losses = [line["loss"] for line in steps_of(config)]
    assert sum(losses[25:30]) / 5 < losses[0] - 0.3
    guidance = [line["aux/guidance"] for line in steps_of(config)[30:]]
    assert guidance[-1] < 0.5 * guidance[0]


class Killed(Exception):
    pass


def kill_at(step: int, monkeypatch) -> None:
    """Stop right after the log line of `step`, before anything due at that step is saved."""
    record = run_module.Reporter.step

    def dying(self, line):
        record(self, line)
        if line["step"] == step:
            raise Killed

    monkeypatch.setattr(run_module.Reporter, "step", dying)


def run_killed(config: RunConfig, step: int, monkeypatch) -> None:
    """A run that is killed at this step and continued to its end."""
    with monkeypatch.context() as patch:
        kill_at(step, patch)
        with pytest.raises(Killed):
            run_once(config)
    run_once(config, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("step", [8])
def test_a_killed_run_goes_on_to_the_losses_of_the_unbroken_one(world, unbroken, step, monkeypatch, tmp_path):
    config = replace(unbroken, out=str(tmp_path / "killed"))
    run_killed(config, step, monkeypatch)
    assert log_of(config) == log_of(unbroken)
    assert_same_weights(config, unbroken)
    for name in ("best", "last"):
        assert pointed(Path(config.out), name) == pointed(Path(unbroken.out), name)


@pytest.mark.slow
def test_two_runs_of_one_seed_are_bit_identical_and_of_another_seed_are_not(world, tmp_path):
    changes = {"stages": {"joint": {"steps": 2}}, "data__validation": {}}
    one, two, other = (
        toy_config(world, out=str(tmp_path / name), seed=seed, **changes)
        for name, seed in (("one", 1), ("two", 1), ("other", 2))
    )
    for config in (one, two, other):
        run_once(config)
    assert log_of(one) == log_of(two)
    assert_same_weights(one, two)
    assert log_of(one) != log_of(other)


@pytest.mark.slow
def test_the_best_checkpoints_of_a_stage_are_kept_and_best_names_the_first(world, tmp_path, monkeypatch):
    losses = iter([3.0, float("nan"), 1.0, 2.0, 1.0])
    monkeypatch.setattr(run_module, "validation_losses", lambda *a, **k: {"validation": next(losses)})
    config = toy_config(
        world, out=str(tmp_path / "run"), eval__every=1, train__keep_best=2, train__keep_last=1,
        train__save_every=100, stages={"joint": {"steps": 5}},
    )  # fmt: skip
    run_once(config)
    folders = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert [folder.name for folder in folders] == ["step-000003", "step-000005"]
    assert pointed(tmp_path / "run", "best") == "step-000003"  # of equals the first
    scores = [{"step": 3, "validation": 1.0}, {"step": 5, "validation": 1.0}]
    assert json.loads((folders[1] / "state.json").read_text())["best"] == scores


def assert_same_weights(config: RunConfig, other: RunConfig) -> None:
    (one, *_), (two, *_) = load_model(config.out), load_model(other.out)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
def test_a_run_that_is_done_resumes_to_nothing(unbroken):
    before = (Path(unbroken.out) / "log.jsonl").read_text()
    run_once(unbroken, resume=True)
    assert (Path(unbroken.out) / "log.jsonl").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [2])
def test_worker_processes_change_nothing_even_across_a_resume(unbroken, monkeypatch, tmp_path, num_workers):
    data = replace(unbroken.data, num_workers=num_workers)
    config = replace(unbroken, out=str(tmp_path / "workers"), data=data)
    with monkeypatch.context() as patch:
        kill_at(7, patch)
        with pytest.raises(Killed):
            run_once(config)
    run_once(replace(config, data=unbroken.data), resume=True)
    assert log_of(config) == log_of(unbroken)
    assert_same_weights(config, unbroken)


@pytest.mark.slow
def test_accumulation_gives_the_whole_batchs_losses(world, tmp_path):
    whole, parts = (
        toy_config(
            world, out=str(tmp_path / name), train__micro_batch_size=size,
            router__modality_dropout=0, losses__load_balancing=0,
        )
        for name, size in (("whole", 4), ("parts", 1))
    )  # fmt: skip
    run_once(whole)
    run_once(parts)
    assert_close(log_of(whole), log_of(parts))


def assert_close(lines: list[dict], others: list[dict]) -> None:
    for one, other in zip(lines, others, strict=True):
        for key in ("step", "loss", "grad_norm", "validation", "aux/guidance"):
            assert one.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-4), (one, other)


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_losses(world, tmp_path):
    changes = {"stages": {"joint": {"steps": 3}}, "data__validation": {}}
    plain = toy_config(world, out=str(tmp_path / "plain"), **changes)
    saving = toy_config(world, out=str(tmp_path / "saving"), train__gradient_checkpointing=True, **changes)
    run_once(plain)
    run_once(saving)
    for one, other in zip(steps_of(plain), steps_of(saving), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


KINDS = [
    {"kind": "softmax", "per_site": True},
    pytest.param({"kind": "threshold", "granularity": "token", "noise": "gaussian", "score": "cosine"}, marks=SLOW),
    pytest.param({"kind": "sigmoid", "granularity": "token", "share": "module", "pool": "prompt_mean"}, marks=SLOW),
    pytest.param({"kind": "anchors"}, marks=SLOW),
]


@pytest.mark.slow
@pytest.mark.parametrize("router", KINDS, ids=str)
def test_every_router_kind_trains_and_resumes_exactly(world, tmp_path, monkeypatch, router):
    stages = {"experts": {"steps": 1}, "router": {"steps": 3}}
    changes = {"router": {"hidden": 8, **router}, "stages": stages, "train__save_every": 1}
    whole = toy_config(world, out=str(tmp_path / "whole"), **changes)
    broken = toy_config(world, out=str(tmp_path / "broken"), **changes)
    run_once(whole)
    run_killed(broken, 3, monkeypatch)
    assert log_of(broken) == log_of(whole)
    assert_same_weights(broken, whole)


@pytest.mark.slow
def test_the_stage_router_moves_the_router_alone_and_a_frozen_expert_never_moves(world, tmp_path):
    frozen = {"vqa": {"rank": 2, "alpha": 4, "frozen": True}, "grounding": {"rank": 3, "alpha": 3}}
    config = toy_config(world, out=str(tmp_path / "run"), experts=frozen, data__validation={},
                        train__weight_decay=0.1)  # fmt: skip
    before = build_model(config)
    run_once(config)
    after, *_ = load_model(config.out)
    assert same_expert(before, after, "vqa") and not same_expert(before, after, "grounding")
    router_only = toy_config(world, out=str(tmp_path / "second"), data__validation={},
                             stages={"router": {"steps": 2}})  # fmt: skip
    before = build_model(router_only)
    run_once(router_only)
    after, *_ = load_model(router_only.out)
    assert same_expert(before, after, "vqa") and same_expert(before, after, "grounding")
    changed = [not torch.equal(a, b) for a, b in
               zip(before.router.parameters(), after.router.parameters(), strict=True)]  # fmt: skip
    assert any(changed)


def same_expert(one, other, name: str) -> bool:
    pairs = zip(one.bank.parameters(name), other.bank.parameters(name), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_the_projector_is_trained_saved_and_resumed_where_asked_for(world, tmp_path, monkeypatch):
    changes = {"model__train_projector": True, "train__save_every": 1, "data__validation": {},
               "stages": {"joint": {"steps": 3, "lr": {"projector": 0.01}}}}  # fmt: skip
    whole = toy_config(world, out=str(tmp_path / "whole"), **changes)
    broken = toy_config(world, out=str(tmp_path / "broken"), **changes)
    run_once(whole)
    run_killed(broken, 2, monkeypatch)
    assert log_of(broken) == log_of(whole)
    before = build_model(whole).model.model.multi_modal_projector.linear_1.weight
    after = load_model(whole.out)[0].model.model.multi_modal_projector.linear_1.weight
    assert not torch.equal(before, after)


@pytest.mark.slow
def test_a_stage_starts_from_a_run_and_a_router_of_another_config_starts_fresh(world, unbroken, tmp_path):
    stages = {"router": {"steps": 1, "init_from": unbroken.out}}
    config = toy_config(world, out=str(tmp_path / "same"), stages=stages)
    assert same_expert(load_model(unbroken.out)[0], run_once(config).model, "grounding")
    other = toy_config(world, out=str(tmp_path / "other"), stages=stages,
                       router__evidence=["image"])  # fmt: skip
    assert same_expert(load_model(unbroken.out)[0], run_once(other).model, "grounding")


@pytest.mark.slow
def test_a_stage_starts_from_peft_folders_and_refuses_one_of_another_scale(world, unbroken, tmp_path):
    last = Path(unbroken.out) / "checkpoints" / pointed(Path(unbroken.out), "last")
    source = {"vqa": str(last / "experts" / "vqa")}
    stages = {"router": {"steps": 1, "init_from": source}}
    config = toy_config(world, out=str(tmp_path / "run"), stages=stages)
    model = run_once(config).model
    assert same_expert(load_model(last)[0], model, "vqa")
    assert not same_expert(load_model(last)[0], model, "grounding")
    scaled = toy_config(world, out=str(tmp_path / "scaled"), stages=stages,
                        experts={"vqa": {"rank": 2, "alpha": 5}, "grounding": {}})  # fmt: skip
    with pytest.raises(ValueError, match="scaling .alpha / rank. is 2.0 at .* and 2.5 by"):
        run_once(scaled)


@pytest.mark.slow
def test_an_expert_starts_from_its_own_peft_folder(world, unbroken, tmp_path):
    last = Path(unbroken.out) / "checkpoints" / pointed(Path(unbroken.out), "last")
    experts = {"new": {"init_from": str(last / "experts" / "vqa")}}
    config = toy_config(world, out=str(tmp_path / "run"), experts=experts, data__expert="new",
                        router__kind="fixed", stages={"experts": {"steps": 1}},
                        data__validation={})  # fmt: skip
    model = build_model(config)
    assert torch.equal(next(model.bank.parameters("new")),
                       next(load_model(last)[0].bank.parameters("vqa")))  # fmt: skip
    run_once(config)
    assert load_model(config.out)[0].bank.names == ["new"]


@pytest.mark.slow
def test_training_goes_on_from_a_merge_and_begins_with_its_loss(world, unbroken, tmp_path):
    last = Path(unbroken.out) / "checkpoints" / pointed(Path(unbroken.out), "last")
    experts = [expert_from_folder(last / "experts" / name) for name in ("vqa", "grounding")]
    export_adapter(tmp_path / "merged", merge(experts, weights={"vqa": 0.7, "grounding": 0.3}), experts)
    alone = {"experts": {"all": {"init_from": str(tmp_path / "merged")}}, "data__expert": "all",
             "router__kind": "fixed", "data__validation": {}, "stages": {"joint": {"steps": 2}}}  # fmt: skip
    run = run_once(toy_config(world, out=str(tmp_path / "run"), **alone))
    batch, _ = run.collator.split([run.mixture[position] for position in range(4)])
    with torch.no_grad():
        whole = load_model(last)[0](batch, torch.tensor([[0.7, 0.3]]).expand(4, -1))
    first, second = steps_of(run.config)
    assert first["loss"] == pytest.approx(float(whole.loss_per_sample.mean()), rel=1e-5) != second["loss"]


@pytest.mark.slow
def test_a_trainable_tensor_without_a_gradient_stops_the_run_by_name(world, tmp_path):
    config = toy_config(world, out=str(tmp_path / "run"), stages={"joint": {"steps": 2}})
    AcceleratorState._reset_state(reset_partial_state=True)
    run, state = open_run(config, make_accelerator(config))
    run.model.router.forgotten = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(TrainingError, match="1 trainable tensors have no gradient: .*forgotten"):
        train(run, state)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_step_rank_and_samples(world, tmp_path):
    config = toy_config(world, out=str(tmp_path / "run"), train__save_every=1)
    AcceleratorState._reset_state(reset_partial_state=True)
    run, state = open_run(config, make_accelerator(config))
    run.model.model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(TrainingError) as error:
        train(run, state)
    assert "step 1: the loss is not finite" in str(error.value)
    assert "rank 0: source" in str(error.value) and "jsonl:" in str(error.value)


def with_bad_rows(world: Path, folder: Path, policy: str) -> RunConfig:
    """The toy world, where every third vqa row has no picture."""
    config = toy_config(world)
    source = Path(config.data.sources["vqa"].path)
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["image"] = "nowhere.png" if i % 3 == 0 else row["image"]
    path = write_rows(folder / "vqa.jsonl", rows)
    sources = {"vqa": {"format": "jsonl", "path": str(path), "expert": "vqa",
                "images": str(source.parent)}}  # fmt: skip
    return toy_config(
        world, out=str(folder / "run"), data__sources=sources, data__on_bad_sample=policy,
        data__validation={"vqa": {**sources["vqa"], "num_samples": 4}},
        stages={"experts": {"steps": 6}},
    )  # fmt: skip


@pytest.mark.slow
def test_a_bad_row_stops_the_run_with_its_file_row_and_rule(world, tmp_path):
    with pytest.raises(BadSampleError, match=r"vqa\.jsonl:\d+: missing image.*on_bad_sample=skip"):
        run_once(with_bad_rows(world, tmp_path, "error"))


@pytest.mark.slow
def test_bad_rows_are_left_out_counted_and_reported_where_the_config_says_so(world, tmp_path, capsys):
    config = with_bad_rows(world, tmp_path, "skip")
    run = run_once(config)
    assert run.skipped == {"missing image": 8}  # of 24 rows, one pass
    assert steps_of(config)[-1]["skipped"] == 8
    assert sum(line["samples"] for line in steps_of(config)) == 16
    assert [v["validation_skipped"] for v in log_of(config) if "validation" in v] == [2, 2]
    assert "left out: 8 x missing image" in capsys.readouterr().out


def poison(folder: Path) -> dict[str, str]:
    """Four pictures that cannot be used -> the rule that each is counted by."""
    random_image(1, 200, 200).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").touch()
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")  # 400 million pixels in 50 kB
    return {"truncated.png": "broken image", "empty.png": "broken image",
            "bomb.png": "image too large", "nowhere.png": "missing image"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_source_with_one_percent_of_broken_pictures_trains_to_the_end_with_exact_counts(world, tmp_path, num_workers):
    config, rules = toy_config(world), poison(tmp_path)
    rows = toy_rows(tmp_path, "vqa", 400)
    planted = dict(zip((31, 144, 260, 399), rules, strict=True))
    for row, picture in planted.items():
        rows[row]["image"] = picture
    path = write_rows(tmp_path / "vqa.jsonl", rows)
    config = toy_config(
        world, out=str(tmp_path / "run"), data__on_bad_sample="skip", data__num_workers=num_workers,
        data__sources={"vqa": {"format": "jsonl", "path": str(path), "expert": "vqa"}},
        data__validation={}, train__batch_size=20, stages={"experts": {"steps": 36}},
    )  # fmt: skip
    run = run_once(config)
    drawn = Counter(run.mixture.locate(position)[1] for position in range(36 * 20))
    assert {drawn[row] for row in planted} == {1, 2}  # 1.8 passes: counts are of draws, not of rows
    expected: Counter[str] = Counter()
    for row, picture in planted.items():
        expected[rules[picture]] += drawn[row]
    assert run.step == 36 and run.skipped == expected
    lines = steps_of(config)
    assert sum(line["samples"] for line in lines) == 720 - expected.total()
    assert lines[-1]["skipped"] == expected.total()


def adapter(folder: Path, site: str, value: float) -> str:
    factors = {f"base_model.model.{site}.lora_{f}.weight": torch.full(shape, value)
               for f, shape in (("A", (2, 32)), ("B", (64, 2)))}  # fmt: skip
    save_expert(folder, factors, {"r": 2, "lora_alpha": 4, "target_modules": [site]})
    return str(folder)


def test_an_adapter_for_another_base_is_refused_by_its_site(world, tmp_path):
    source = adapter(tmp_path / "other", "model.language_model.layers.7.mlp.up_proj", 1.0)
    config = toy_config(world, out=str(tmp_path / "run"), experts__vqa__init_from=source)
    with pytest.raises(ValueError, match=r"layers\.7\.mlp\.up_proj"):
        run_once(config)


def test_an_adapter_with_a_nan_is_refused_by_its_file(world, tmp_path):
    source = adapter(tmp_path / "nan", "model.language_model.layers.0.mlp.up_proj", 1.0)
    file = Path(source) / "adapter_model.safetensors"
    tensors = {key: value.fill_(float("nan")) for key, value in load_file(file).items()}
    save_file(tensors, file)
    config = toy_config(world, out=str(tmp_path / "run"), experts__vqa__init_from=source)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: .* NaN"):
        run_once(config)


def test_a_folder_that_holds_a_run_is_not_overwritten_unasked(unbroken):
    with pytest.raises(ValueError, match="holds a run already; choices: --resume, --overwrite"):
        run_once(unbroken)


@pytest.mark.slow
def test_a_resume_with_another_config_names_the_settings(unbroken):
    changed = replace(unbroken, train=replace(unbroken.train, weight_decay=0.5))
    with pytest.raises(ValueError, match=r"train\.weight_decay was 0\.0, is 0\.5"):
        run_once(changed, resume=True)


@pytest.mark.slow
def test_a_resume_from_a_checkpoint_with_a_missing_file_names_it(unbroken, tmp_path):
    shutil.copytree(unbroken.out, tmp_path / "run")
    config = replace(unbroken, out=str(tmp_path / "run"))
    last = tmp_path / "run" / "checkpoints" / pointed(tmp_path / "run", "last")
    (last / "optimizer.safetensors").unlink()
    with pytest.raises(ValueError, match=r"optimizer\.safetensors: missing"):
        run_once(config, resume=True)


@pytest.mark.slow
def test_a_resume_from_an_older_versions_state_says_what_to_do(unbroken, tmp_path):
    shutil.copytree(unbroken.out, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / pointed(tmp_path / "run", "last")
    state = json.loads((last / "state.json").read_text())
    write_json(last / "state.json", {key: state[key] for key in state if key != "format"})
    write_json(last / "manifest.json", manifest_of(last))
    with pytest.raises(ValueError, match=r"state\.json: another version wrote it.*init_from"):
        run_once(replace(unbroken, out=str(tmp_path / "run")), resume=True)


@pytest.mark.slow
def test_bf16_trains_and_keeps_what_it_trains_in_fp32(world, tmp_path):
    config = toy_config(world, out=str(tmp_path / "run"), train__precision="bf16",
                        model__dtype="bf16", data__validation={})  # fmt: skip
    run = run_once(config)
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in steps_of(config))
    trained = [*run.model.bank.parameters(), *run.model.router.parameters()]
    assert {p.dtype for p in trained} == {torch.float32}


def test_a_half_written_log_line_is_cut_off(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    keep_lines(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_the_rate_warms_up_and_then_falls_along_a_cosine():
    stage = StageConfig(name="joint", steps=9, warmup_steps=4, lr_end=0.1)
    factors = [rate_factor(stage, step) for step in range(1, 10)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[6] == pytest.approx(0.55) and factors[-1] > 0.1


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("micro", [None, 1, 2])
def test_a_step_has_the_same_samples_however_they_are_dealt(world, processes, micro):
    train_config = replace(toy_config(world).train, batch_size=8, micro_batch_size=micro)
    layout = make_layout(train_config, processes)
    dealt = [p for r in range(processes) for part in layout.positions(16, r) for p in part]
    assert sorted(dealt) == list(range(16, 24))
    assert isinstance(layout, Layout) and layout.accumulation * layout.micro_batch_size <= 8
