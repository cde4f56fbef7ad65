"""scripts.distill: a routed mixture becomes one adapter; its losses against hand values, its command on a toy world."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moa.build import build_model
from moa.checkpoint import TrainState, load_model, save_checkpoint
from moa.merging import distillation
from moa.merging.learn.distill import STUDENT, Lesson, add_student, distance, divergence, over_tasks, student_factors
from moa.merging.settings import DistillConfig
from scripts import distill as script
from scripts import merge as merge_script
from tests.support.tiny import tiny_batch, tiny_processor
from tests.support.toy import toy_config


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_run(toy_config(folder, out=str(folder / "run"), eval__max_new_tokens=3))
    return folder


def make_run(config):
    model = build_model(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.bank.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    save_checkpoint(Path(config.out), 1, model, config, TrainState(progress={"step": 1}))


@pytest.fixture(scope="module")
def teacher(world):
    return load_model(world / "run")[0]


def lesson_of(model, **settings):
    return Lesson(model=model, gates=lambda batch: {}, **settings)


def test_the_divergence_is_that_of_two_coins_and_zero_to_itself():
    teacher = torch.tensor([[[0.0, math.log(3)], [5.0, 1.0]]])  # probabilities 1/4 and 3/4; the second is no token
    student = torch.zeros(1, 2, 2)
    labels = torch.tensor([[1, -100]])
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert divergence(teacher, student, labels).item() == pytest.approx(expected, abs=1e-6)
    assert divergence(teacher, teacher, labels).item() == 0
    warm = divergence(2 * teacher, 2 * student, labels, 2.0)
    assert warm.item() == pytest.approx(4 * expected, abs=1e-6)


def test_the_hidden_states_distance_is_relative_and_leaves_out_padding():
    one, other = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.tensor([[[3.0, 5.0], [9.0, 9.0]]])
    assert distance(one, other, torch.tensor([[True, False]])).item() == pytest.approx(1 / 25)


def test_tasks_count_alike_or_the_worst_alone_does():
    losses, tasks = torch.tensor([1.0, 3.0, 8.0]), ["vqa", "vqa", "caption"]
    assert over_tasks(losses, tasks, "mean").item() == 5 and over_tasks(losses, tasks, "worst").item() == 8


def test_teacher_and_student_leave_each_others_outputs_bit_equal(world):
    model = load_model(world / "run")[0]
    batch = tiny_batch(tiny_processor(), tasks=[0, 1, 0, 1], experts=[0, 1, 0, 1])
    with torch.no_grad():
        before = model(batch)
    add_student(model, 4, 4.0, 0, {})
    lesson = lesson_of(model)
    torch.testing.assert_close(lesson.teach(batch).logits, before.logits, rtol=0, atol=0)
    for parameter in model.bank.parameters(STUDENT):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(lesson.teach(batch).logits, before.logits, rtol=0, atol=0)
    alone = lesson.study(batch).logits
    for name in lesson.teachers:
        for parameter in model.bank.parameters(name):
            parameter.data = parameter.data * 7
    torch.testing.assert_close(lesson.study(batch).logits, alone, rtol=0, atol=0)
    assert model.bank.names == ["vqa", "grounding", STUDENT]
    # Gate 1 on the student in the full bank is the same, up to the order of sums.
    gates = torch.tensor([0.0, 0.0, 1.0]).expand(4, -1)
    torch.testing.assert_close(model(batch, gates).logits, alone, rtol=1e-4, atol=1e-5)


def test_a_student_that_is_the_teacher_has_no_loss_and_gets_a_gradient_otherwise(world):
    model = load_model(world / "run")[0]
    batch = tiny_batch(tiny_processor(), tasks=[0, 1, 0, 1], experts=[0, 1, 0, 1])
    add_student(model, 3, 3.0, 0, {})
    own = {site: (layer.lora_A["vqa"], 2 * layer.lora_B["vqa"]) for site, layer in model.bank.sites.items()}
    fresh = lesson_of(model, hidden=1.0)
    assert fresh.losses(batch).min() > 0
    model.bank.remove(STUDENT)
    add_student(model, 3, 3.0, 0, own)
    alone = Lesson(model=model, gates=lambda b: {"gates": torch.tensor([1.0, 0.0]).expand(len(b), -1)}, hidden=1.0)
    losses = alone.losses(batch)
    torch.testing.assert_close(losses, torch.zeros(4), rtol=0, atol=1e-6)
    losses.sum().backward()
    assert all(p.grad is not None for p in model.bank.parameters(STUDENT))
    assert all(p.grad is None for name in alone.teachers for p in model.bank.parameters(name))
    agreement = alone.agreement([batch])
    assert agreement["token_agreement"] == 1 and agreement["kl"] == pytest.approx(0, abs=1e-6)


def test_a_validation_set_called_mean_keeps_its_agreement_beside_that_of_all(teacher, monkeypatch):
    rows = iter([{"token_agreement": 1.0, "kl": 2.0}, {"token_agreement": 0.5, "kl": 4.0}])
    monkeypatch.setattr(Lesson, "agreement", lambda self, batches: next(rows))
    found = distillation.compare(lesson_of(teacher), {"mean": [], "vqa": []})
    assert found["mean"] == {"token_agreement": 1, "kl": 2}
    assert found["mean of all"] == {"token_agreement": 0.75, "kl": 3}


def test_further_ranks_change_no_output_and_a_larger_start_is_refused(teacher):
    start = {site: (torch.ones(2, a.shape[1]), torch.ones(len(b), 2)) for site, a, b in (
        (name, layer.lora_A["vqa"], layer.lora_B["vqa"]) for name, layer in teacher.bank.sites.items())}  # fmt: skip
    add_student(teacher, 4, 8.0, 0, start)
    for site, (a, b) in student_factors(teacher).items():
        torch.testing.assert_close(b @ a, start[site][1] @ start[site][0], rtol=0, atol=0)
        assert len(a) == 4 and a[2:].abs().min() > 0
    teacher.bank.remove(STUDENT)
    with pytest.raises(ValueError, match="rank: 1, and start has rank 2 at"):
        add_student(teacher, 1, 1.0, 0, start)


def run(world, out, *more):
    script.main([f"run={world}/run", f"out={out}", "rank=5", "verify=false", "num_samples=2", "batch_size=4", *more])
    return json.loads((out / "distill_report.json").read_text())


@pytest.mark.slow
def test_without_a_step_the_adapter_is_its_start(world, tmp_path):
    merged = tmp_path / "merged"
    unchecked = ("verify=false", "fidelity=false")
    merge_script.main([f"run={world}/run", "weights={vqa: 0.5, grounding: 0.5}", *unchecked, f"out={merged}"])
    report = run(world, tmp_path / "out", f"start={merged}", "steps=0", "verify=true", "num_probes=2")
    start, found = (load_file(folder / "adapter_model.safetensors") for folder in (merged, tmp_path / "out"))
    assert start.keys() == found.keys() and all(torch.equal(start[key], found[key]) for key in start)
    assert report["agreement"]["before"] == report["agreement"]["after"]
    assert not (tmp_path / "out.steps").exists()
    checked = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert checked["verified"] and set(checked["comparisons"]) == {"written", "routed_model"}
    assert "distilled from 2 LoRA experts" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_steps_bring_the_student_nearer_and_a_killed_command_writes_the_same_file(world, tmp_path, monkeypatch):
    settings = ("steps=6", "save_every=2", "lr=0.02", "hidden=0.1")
    report = run(world, tmp_path / "whole", *settings)
    before, after = (report["agreement"][when]["mean"] for when in ("before", "after"))
    assert after["kl"] < 0.8 * before["kl"] and report["loss"]["last"] is not None
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and lines[-1]["loss"] < lines[0]["loss"]

    whole, seen = distillation.distill_step, []

    def killed(lesson, prompts, step, *rest):
        if step == 4 and not seen:
            seen.append(step)
            raise KeyboardInterrupt
        return whole(lesson, prompts, step, *rest)

    monkeypatch.setattr(distillation, "distill_step", killed)
    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        run(world, out, *settings)
    answers = tmp_path / "killed.steps" / "answers.jsonl"
    answers.write_bytes(answers.read_bytes()[:-3])  # a line that was cut
    assert not out.exists()
    with pytest.raises(SystemExit):
        run(world, out, *settings[:2], "lr=0.03")
    run(world, out, *settings)
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert all((out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)
    again = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]


@pytest.mark.slow
def test_micro_batches_change_no_loss_and_labels_and_an_oracle_teach_too(world, tmp_path):
    how = ("steps=1", "gates=oracle", "answers=data", "loss=labels")
    one, four = (run(world, tmp_path / size, *how, f"micro_batch_size={size}") for size in "14")
    assert one["loss"]["first"] == pytest.approx(four["loss"]["first"], rel=1e-4)
    assert one["without_answer"] == 0 and one["loss"]["kind"] == "labels"


def test_what_cannot_be_taught_is_refused_by_name(world, tmp_path, capsys):
    out = f"out={tmp_path}/x"
    cases = (
        ([out], "run: names no folder"),
        ([f"run={world}/run"], "out: names no folder"),
        ([f"run={world}/run", out, "gates=vqb"], "eval.gates=vqb: unknown; choices"),
        ([f"run={world}/run", out, "sources=[vqb]"], "sources: no data.sources.vqb; choices: ['vqa', 'grounding']"),
        ([f"run={world}/run", out, "loss=labels", "temperature=2"], "temperature: has no effect with loss=labels"),
        ([f"run={world}/run", out, "reduction=worst", "micro_batch_size=2"], "micro_batch_size: reduction=worst"),
    )
    for arguments, message in cases:
        with pytest.raises(SystemExit):
            script.main(arguments)
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_start_of_other_weights_under_the_same_name_is_refused(world, tmp_path):
    step, start = world / "run/checkpoints/step-000001", tmp_path / "start"
    shutil.copytree(step / "experts/vqa", start)
    settings = DistillConfig(run=str(world / "run"), out="x", start=str(start))
    distillation.begin(tmp_path / "work", settings, step)
    distillation.begin(tmp_path / "work", settings, step)
    shutil.copytree(step / "experts/grounding", start, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"start_weights: .*work was begun with \w+, and is now"):
        distillation.begin(tmp_path / "work", settings, step)
