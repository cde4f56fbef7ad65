"""The planner: exact on what the model holds, the allocator's own peak, and sums by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from bench.bench_model import make_backbone, make_batch, make_mixture
from bench.planning import measured_peak, optimizer_bytes, planned
from bench.settings import SIZES
from moa.backbones.shapes import find_shape
from moa.build import build_model
from moa.planning.batch import Lengths, example_batch
from moa.planning.plan import FakeRun, Machine, Plan, Traced, make_plan, plan_run, trace
from moa.planning.step import StepCosts, measure_step
from moa.planning.strategies import STRATEGIES, ModelShape, memory, offered, traffic
from moa.planning.tensors import LiveBytes
from moa.sections import TrainConfig
from moa.training.batches import Layout
from moa.training.stages import parameter_groups, set_trainable
from scripts import plan as script
from tests.support.toy import toy_config

LENGTHS = {"tokens": 40, "answer": 8}
MILLION = 10**6


def real_step(config, lengths: Lengths, count: int) -> StepCosts:
    """The same step on the real model."""
    model = build_model(config)
    run = config.stages["joint"]
    groups = set_trainable(model, parameter_groups(model, config), run)
    if config.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    batch = example_batch(config, model.model.config, lengths, count)
    return measure_step(model.train(), groups, run, config.train, batch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__gradient_checkpointing": True, "train__precision": "bf16", "model__dtype": "bf16"},
        pytest.param(
            {"train__pack_length": 100, "prompt__max_length": 100, "model__train_projector": True},
            marks=pytest.mark.slow,
        ),
        pytest.param({"router__granularity": "token"}, marks=pytest.mark.slow),
    ],
    ids=["plain", "checkpointing in bf16", "packed", "token routing"],
)
def test_a_step_without_data_needs_what_the_real_step_needs(tmp_path, changes):
    config = toy_config(tmp_path, **changes)
    run = FakeRun(config, config.model.name)
    lengths = Lengths(**LENGTHS, image=run.image_tokens, pack=config.train.pack_length)
    assert run.image_tokens == 4
    assert run.measure(lengths, 3) == real_step(config, lengths, 3)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_planned_peak_is_the_allocators_and_the_state_is_adamws(checkpointing):
    size = replace(SIZES["small"], width=128, layers=2, vocab=512, batch=4)
    train = TrainConfig(gradient_checkpointing=checkpointing)
    model = make_mixture(make_backbone(size, "cpu", torch.float32), 4, 4, "cpu").train()
    batch = make_batch(size, "cpu")
    batch.attention_mask[-1, -1] = 0
    plan = planned(model, train, batch)
    if checkpointing:
        model.enable_gradient_checkpointing()
    assert plan.peak == pytest.approx(measured_peak(model, train, batch, "cpu"), rel=0.02)
    assert plan.optimizer == optimizer_bytes(model, train)
    assert plan.frozen == sum(4 * p.numel() for p in model.model.parameters()) - sum(
        4 * p.numel() for p in model.bank.parameters()
    )


@pytest.mark.slow
def test_checkpointing_keeps_less_and_computes_more(tmp_path):
    steps = []
    for on in (False, True):
        run = FakeRun(toy_config(tmp_path, train__gradient_checkpointing=on), str(tmp_path / "base"))
        steps.append(run.measure(Lengths(**LENGTHS, image=4), 4))
    plain, checkpointed = steps
    assert checkpointed.kept < 0.5 * plain.kept and checkpointed.peak < plain.peak
    assert checkpointed.flops > 1.1 * plain.flops
    assert checkpointed.gradients == plain.gradients


@pytest.mark.slow
def test_operations_are_those_that_torch_counts():
    size = replace(SIZES["small"], width=64, layers=2, vocab=128, batch=2)
    model = make_mixture(make_backbone(size, "cpu", torch.float32), 2, 4, "cpu").train()
    batch = make_batch(size, "cpu")
    plan = planned(model, TrainConfig(), batch)

    def addmm_(out, a, b, **_):  # of shapes; torch counts only addmm
        return 2 * a[0] * a[1] * b[1]

    in_place = {torch.ops.aten.addmm_: addmm_}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        output = model(batch)
        (output.loss_per_sample.sum() + sum(output.aux.values())).backward()
    assert plan.flops == counter.get_total_flops()


def test_live_bytes_count_each_storage_once_and_only_while_it_lives():
    start = torch.zeros(100)
    with LiveBytes([start]) as live:
        view = start.view(10, 10)
        assert live.now == 400
        more = torch.ones(50) + view.sum()
        peak = live.peak
        del more, view
    assert live.now == 400
    assert 400 + 2 * 200 <= peak <= 400 + 2 * 200 + 8  # ones, their sum, one number


def test_each_image_of_a_sample_has_its_tokens_and_its_pixels(tmp_path):
    config = toy_config(tmp_path)
    base = find_shape(config.model.name)
    batch = example_batch(config, base, Lengths(tokens=12, answer=2, image=3, images=2), 2)
    assert (batch.input_ids == base.image_token_id).int().tolist() == [[1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0]] * 2
    assert batch.image_index.tolist() == [0, 0, 1, 1] and len(batch.pixel_values) == 4
    assert batch.text_ids.shape == (2, 4)


@pytest.mark.slow
def test_small_steps_foretell_large_ones(tmp_path):
    config = toy_config(tmp_path)
    traced = trace(config, config.model.name, 2, **LENGTHS)
    large = FakeRun(config, config.model.name).measure(traced.lengths, 16)
    told = traced.costs(16)
    assert told.kept == pytest.approx(large.kept, rel=0.01)
    assert told.peak == pytest.approx(large.peak, rel=0.01)
    assert told.flops == large.flops
    assert traced.costs(2) == traced.low and traced.costs(4) == traced.high


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "llama_2"), [("llava-7b", 6_738_415_616), ("llava-13b", 13_015_864_320), ("llava-70b", 68_976_648_192)]
)
def test_the_named_sizes_have_the_parameters_of_llama_2_and_64_tokens_more(name, llama_2):
    config = find_shape(name)
    with torch.device("meta"):
        model = LlamaForCausalLM(config.text_config)
    assert sum(p.numel() for p in model.parameters()) == llama_2 + 2 * 64 * model.config.hidden_size


def shape(**changes) -> ModelShape:
    """10 GB of base in bf16, 100 MB of experts."""
    values = {
        "numbers": 5025 * MILLION,
        "trained_numbers": 25 * MILLION,
        "base_bytes": 10_000 * MILLION,
        "all_bytes": 10_100 * MILLION,
        "small_bytes": MILLION,
        "largest_layer": 300 * MILLION,
        "outside_layers": 500 * MILLION,
        "unpacking": 0,
    }
    return ModelShape(**values | changes)


COSTS = StepCosts(
    frozen=10_000 * MILLION,
    trained={"experts": 100 * MILLION},
    gradients=100 * MILLION,
    optimizer=200 * MILLION,
    kept=3_000 * MILLION,
    peak=4_000 * MILLION,
    flops=10**12,
    backward=9_000 * MILLION,
)


@pytest.mark.parametrize(
    ("name", "num_devices", "total", "host"),
    [
        ("single", 1, 10_000 + 100 + 100 + 200 + 4_000, 0),
        ("ddp", 4, 10_000 + 100 + 100 + 200 + 4_000, 0),
        # a quarter of gradients, moments and masters, and the bucket
        ("zero2", 4, 10_000 + 100 + 25 + 50 + 25 + 2_000 + 4_000, 0),
        # gradients whole; what lies outside of layers, and two layers
        ("fsdp2", 4, 2_500 + 25 + 100 + 50 + 500 + 600 + 4_000, 0),
        # the bucket; 1.05 of 5.025 billion parameters; the small ones
        ("zero3", 4, 2_500 + 25 + 25 + 50 + 2_000 + 10_100 * 1.05 / 5.025 + 1 + 4_000, 0),
        ("zero3_offload", 4, 2_000 + 10_100 * 1.05 / 5.025 + 1 + 4_000, 2_500 + 25 + 25 + 50 + 25),
    ],
)
def test_memory_of_a_configuration_adds_up_by_hand(name, num_devices, total, host):
    held = memory(name, shape(), COSTS, num_devices)
    assert held.total == pytest.approx(total * MILLION)
    assert held.host == pytest.approx(host * MILLION)


@pytest.mark.parametrize(
    ("name", "gradients", "parameters", "host"),
    [
        ("ddp", 2 * 0.75 * 100, 0, 0),  # once a step
        ("zero2", 0.75 * 100 * 2, 0.75 * 100, 0),
        ("fsdp2", 0.75 * 100, 0.75 * (10_100 + 9_000) * 2, 0),
        ("zero3", 0.75 * 100 * 2, 0.75 * (10_100 + 9_000) * 2, 0),
        ("zero3_offload", 0.75 * 100 * 2, 0.75 * 19_100 * 2, (19_100 * 2 + 100 * 2) / 4),
    ],
)
def test_traffic_of_two_micro_batches_on_four_devices_by_hand(name, gradients, parameters, host):
    sent = traffic(name, shape(), COSTS, 4, accumulation=2)
    assert sent.gradients == pytest.approx(gradients * MILLION)
    assert sent.parameters == pytest.approx(parameters * MILLION)
    assert sent.host == pytest.approx(host * MILLION)


def test_configurations_are_those_of_configs_accelerate_and_fit_the_machine():
    assert offered(1, False) == ["single", "zero3_offload"]
    assert offered(8, False) == ["ddp", "zero2", "fsdp2", "zero3", "zero3_offload"]
    assert offered(8, True) == ["ddp", "zero2"]  # bitsandbytes' weights stay whole
    files = {file.stem for file in Path("configs/accelerate").glob("*.yaml")}
    assert files <= {*STRATEGIES, "multi_node"}


def test_the_recommended_configuration_sends_least_and_has_room():
    lengths = Lengths(**LENGTHS, image=4)
    high = replace(COSTS, peak=6_000 * MILLION)
    traced = Traced(backbone="", lengths=lengths, shape=shape(), samples=2, low=COSTS, high=high)

    def plan(memory: float) -> Plan:
        layout = Layout(batch_size=48, micro_batch_size=4, num_processes=4)
        return make_plan(traced, layout, Machine(num_devices=4, memory=memory), quantized=False)

    # ddp: 10.4 GB, and 1 GB a sample after 2 GB; 2 GiB stay free
    for gib, name, micro in ((19.0, "ddp", 4), (16.0, "ddp", 2), (12.0, "fsdp2", 4)):
        found = plan(gib)
        assert found.recommended is not None
        assert (found.recommended.name, found.micro_batch) == (name, micro)
    assert plan(4.0).recommended is None and plan(4.0).micro_batch == 0


@pytest.mark.slow
def test_four_bits_take_a_quarter_of_the_linear_layers(tmp_path):
    whole = FakeRun(toy_config(tmp_path, model__dtype="bf16"), str(tmp_path / "base"))
    quarter = FakeRun(toy_config(tmp_path, model__dtype="bf16", model__quantization="4bit"), str(tmp_path / "base"))
    linear = [
        m for m in whole.model.model.modules() if isinstance(m, torch.nn.Linear) and m is not whole.model.model.lm_head
    ]
    size = sum(m.weight.numel() for m in linear)
    saved = whole.shape.base_bytes - quarter.shape.base_bytes
    assert saved == pytest.approx(size * (2 - 0.5 - 0.127 / 8), rel=0.01)
    assert quarter.shape.unpacking == max(2 * m.weight.numel() for m in linear)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"backbones": ["llava-8b"]}, "choices: llava-7b, llava-13b, llava-70b, a folder"),
        ({}, {"backbones": ["config"], "tokens": 10, "answer": 8}, "leave -2 for the question"),
        ({}, {"backbones": ["config"], "images": 2}, "images=2: a llava was trained on one a sample; bases that take"),
        ({"train__batch_size": 3}, {"backbones": ["config"]}, "3 must divide by 2 processes"),
        ({"model__targets": ["nothing"]}, {"backbones": ["config"]}, "targets"),
    ],
)
def test_what_does_not_fit_together_is_said_in_one_line(tmp_path, changes, arguments, message):
    config = toy_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        plan_run(config, arguments.pop("backbones"), [Machine(num_devices=2)], **arguments)


def test_a_machine_must_have_memory_beyond_its_reserve():
    with pytest.raises(ValueError, match="reserve"):
        Machine(memory=2.0, reserve=2.0)


def test_a_second_file_is_laid_over_the_runs_config(tmp_path, monkeypatch):
    planned = []
    monkeypatch.setattr("moa.planning.plan.plan_run", lambda config, *_, **__: planned.append(config) or [])
    script.main(["config=configs/demo.yaml", "--config", "configs/shapes/shared_a.yaml", "train.batch_size=8"])
    assert planned[0].experts["vqa"].share_a == "common" and planned[0].train.batch_size == 8


@pytest.mark.slow
def test_the_command_prints_tables_and_a_record(tmp_path, capsys):
    toy_config(tmp_path)
    settings = [f"config={tmp_path / 'run.yaml'}", "backbone=[config]", "tokens=40", "answer=8"]

    def run(*more: str) -> str:
        script.main([*settings, *more, "train.batch_size=8"])
        return capsys.readouterr().out

    said = run("gpus=[2]", "json=true")
    (plan,) = json.loads(said[said.index("[\n") :])  # behind what libraries say when imported
    assert plan["recommended"] == "ddp" and plan["lengths"]["tokens"] == 40
    assert "use: single" in run()
    assert "ddp" in run("gpus=[1,2]", "gpu_memory=[24,80]")
    with pytest.raises(SystemExit, match="2"):
        run("gpus=[3]")
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
