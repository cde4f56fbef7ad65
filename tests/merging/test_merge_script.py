"""scripts.merge: from folders on the command line to a verified export, or a one-line message."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from data.config import DataConfig, SourceConfig
from moa.build import build_model
from moa.checkpoint import TrainState, save_checkpoint, weights_fingerprint
from moa.config import RunConfig
from moa.files.peft import site_keys
from moa.merging.adapters import expert_from_folder
from moa.merging.export import verify as verifying
from moa.merging.export.verify import outputs_of
from moa.merging.settings import COMMANDS, load_command
from moa.merging.weights import parse_weights, weight_row
from moa.sections import ExpertConfig, ModelConfig, RouterConfig
from scripts import merge as script
from tests.merging.test_export import make_adapter
from tests.support.tiny import save_tiny_llava, tiny_llava

CONFIGS = sorted(Path("configs/merge").glob("*.yaml"))
TARGETS = [r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_tiny_llava(folder / "base")
    make_adapter(folder / "adapters" / "one", 1, r=2, lora_alpha=3)
    make_adapter(folder / "adapters" / "two", 2, r=3, lora_alpha=2, use_rslora=True)
    for name, changes in (("sample", {}), ("token", {"granularity": "token"})):
        make_run(folder / name, folder / "base", RouterConfig(**changes))
    return folder


def make_run(run, base, router, **more):
    """A trained run as training leaves it, with a routing report as evaluation does; `more` experts go with vqa."""
    config = RunConfig(
        model=ModelConfig(name=str(base), targets=TARGETS),
        experts={name: ExpertConfig(rank=2, alpha=4.0) for name in ("vqa", "caption")} | more,
        router=router,
        data=DataConfig(
            validation={"scenes": SourceConfig(name="scenes", split="validation", task="vqa", num_samples=4)}
        ),
    )
    model = build_model(config)
    for name in model.bank.names:
        generator = torch.Generator().manual_seed(len(name))
        for parameter in model.bank.parameters(name):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    step = save_checkpoint(run, 1, model, config, TrainState(progress={"step": 1}))
    (run / "eval").mkdir()
    report = {
        "weights": weights_fingerprint(step),
        "experts": [*config.experts],
        "sites": list(model.bank.sites),
        "mean_gates": [0.75, 0.25],
        "mean_over": ["vqa", "caption"],
        "missing_tasks": [],
        "samples_per_task": {"vqa": 9, "caption": 8, "count": 7},
        "per_task": {"vqa": [0.9, 0.1], "caption": [0.6, 0.4], "count": [0.5, 0.5]},
    }
    report["per_task"] = {task: [*row, *row[:1] * len(more)] for task, row in report["per_task"].items()}
    (run / "eval" / "routing.json").write_text(json.dumps(report))


@pytest.fixture
def same_process(monkeypatch):
    """Reload here instead of in a fresh process; test_export.py has the real thing."""

    def reload(inputs, *, model, adapter=None, new_tokens):
        loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
        if adapter:
            loaded = PeftModel.from_pretrained(loaded, adapter).eval()
        return outputs_of(loaded, inputs, new_tokens), {"consumed": None}

    monkeypatch.setattr(verifying, "fresh_outputs", reload)


def refused(capsys, *arguments):
    """What the script prints where it refuses: one line on stderr, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        script.main(list(arguments))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    message = next(line for line in lines if line.startswith("error: "))
    assert not any("Traceback" in line for line in lines)
    return message


@pytest.mark.slow
def test_two_folders_become_one_adapter(world, tmp_path):
    adapters = f"adapters=[{world}/adapters/one,{world}/adapters/two]"
    base, out = f"base={world}/base", tmp_path / "out"
    script.main(["method=linear", adapters, "weights=[1,1]", "rank=sum", base, f"out={out}"])
    report = json.loads((out / "export_report.json").read_text())
    assert report["verified"] and report["keys_consumed"] == report["keys_written"]
    assert report["comparisons"]["live_mixture"]["max_abs_logit_diff"] < 1e-5
    kept = json.loads((out / "merge_report.json").read_text())
    assert set(kept["total"]["experts"]) == {"one", "two"} and kept["total"]["energy_kept"] == 1


@pytest.mark.slow
def test_an_expert_with_the_gate_of_another_is_one_expert_with_it(world, tmp_path, same_process):
    run, out = tmp_path / "run", tmp_path / "out"
    make_run(run, world / "base", RouterConfig(), pair=ExpertConfig(rank=3, alpha=9.0, gate="with:vqa"))
    experts = {n: expert_from_folder(run / "checkpoints/step-000001/experts" / n) for n in ("vqa", "caption", "pair")}

    def merged(*options):
        script.main([f"run={run}", "fidelity=false", *options, f"out={out}"])
        written = expert_from_folder(out)
        found = {site: multiply(written, site) for site in written.ranks}
        shutil.rmtree(out)
        return found

    def multiply(expert, site):
        lora_a, lora_b = expert.factors(site, torch.float64)
        return lora_b @ lora_a

    for gates, (pair, other) in {("weights=gates", "verify=false"): (0.75, 0.25), (): (0.5, 0.5)}.items():
        for site, update in merged(*gates).items():
            vqa, caption, more = (multiply(expert, site) for expert in experts.values())
            torch.testing.assert_close(update, pair * (vqa + more) + other * caption, rtol=1e-4, atol=1e-5)
    apart = merged("weights={vqa: 1, caption: 0, pair: 0}", "verify=false")
    for site, update in apart.items():
        torch.testing.assert_close(update, multiply(experts["vqa"], site), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_share_that_the_router_decides_needs_weights(world, tmp_path, capsys):
    make_run(tmp_path / "run", world / "base", RouterConfig(), common=ExpertConfig(rank=2, gate="confidence"))
    options = [f"run={tmp_path / 'run'}", "method=ties", "verify=false", "fidelity=false", f"out={tmp_path / 'out'}"]
    assert "weights: experts.common.gate=confidence is a share that the router decides" in refused(capsys, *options)
    script.main([*options, "weights=gates"])


@pytest.mark.slow
def test_a_run_is_merged_by_its_mean_gates_and_compared_with_the_router(world, tmp_path, same_process, capsys):
    out = tmp_path / "out"
    script.main(["fidelity=false", f"run={world}/sample", "weights=gates", "rank=3", f"out={out}"])
    report = json.loads((out / "export_report.json").read_text())
    weights = {name: row["weight"] for name, row in report["merge"]["kept"]["experts"].items()}
    assert weights == {"vqa": pytest.approx(0.75), "caption": pytest.approx(0.25)}
    comparisons = report["comparisons"]
    assert comparisons["written"]["max_abs_logit_diff"] < 1e-5
    assert comparisons["routed_model"]["max_abs_logit_diff"] > 1e-4
    assert report["base"] == str(world / "base")
    assert "against the model that routes each sample" in capsys.readouterr().out


@pytest.mark.slow
def test_a_config_with_rules_for_some_sites_is_merged_and_reported(world, tmp_path, capsys):
    adapters = f"adapters=[{world}/sample/checkpoints/step-000001/experts/*]"
    rules = "sites=[{match: layers.0, drop: true}, {match: mlp, method: ties, scale: [0.5, 1]}]"
    script.main([adapters, rules, "verify=false", f"out={tmp_path / 'out'}"])
    record = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert record["sites"] and not any("layers.0" in site for site in record["sites"])
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == {
        key for site in record["sites"] for key in site_keys(site)
    }
    wrong = "sites=[{match: nowhere}]"
    message = refused(capsys, adapters, wrong, "verify=false", f"out={tmp_path / 'other'}")
    assert message == "error: sites: 'nowhere' decides no site; rules before it, or none, match"


def test_a_method_that_needs_data_says_where_it_is(world, capsys, tmp_path):
    adapters = f"adapters=[{world}/adapters/one,{world}/adapters/two]"
    message = refused(capsys, "method=iteris", adapters, f"out={tmp_path / 'out'}")
    assert "iteris learns from data: python -m scripts.learn_weights method=iteris" in message
    message = refused(capsys, "method=regmean", "verify=false", adapters, f"out={tmp_path / 'out'}")
    file = world / "adapters" / "one" / "stats.safetensors"
    assert f"{file}: missing; python -m scripts.statistics run=RUN writes it, where it was trained" in message
    script.main(["method=list"])
    listed = capsys.readouterr().out
    assert all(f"{name}: " in listed for name in ("ties", "regmean", "lorahub", "passthrough"))


@pytest.mark.slow
def test_factor_space_warns_of_its_cross_terms_and_core_space_does_not(world, tmp_path, capsys):
    adapters = f"adapters=[{world}/sample/checkpoints/step-000001/experts/*]"
    script.main(["fidelity=false", adapters, "space=factor", "verify=false", f"out={tmp_path / 'factor'}"])
    assert "warning: A and B are merged apart" in capsys.readouterr().out
    script.main(["fidelity=false", adapters, "verify=false", f"out={tmp_path / 'core'}"])
    assert "warning" not in capsys.readouterr().out


@pytest.mark.slow
def test_every_merge_brings_its_fidelity_report(world, tmp_path):
    adapters = f"adapters=[{world}/sample/checkpoints/step-000001/experts/*]"
    out = tmp_path / "out"
    script.main([adapters, "method=ties", "rank=2", "verify=false", f"out={out}"])
    record = json.loads((out / "fidelity.json").read_text())
    assert record["method"] == "ties" and record["space"] == "core"
    assert 0 < record["total"]["merged"]["cut_by_rank"] < 1
    assert (out / "fidelity.html").read_text().count("data:image/png;base64,") == 6
    script.main([adapters, "verify=false", "fidelity=false", f"out={tmp_path / 'bare'}"])
    assert not (tmp_path / "bare" / "fidelity.html").exists()


@pytest.mark.slow
def test_a_run_with_fixed_gates_is_merged_without_loss(world, tmp_path, same_process):
    """The reference is the trained model itself, its own forward and its own generation."""
    weights = {"vqa": 0.8, "caption": -0.3}
    make_run(tmp_path / "run", world / "base", RouterConfig(kind="fixed", weights=weights))
    given = "weights={vqa: 0.8, caption: -0.3}"
    for merged in ("false", "true"):
        out = tmp_path / merged
        script.main(["fidelity=false", f"run={tmp_path}/run", given, f"merged={merged}", f"out={out}"])
        comparisons = json.loads((out / "export_report.json").read_text())["comparisons"]
        assert comparisons["routed_model"]["max_abs_logit_diff"] < 1e-5
        assert comparisons["routed_model"]["greedy_token_agreement"] == 1.0


@pytest.mark.slow
def test_the_gates_of_one_task_may_be_taken(world, tmp_path):
    out = tmp_path / "out"
    adapters = f"adapters=[{world}/sample/checkpoints/step-000001/experts/*]"
    script.main(["fidelity=false", adapters, "weights=gates:vqa", "verify=false", f"out={out}"])
    report = json.loads((out / "export_report.json").read_text())
    weights = {name: row["weight"] for name, row in report["merge"]["kept"]["experts"].items()}
    assert weights == {"vqa": 0.9, "caption": 0.1} and not report["verified"]


@pytest.mark.slow
def test_a_token_level_run_needs_to_be_told_that_it_is_approximate(world, tmp_path, same_process, capsys):
    arguments = [f"run={world}/token", "weights=gates", f"out={tmp_path / 'out'}"]
    message = refused(capsys, *arguments)
    assert "its router gates every token" in message and "approximate=true" in message
    script.main(["fidelity=false", *arguments, "approximate=true"])
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert report["comparisons"]["routed_model"]["max_abs_logit_diff"] > 1e-4


@pytest.mark.slow
def test_a_checkpoint_takes_the_runs_processor_and_the_bases_keys(world, tmp_path, same_process):
    out = tmp_path / "out"
    script.main(["fidelity=false", f"run={world}/sample", "merged=true", f"out={out}"])
    ours, theirs = load_file(out / "model.safetensors"), load_file(world / "base/model.safetensors")
    assert set(ours) == set(theirs)
    assert (out / "processor_config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["metod=linear"], "error: metod: .*Did you mean: 'method'"),
        (["method=tise", "out=x"], "method: no such method 'tise'; near: \\['ties'"),
        (["out=x"], "adapters, run: give one of the two"),
        (["adapters=[ONE]"], "out: names no folder"),
        (["adapters=[nowhere]", "out=x"], "nowhere/adapter_config.json: missing"),
        (["adapters=[nowhere/*]", "out=x"], r"nowhere/\* matches no folder"),
        (["adapters=[ONE,TWO]", "weights=[1]", "out=x"], "weights: 1 for 2 experts"),
        (["adapters=[ONE]", "weights={vqa: 1}", "out=x"], "weights.vqa: no such expert; .*'one'"),
        (["adapters=[ONE,TWO]", "weights={one: 1, two: 1, six: 1}", "out=x"], "weights.six: no such"),
        (["adapters=[ONE]", "weights=gates", "out=x"], "weights: gates need run="),
        (["adapters=[ONE]", "rank=big", "out=x"], "rank: must be a positive number, 'sum' or"),
        (["adapters=[ONE]", "dtype=int8", "out=x"], "dtype: .*float32"),
        (["adapters=[ONE]", "options.scale=1", "out=x"], "options.scale: method linear has no"),
        (
            ["adapters=[ONE]", "base=nowhere", "out=x"],
            "base: nowhere is not a folder; give base=FOLDER, or verify=false",
        ),
        (["adapters=[/]", "out=x"], "/adapter_config.json: missing"),
        (["adapters=[/tmp]", "out=x"], "/tmp/adapter_config.json: missing"),
        (["adapters=[ONE]", "run=ONE", "out=x"], "adapters, run: give one of them"),
        (["adapters=[ONE]", "models=[ONE]", "out=x"], "adapters, models: give one of them"),
        (["models=[ONE]", "rank=8", "out=x"], "rank: has no effect with models=; it belongs to adapters= and run="),
        (["models=[ONE]", "merged=true", "out=x"], "merged: has no effect with models="),
        (["models=[ONE]", "verify=false", "out=x"], "verify: has no effect with models="),
        (
            ["slices=[{model: ONE, layers: [0, 1]}]", "dtype=float16", "out=x"],
            "dtype: has no effect with slices=; it belongs to adapters= and run= and models=",
        ),
        (["adapters=[ONE]", "stack=a", "out=x"], "stack: has no effect with adapters="),
        (["adapters=[ONE]", "max_shard_gb=1", "out=x"], "max_shard_gb: .* on an adapter"),
        (["adapters=[ONE]", "verify=false", "num_probes=1", "out=x"], "num_probes: .* verify=false"),
        (["adapters=[ONE]", "routing=x.json", "out=x"], "routing: has no effect without weights"),
        (["adapters=[ONE]", "approximate=true", "out=x"], "approximate: has no effect on experts that are not"),
        (["adapters=[ONE]", "method=list"], "method=list: prints the methods and does nothing else"),
        (["models=[ONE]", "method=list"], "method=list: prints the methods and does nothing else"),
        (["models=[nowhere]", "base=ONE", "out=x"], "models: nowhere is not a folder"),
        (["adapters=[ONE]", "merged=true", "base=ONE", "out=x"], "base: .*one has no config.json"),
        (["run=ONE", "out=x"], "neither a run .* nor a step folder"),
        (["adapters=[ONE]", "out=WORLD"], "out: .* holds other things"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such config file"),
    ],
)
def test_a_mistake_ends_in_one_line(world, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    names = {"ONE": world / "adapters/one", "TWO": world / "adapters/two", "WORLD": world}
    for name, path in names.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    assert re.search(message, refused(capsys, *arguments))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_merge_does_not_replace_what_it_merges(world, tmp_path, capsys):
    out = tmp_path / "out"
    script.main([f"adapters=[{world}/adapters/one]", "verify=false", f"out={out}"])
    before = (out / "adapter_model.safetensors").read_bytes()
    adapters = f"adapters=[{out},{world}/adapters/two]"
    message = refused(capsys, adapters, "verify=false", f"out={out}")
    assert message == f"error: out: {out} would replace {out}, which is merged; name another"
    assert (out / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_experts_are_checked_before_a_base_is_looked_for(world, tmp_path, capsys, value):
    shutil.copytree(world / "adapters/one", tmp_path / "broken")
    edit_tensors(tmp_path / "broken", lambda t: next(iter(t.values())).fill_(value))
    message = refused(capsys, f"adapters=[{tmp_path}/broken]", "base=nowhere", f"out={tmp_path}/x")
    assert "broken/adapter_model.safetensors" in message and "NaN or infinite" in message


@pytest.mark.slow
def test_the_base_that_is_given_decides_over_the_names_in_the_adapters(world, tmp_path, capsys):
    for name, base in (("one", "hub/llava"), ("two", "other/llava-bnb-4bit")):
        shutil.copytree(world / "adapters" / name, tmp_path / name)
        edit_config(tmp_path / name, base_model_name_or_path=base)
    adapters, out = f"adapters=[{tmp_path}/one,{tmp_path}/two]", f"out={tmp_path}/out"
    assert "give base=FOLDER" in refused(capsys, adapters, out, "verify=false")
    script.main([adapters, out, "verify=false", f"base={world}/base"])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"{world}/base"


def test_an_adapter_of_another_base_is_refused_before_merging(world, tmp_path, capsys):
    model, _ = tiny_llava(hidden=48)
    model.save_pretrained(tmp_path / "wide")
    adapter, out = f"adapters=[{world}/adapters/one]", f"out={tmp_path / 'out'}"
    message = refused(capsys, adapter, f"base={tmp_path / 'wide'}", out)
    assert "made for another base" in message and str(tmp_path / "wide") in message


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder, edit):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def cut_file(folder, size):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


def put_nan(tensors):
    tensors[Q.format("A")][1, 3] = torch.nan


def drop_layer(tensors):
    for key in [key for key in tensors if "layers.0.self_attn.q_proj" in key]:
        del tensors[key]


def add_tensor(name):
    return lambda tensors: tensors.update({f"base_model.model.{name}": torch.ones(2)})


SITE = "model.language_model.layers.0.self_attn.q_proj"
Q = f"base_model.model.{SITE}.lora_{{}}.weight"
WEIGHTS, CONFIG = r"bad/adapter_model\.safetensors: ", r"bad/adapter_config\.json: "
CHECKPOINT = r".*merge_and_unload\(\)"
BROKEN = {
    "zero bytes": (lambda f: cut_file(f, 0), WEIGHTS + "not readable as safetensors"),
    "cut header": (lambda f: cut_file(f, 50), WEIGHTS + "not readable as safetensors"),
    "cut data": (lambda f: cut_file(f, -9), WEIGHTS + "not readable as safetensors"),
    "a NaN": (
        lambda f: edit_tensors(f, put_nan),
        WEIGHTS + Q.format("A") + " has 1 NaN or infinite values, in 1 rows, first 1",
    ),
    "missing site": (lambda f: edit_tensors(f, drop_layer), f"adapters: bad lacks {SITE}.*one has"),
    "missing half": (
        lambda f: edit_tensors(f, lambda t: t.pop(Q.format("B"))),
        WEIGHTS + Q.format("B") + " is missing, though its partner is there",
    ),
    "DoRA": (lambda f: edit_config(f, use_dora=True), CONFIG + "use_dora=True is not supported" + CHECKPOINT),
    "hidden DoRA": (
        lambda f: edit_tensors(f, add_tensor(f"{SITE}.lora_magnitude_vector.weight")),
        WEIGHTS + r".*lora_magnitude_vector\.weight \(use_dora",
    ),
    "lora_bias": (lambda f: edit_config(f, lora_bias=True), CONFIG + "lora_bias=True is not supported" + CHECKPOINT),
    "hidden lora_bias": (
        lambda f: edit_tensors(f, add_tensor(f"{SITE}.lora_B.bias")),
        WEIGHTS + r".*lora_B\.bias \(lora_bias",
    ),
    "modules_to_save": (
        lambda f: edit_config(f, modules_to_save=["lm_head"]),
        CONFIG + r"modules_to_save=\['lm_head'\] is not supported" + CHECKPOINT,
    ),
    "hidden modules_to_save": (
        lambda f: edit_tensors(f, add_tensor("lm_head.weight")),
        WEIGHTS + r".*lm_head\.weight \(modules_to_save",
    ),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), CONFIG + "not readable as JSON"),
}


@pytest.mark.slow
@pytest.mark.parametrize("merged", ["false", "true"])
@pytest.mark.parametrize(("spoil", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_adapter_leaves_nothing_behind(world, tmp_path, capsys, spoil, message, merged):
    shutil.copytree(world / "adapters/two", tmp_path / "bad")
    spoil(tmp_path / "bad")
    adapters = f"adapters=[{world}/adapters/one,{tmp_path}/bad]"
    base, out = f"base={world}/base", tmp_path / "out"
    said = refused(capsys, adapters, base, f"out={out}", f"merged={merged}")
    assert re.search(message, said), said
    assert [path.name for path in tmp_path.rglob("*") if path.parent.name != "bad"] == ["bad"]


@pytest.mark.parametrize("merged", ["false", "true"])
def test_a_quantised_base_is_refused_with_what_to_do(world, tmp_path, capsys, merged):
    shutil.copytree(world / "base", tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": quantised}))
    adapter, out = f"adapters=[{world}/adapters/one]", f"out={tmp_path / 'out'}"
    message = refused(capsys, adapter, f"base={tmp_path}/base", out, f"merged={merged}")
    assert f"{file}: quantization_config says that its weights are packed by bitsandbytes" in message
    assert "give base= the weights it was made from" in message
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    script.main([adapter, f"base={tmp_path}/base", "verify=false", "fidelity=false", out])
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_refusal_of_the_real_command_line_is_one_line_and_exit_code_2(world, tmp_path):
    shutil.copytree(world / "adapters/two", tmp_path / "bad")
    cut_file(tmp_path / "bad", 0)
    command = [sys.executable, "-m", "scripts.merge", f"adapters=[{tmp_path}/bad]"]
    done = subprocess.run([*command, f"out={tmp_path}/out", "verify=false"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: {tmp_path}/bad/adapter_model.safetensors: not readable")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.slow
def test_a_routing_report_of_other_experts_is_refused(world, tmp_path, capsys):
    report = f"routing={world}/sample/eval/routing.json"
    adapter = f"adapters=[{world}/adapters/one]"
    message = refused(capsys, adapter, "weights=gates", report, f"out={tmp_path / 'out'}")
    assert "the gates are of ['vqa', 'caption'], the experts are ['one']" in message
    run = f"run={world}/sample"
    message = refused(capsys, run, "weights=gates:chess", f"out={tmp_path / 'out'}")
    assert "there is no task 'chess'; choices: ['vqa', 'caption', 'count']" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "0" * 32, "checkpoint": "runs/old"}, "was measured on runs/old, whose weights"),
        ({"missing_tasks": ["count"]}, "the trained tasks ['count'] were not evaluated"),
        ({"per_task": {"vqa": [float("nan"), 1], "caption": [1, 0]}}, "NaN is not a number"),
        ({"per_task": {"vqa": [1], "caption": [1, 0]}}, "its gates are not 2 numbers a row"),
        ({"per_site": {"vqa": [[1, 0]], "caption": [[1, 0]]}}, "its gates are not 2 numbers a row"),
        ({"sites": None}, "has no 'sites'"),
    ],
)
def test_gates_that_were_not_measured_on_all_of_these_weights_are_refused(world, tmp_path, capsys, change, message):
    report = json.loads((world / "sample" / "eval" / "routing.json").read_text()) | change
    report = {key: value for key, value in report.items() if value is not None}
    (tmp_path / "routing.json").write_text(json.dumps(report))
    options = [f"run={world}/sample", "weights=gates", f"routing={tmp_path}/routing.json"]
    shown = refused(capsys, *options, f"out={tmp_path / 'out'}")
    assert message in shown and not (tmp_path / "out").exists()
    assert "run `python eval.py run=" in shown or "name them in eval.sources" in shown


def test_folders_of_one_name_become_different_experts(world, tmp_path):
    make_adapter(tmp_path / "one", 5, r=1)
    adapters = f"adapters=[{world}/adapters/one,{tmp_path}/one]"
    out = tmp_path / "out"
    script.main(["fidelity=false", adapters, "weights={one: 1, one_2: 2}", "verify=false", f"out={out}"])
    report = json.loads((out / "export_report.json").read_text())
    assert set(report["merge"]["kept"]["experts"]) == {"one", "one_2"}


def test_weights_must_be_numbers():
    for raw in ("all", {"one": True}, {"one": "1"}, 3):
        with pytest.raises(ValueError, match=r"^weights"):
            weight_row(["one"], parse_weights(raw, ["one"]))
    assert parse_weights([1, 2.5], ["a", "b"]) == {"a": 1, "b": 2.5}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_shipped_config_loads(file):
    load_command([str(file)], [])


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = capsys.readouterr().out
    for command in COMMANDS.values():
        for key in command.__dataclass_fields__:
            assert f"\n{key}" in text
    script.main(["method=list"])
    assert "options.scale=1.0" in capsys.readouterr().out


def test_help_and_lists_import_no_torch():
    """Seconds and a gigabyte: the tables of methods and learners are names, and functions come on use."""
    names = ("merge_parts", "average_checkpoints", "align", "repair", "compare_merges")
    code = (
        "import sys\n"
        f"from scripts import merge, learn_weights, {', '.join(names)}\n"
        "for script in (merge, learn_weights): script.main(['method=list'])\n"
        "assert not {'torch', 'transformers', 'scipy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "dare_ties: Keep each value with probability `density`, and rescale" in done.stdout
