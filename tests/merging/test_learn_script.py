"""scripts.learn_weights and scripts.merge_parts: from runs to weights and parts, or a one-line message."""

import json

import pytest
import torch
from safetensors.torch import load_file

from data.config import DataConfig, SourceConfig
from moa.build import build_model
from moa.checkpoint import TrainState, save_checkpoint
from moa.config import RunConfig
from moa.evaluation.predict import gate_rule
from moa.merging.adapters import expert_from_folder, experts_of_bank
from moa.merging.learn.calibration import MERGED, load_unrouted, read_calibration, with_merged
from moa.merging.learn.least_squares import with_inputs
from moa.merging.merge import merge
from moa.sections import EvalConfig, ExpertConfig, ModelConfig
from scripts import compare_merges as compare_script
from scripts import learn_weights as script
from scripts import merge as merge_script
from scripts import merge_parts as parts_script
from tests.support.tiny import save_tiny_llava

TARGETS = [r"model\.language_model\.layers\.0\.self_attn\.(q|v)_proj"]
NAMES = ("vqa", "caption")
STEP = "A/checkpoints/step-000001/experts"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_tiny_llava(folder / "base")
    for seed, name in enumerate(("A", "B")):
        make_run(folder / name, folder / "base", seed)
    return folder


def make_run(run, base, seed):
    config = RunConfig(
        seed=seed,
        model=ModelConfig(name=str(base), targets=TARGETS, train_projector=True),
        experts={name: ExpertConfig(rank=2, alpha=4.0) for name in NAMES},
        data=DataConfig(
            validation={
                name: SourceConfig(name=name, split="validation", task=name, expert=name, num_samples=4)
                for name in NAMES
            }
        ),
        eval=EvalConfig(max_new_tokens=4),
    )
    model = build_model(config)
    generator = torch.Generator().manual_seed(seed)
    for name in model.bank.names:
        for parameter in model.bank.parameters(name):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    for parameter in model.model.model.multi_modal_projector.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_checkpoint(run, 1, model, config, TrainState(progress={"step": 1}))


def refused(capsys, main, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


SLOW = ("adamerging steps=2", "enmp budget=3", "lorahub budget=4 merge=ties", "greedy_soup", "uq_merge runs=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["lora_soups steps=2", *(pytest.param(method, marks=pytest.mark.slow) for method in SLOW)]
)
def test_what_is_learned_is_read_by_the_merge(world, tmp_path, capsys, method):
    out = tmp_path / "w.json"
    script.main([f"run={world}/A", f"out={out}", "num_samples=2", *f"method={method}".split()])
    record = json.loads(out.read_text())
    assert record["method"] == method.split()[0] and record["data"] == {"vqa": 2, "caption": 2}
    assert set(record["score"]) == {"metric", "before", "after"}
    adapters = f"adapters=[{world}/A/checkpoints/step-000001/experts/*]"
    merged = tmp_path / "merged"
    options = [f"weights={out}", adapters, "verify=false", "fidelity=false", f"out={merged}"]
    if "merge=ties" in method:
        assert f"{out} was learned for method=ties; give this too" in refused(capsys, merge_script.main, *options)
        options.append("method=ties")
    merge_script.main(options)
    kept = json.loads((merged / "merge_report.json").read_text())["sites"]
    for site, row in kept.items():
        wanted = record["weights"].get(site, record["weights"])
        found = {name: expert["weight"] for name, expert in row["experts"].items()}
        assert found == pytest.approx(wanted, abs=1e-11)


@pytest.mark.slow
def test_triplets_are_weighed_from_the_command_line(world, tmp_path):
    out = tmp_path / "adapter"
    script.main([f"run={world}/A", f"out={out}", "num_samples=2", "method=tara", "steps=1", "lr=0.001"])
    written, experts = expert_from_folder(out), [expert_from_folder(world / STEP / name) for name in NAMES]
    for site in written.ranks:
        a, b = written.factors(site, torch.float64)
        whole = sum(b @ a for a, b in (e.factors(site, torch.float64) for e in experts))
        torch.testing.assert_close(b @ a, 0.4 * whole, rtol=0.05, atol=0.01)


@pytest.mark.slow
def test_methods_and_controls_are_compared_at_their_defaults_and_tuned(world, tmp_path):
    few = ["num_learn=1", "num_samples=1", "steps=1", "ranks=[2]"]
    compare_script.main([f"run={world}/A", f"out={tmp_path}", "methods=[linear]", "learned=[fresh_lora]", *few])
    record = json.loads((tmp_path / "compare_merges.json").read_text())
    rows = {row["method"]: row for row in record["rows"]}
    alone = ["base", "routed, not merged", "expert vqa", "expert caption"]
    assert [*rows] == [*alone, "linear", "random direction", "fresh_lora"]
    assert record["trained"] == ["caption", "vqa"] and rows["linear"]["tuned"]["passes"] == 10
    assert all(set(row["default"]["scores"]) == {"vqa", "caption"} for row in rows.values())
    lines = (tmp_path / "compare_merges.md").read_text().splitlines()
    assert len(lines) == 2 + len(rows) and any(line.startswith("| `linear` | none | 2 | ") for line in lines)


def test_a_merge_on_trial_is_scored_alone(world):
    model, config = load_unrouted(str(world / "A"))
    experts = experts_of_bank(model.bank)
    data = read_calibration(config, model, num_samples=2, seed=0, ocr=None)
    with with_merged(model, merge(experts), experts):
        gates = gate_rule(model, data.by_source(2)["vqa"][0], MERGED)["gates"]
        assert gates.tolist() == [[0.0, 0.0, 1.0]] * 2


@pytest.mark.slow
def test_weights_learned_with_other_values_of_the_experts_are_refused(world, tmp_path, capsys):
    out, other = tmp_path / "w.json", f"adapters=[{world}/B/checkpoints/step-000001/experts/*]"
    script.main([f"run={world}/A", f"out={out}", "num_samples=1", "method=grid", "values=[0.5]"])
    message = refused(capsys, merge_script.main, f"weights={out}", other, "verify=false", f"out={tmp_path}/x")
    assert f"{out} was learned with other values of the expert caption; learn it again" in message


@pytest.mark.slow
def test_the_grid_and_the_greedy_soup_do_not_score_worse_than_what_they_tried(world, tmp_path):
    out = tmp_path / "w.json"
    script.main([f"run={world}/A", f"out={out}", "num_samples=2", "method=grid", "values=[0.5,0.2]"])
    score = json.loads(out.read_text())["score"]
    assert score["after"] <= score["before"] + 1e-6  # the mean of two is 0.5 of each


@pytest.mark.slow
def test_regmean_from_the_command_line_is_the_function(world, tmp_path):
    out = tmp_path / "adapter"
    script.main([f"run={world}/A", f"out={out}", "num_samples=2", "method=regmean"])
    model, config = load_unrouted(str(world / "A"))
    few = read_calibration(config, model, num_samples=2, seed=0, ocr=None)
    experts = with_inputs(model, experts_of_bank(model.bank), few.by_expert(16))
    expected = merge(experts, method="regmean", options={"nondiagonal": 0.9, "ridge": 1e-4})
    written = expert_from_folder(out)
    for site, result in expected.items():
        a, b = written.factors(site, torch.float64)
        torch.testing.assert_close(b @ a, result.lora_b @ result.lora_a, rtol=1e-4, atol=1e-6)


def test_settings_without_effect_or_meaning_are_refused(world, tmp_path, capsys):
    run, out = f"run={world}/A", f"out={tmp_path}/w.json"
    cases = (
        (["method=lorahab", run, out], "no such method 'lorahab'; choices"),
        ([out], "run: names no folder"),
        ([run], "out: names no file"),
        ([run, out, "budget=3"], "budget: has no effect with method=lora_soups; it has ['steps'"),
        ([run, out, "merge=ties"], "merge: has no effect with method=lora_soups"),
        ([run, f"out={tmp_path}/w"], "lora_soups writes weights to a file .json"),
        ([run, out, "steps=0"], "steps: must be 1 or more, got 0"),
        ([run, out, "method=grid", "merge=tias"], "no such method 'tias'; near"),
    )
    for arguments, message in cases:
        assert message in refused(capsys, script.main, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_parts_of_two_runs_are_merged_by_their_rules(world, tmp_path, capsys):
    out = tmp_path / "parts"
    rules = "parts={projector: regmean, ocr_encoder: mean, prefixes: keep:A, router: drop}"
    runs = f"runs=[{world}/A,{world}/B]"
    parts_script.main([runs, rules, f"out={out}", "num_samples=2"])
    lines = capsys.readouterr().out
    assert "projector of A, B: regmean, 4 tensors" in lines and "router of A, B: dropped" in lines
    step = "checkpoints/step-000001"
    own = [load_file(world / run / step / "projector.safetensors") for run in "AB"]
    merged = load_file(out / "projector.safetensors")
    name = "model.multi_modal_projector.linear_1"
    torch.testing.assert_close(merged[f"{name}.bias"], (own[0][f"{name}.bias"] + own[1][f"{name}.bias"]) / 2)
    # Both runs look at the same pictures with the same tower: equal inputs, for which regmean is the mean. What the
    # second layer reads, the first one made.
    first, second = (
        (merged[n], (own[0][n] + own[1][n]) / 2)
        for n in (f"{name}.weight", "model.multi_modal_projector.linear_2.weight")
    )
    torch.testing.assert_close(*first)
    assert 1e-3 < (second[0] - second[1]).norm() / second[1].norm() < 1
    assert not (out / "router.safetensors").exists()
    message = refused(capsys, parts_script.main, runs, "parts={projector: mean}", f"out={tmp_path}/no")
    assert "parts.ocr_encoder: A, B trained one; the rules are mean" in message


@pytest.mark.slow
def test_a_merge_of_two_runs_says_what_it_leaves_out(world, tmp_path, capsys):
    step = "checkpoints/step-000001/experts"
    adapters = f"adapters=[{world}/A/{step}/vqa,{world}/B/{step}/caption]"
    out = tmp_path / "out"
    merge_script.main([adapters, "verify=false", "fidelity=false", f"out={out}"])
    printed = capsys.readouterr().out
    report = json.loads((out / "merge_report.json").read_text())
    for run in "AB":
        for part in ("projector", "ocr_encoder", "prefixes", "router"):
            line = f"{part} of {run}: not in the result; scripts.merge_parts merges it"
            assert line in printed and line in report["beside"]
