"""Statistics beside the experts of a run: written by training and by the command, read by merges of these weights."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState

from moa.build import build_model
from moa.checkpoint import load_model, stored, verify, weights_fingerprint
from moa.files.peft import read_header, read_tensors, save_expert
from moa.merging.adapters import expert_from_folder, experts_of_bank
from moa.merging.learn.least_squares import with_inputs
from moa.merging.merge import merge
from moa.sections import ExpertConfig
from moa.statistics.measure import own_samples, served
from moa.statistics.stored import read_statistics, write_statistics
from moa.training.setup import make_accelerator, open_run
from scripts import merge as merge_script
from scripts import statistics as script
from tests.support.toy import toy_config
from train import train

FILE = "stats.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, its step folder, and the fingerprint of its weights before anything was written there later."""
    config = toy_config(tmp_path_factory.mktemp("world"), train__statistics=3, stages__router=None, stages__joint=None)
    AcceleratorState._reset_state(reset_partial_state=True)
    run, state = open_run(config, make_accelerator(config))
    train(run, state)
    return run, run.folder / "checkpoints" / "step-000005"


def refused(capsys, main, *arguments):
    with pytest.raises(SystemExit):
        main(list(arguments))
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_training_writes_what_the_command_writes_and_the_checkpoint_stays_what_it_was(trained, tmp_path, capsys):
    run, step = trained
    before = {name: (step / "experts" / name / FILE).read_bytes() for name in ("vqa", "grounding")}
    fingerprint = weights_fingerprint(step)
    script.main([f"run={run.folder}", "num_samples=3", "batch_size=4"])
    assert f"vqa/{FILE}: 3 samples" in capsys.readouterr().out
    assert {name: (step / "experts" / name / FILE).read_bytes() for name in before} == before
    verify(step)
    assert weights_fingerprint(step) == fingerprint
    out = tmp_path / "out"
    merge_script.main(
        [
            f"run={run.folder}",
            "method=regmean",
            "rank=2",
            "metric=inputs",
            "verify=false",
            "fidelity=false",
            f"out={out}",
        ]
    )
    assert "energy kept: of the outputs" in capsys.readouterr().out
    script.main([f"run={run.folder}", "num_samples=3", "batch_size=4", "directions=full", "answer_share=null"])
    model, _, config = load_model(run.folder)
    samples, _ = own_samples(config, run.mixture, run.collator, 3, served(model))
    batches = {name: [run.collator(own)] for name, own in samples.items()}
    assert {name: {s.expert for s in own} for name, own in samples.items()} == {
        "vqa": {"vqa"},
        "grounding": {"grounding"},
    }
    expected = merge(with_inputs(model, experts_of_bank(model.bank), batches), method="regmean")
    script_out = tmp_path / "full"
    merge_script.main([f"run={run.folder}", "method=regmean", "verify=false", "fidelity=false", f"out={script_out}"])
    written = expert_from_folder(script_out)
    for site, result in expected.items():  # the statistics are stored in 32 bits
        a, b = written.factors(site, torch.float64)
        torch.testing.assert_close(b @ a, result.lora_b @ result.lora_a, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_statistics_of_other_weights_are_refused_by_name(trained, tmp_path, capsys):
    run, step = trained
    vqa, other = step / "experts" / "vqa", tmp_path / "vqa"
    header = read_header(vqa)
    tensors = {key: 2 * tensor for key, tensor in read_tensors(header).items()}
    save_expert(other, tensors, header.config)
    shutil.copy(vqa / FILE, other / FILE)
    adapters = f"adapters=[{step}/experts/grounding,{other}]"
    message = refused(capsys, merge_script.main, adapters, "method=core_regmean", "verify=false", f"out={tmp_path}/out")
    assert f"{other / FILE}: belongs to other weights than adapter_model.safetensors beside it" in message
    (other / FILE).write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"stats.safetensors: not readable as safetensors .*; ask"):
        read_statistics(other, "ask")
    (other / FILE).unlink()
    with pytest.raises(ValueError, match=r"stats.safetensors: missing; ask"):
        read_statistics(other, "ask")
    moments = {site: read_statistics(vqa, "")(site) for site in header.ranks}
    write_statistics(other, {site: moments[site] for site in header.ranks}, 3, answer_share=0.25)
    message = refused(capsys, merge_script.main, adapters, "method=core_regmean", "verify=false", f"out={tmp_path}/out")
    assert re.search(r"answer_share: statistics weigh tokens unlike, by \S+ in grounding, 0.25 in vqa", message)
    moments = {site: moments[site] for site in [*header.ranks][:1]}
    with pytest.raises(ValueError, match="statistics must be of the expert's own sites"):
        write_statistics(vqa, moments, 3)


def test_a_run_without_training_data_and_odd_directions_are_refused(capsys):
    assert "run: names no folder" in refused(capsys, script.main, "num_samples=2")
    message = refused(capsys, script.main, "directions=half")
    assert "directions: must be 1 or more, full or null, got 'half'" in message


@pytest.mark.slow
def test_a_new_expert_starts_outside_of_what_the_experts_of_a_run_read(trained):
    run, step = trained
    folders = [str(step / "experts" / name) for name in ("vqa", "grounding")]
    base = {"rank": 2, "init": "null_space", "factors": ["B"], "init_statistics": folders}
    experts = {"fresh": ExpertConfig(**base), "led": ExpertConfig(**base, init_own_statistics=folders[0])}
    sources = {name: replace(source, expert="fresh") for name, source in run.config.data.sources.items()}
    data = replace(run.config.data, sources=sources, validation={})
    model = build_model(replace(run.config, experts=experts, stages={}, data=data))
    read = [read_statistics(folder, "") for folder in folders]
    for name, site in model.bank.sites.items():
        inputs = read[0](name).dense() + read[1](name).dense()
        leading = torch.linalg.eigh(inputs).eigenvectors.flip(1)[:, : round(0.1 * len(inputs))].float()
        for expert in experts:
            rows = site.lora_A[expert].data
            torch.testing.assert_close(rows @ rows.T, torch.eye(2) / 3, rtol=1e-4, atol=1e-5)
            assert (rows @ leading).abs().max() < 1e-4
            assert not site.lora_A[expert].requires_grad and site.lora_B[expert].requires_grad
    with pytest.raises(ValueError, match=r"factors: null_space holds as long as lora_A does not learn: set factors"):
        ExpertConfig(init="null_space", init_statistics=folders)
    with pytest.raises(ValueError, match="init_statistics: and init: null_space need each other"):
        ExpertConfig(init_statistics=folders)


@pytest.mark.slow
def test_the_shared_expert_of_a_run_is_added_to_the_merge_of_the_others(trained, tmp_path, capsys):
    run, _ = trained
    shutil.copytree(run.folder, tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "step-000005"
    config = replace(
        run.config, experts={**run.config.experts, "vqa": replace(run.config.experts["vqa"], gate="always")}
    )
    (step / "config.yaml").write_text(stored(config))
    (step / "experts" / "vqa" / FILE).unlink()  # it is not merged, so nothing of its inputs is needed
    out = f"out={tmp_path / 'out'}"
    merge_script.main([f"run={tmp_path / 'run'}", "method=regmean", "verify=false", "fidelity=false", out])
    assert "added to what the others merge to: vqa" in capsys.readouterr().out
    written = expert_from_folder(tmp_path / "out")
    experts = [expert_from_folder(step / "experts" / name) for name in ("vqa", "grounding")]
    for site, result in merge(experts, method="task_arithmetic").items():  # of one expert the merge is itself
        a, b = written.factors(site, torch.float64)
        torch.testing.assert_close(b @ a, result.lora_b @ result.lora_a, rtol=1e-4, atol=1e-6)
