"""Two processes, through the launch files of configs/accelerate/: the losses and weights of one."""

import json
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file

from data.mixture import Mixture
from moa.build import build_model
from moa.checkpoint import step_folder
from moa.cli.settings import as_mapping
from moa.config import RunConfig, load_config
from moa.files.peft import save_expert
from tests import ROOT
from tests.support.launching import launch, launch_command
from tests.support.tiny_clip import save_tiny
from tests.support.toy import toy_config, toy_world, write_rows
from tests.test_train import log_of, run_once
from tests.training.test_clip_training import clip_world
from tests.training.test_non_finite import ALIKE, SKIP, assert_left_out, run_spoiled

FILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


# The launch files --------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_knows_every_key_of_a_launch_file(file):
    load_config_from_file(str(file))  # refuses unknown keys, but for those of the nested tables
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    known = set(vars(arguments))
    found, config, _ = _validate_launch_command(arguments)
    fsdp = {key if key.startswith("fsdp") else f"fsdp_{key}" for key in config.fsdp_config}
    assert fsdp | config.deepspeed_config.keys() <= known
    assert found.mixed_precision == "no"  # the run says
    assert str(file.relative_to(ROOT)) in file.read_text()  # its own command


def test_there_is_a_launch_file_for_each_way_to_train():
    names = {"single", "ddp", "zero2", "zero3", "zero3_offload", "fsdp2", "multi_node"}
    assert {file.stem for file in FILES} == names


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision: bf16 .* train.precision=fp32"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps: 4"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version: 1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
          "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "train.gradient_checkpointing=true"),
    ],
)  # fmt: skip
def test_a_launch_file_that_contradicts_the_run_is_refused(tmp_path, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        run_once(read(toy_world(tmp_path)))


@pytest.fixture
def sharded(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")


def test_a_clip_is_not_sharded(sharded, tmp_path):
    world = clip_world(tmp_path / "world", save_tiny("clip", tmp_path / "base"), "clip")
    with pytest.raises(ValueError, match="base is a CLIP, not to be sharded; choices .*: ddp"):
        run_once(read(world))


def test_anchors_are_not_sharded(sharded, tmp_path):
    with pytest.raises(ValueError, match="router.kind=anchors: .* choices .*: ddp, zero2"):
        run_once(read(toy_world(tmp_path) | {"router": {"kind": "anchors"}}))


def test_processes_that_hang_are_ended_with_their_stacks():
    hang = "import threading\ndef waits_for_the_other():\n threading.Event().wait()\n"
    command = [sys.executable, "-c", hang + "print('before'); waits_for_the_other()"]
    with pytest.raises(AssertionError, match=r"no output for 2(?s:.*)before(?s:.*)waits_for_the_other"):
        launch(command, silence=2.0)


@pytest.mark.slow
def test_a_silent_process_whose_child_computes_does_not_hang_until_the_limit():
    compile_for = "import os, time\nwhile os.times().user < {}: pass"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    command = [sys.executable, "-c", parent]
    launch([*command, compile_for.format(1)], silence=1.0)
    with pytest.raises(AssertionError, match="no output for 0.5"):
        launch([*command, compile_for.format(60)], silence=0.5, longest=1.0)


# Runs --------------------------------------------------------------------------------------------


def read(world: dict) -> RunConfig:
    """A config from plain data, by way of a file beside its run folder."""
    file = Path(world["out"]).with_suffix(".json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(world))
    return load_config(file)


def apart(folder: Path) -> dict:
    """The first process has text and expert vqa, the other pictures and expert grounding.

    Each leaves the other's expert unused, the first all experts in the vision tower; rates are high.
    """
    folder.mkdir()
    world = toy_world(folder)
    talk = [
        {"conversations": [{"from": "human", "value": f"what is {i} and {i + 1}?"},
                           {"from": "gpt", "value": f"{2 * i + 1}"}]}
        for i in range(24)
    ]  # fmt: skip
    path = write_rows(folder / "talk.jsonl", talk)
    talk = {"format": "llava", "path": str(path), "task": "vqa", "expert": "vqa"}
    grounding = world["data"]["sources"]["grounding"]
    world["data"]["sources"] = {"talk": talk, "grounding": grounding}
    names = ["talk", "grounding"]
    world["model"]["targets"] += [
        r"model\.vision_tower\..*layers\.[01]\.mlp\.fc\d", r"model\.multi_modal_projector\..*",
    ]  # fmt: skip
    world["stages"] = {
        "experts": {"steps": 2, "lr": {"experts": 0.01}},
        "router": {"steps": 1, "lr": {"router": 0.01}},
        "joint": {"steps": 1, "lr": {"experts": 0.01}},
    }
    world["train"] = {"batch_size": 2, "micro_batch_size": 1, "save_every": 1}
    world["seed"] = next(seed for seed in range(9999) if deals_in_turn(names, seed, num_steps=4))
    return world


def deals_in_turn(names: list[str], seed: int, num_steps: int) -> bool:
    mixture = Mixture({name: range(24) for name in names}, seed=seed)
    return all(mixture.locate(i)[0] == names[i % 2] for i in range(2 * num_steps))


def together(folder: Path) -> dict:
    """A frozen expert, a sparse one, two that share their A, hold a start and have gates of their ranks, checkpointing,
    accumulation, clipping, weight decay, a trained projector, and a later stage that starts from an adapter."""
    folder.mkdir()
    world = toy_world(folder)
    own = {"rank": 2, "alpha": 4, "init": "random_b", "targets": [*world["model"]["targets"]]}
    attention = r"model\.language_model\.layers\.\d+\.self_attn\.q_proj"
    world["model"]["targets"].append(attention)
    world["experts"] = {name: {**own, "share_a": "one", "rank_gates": "task"} for name in ("vqa", "grounding")}
    world["experts"]["spare"] = {"frozen": True, "init_from": str(folder / "adapter")}
    world["experts"]["sparse"] = {"kind": "sparse", "rank": 2, "gate": "always", "targets": [attention]}
    world["model"]["train_projector"] = True
    world["router"]["per_site"] = True
    world["train"] = {
        "batch_size": 8, "micro_batch_size": 2, "gradient_checkpointing": True, "clip_norm": 0.05,
        "weight_decay": 0.1, "save_every": 1, "keep_last": 9,
    }  # fmt: skip
    world["stages"] = {
        "experts": {"steps": 1, "lr": {"experts": 0.01, "projector": 0.01}},
        "joint": {"steps": 3, "lr": {"experts": 0.01, "router": 0.01},
                  "init_from": {name: str(folder / "adapter") for name in ("vqa", "grounding")}},
    }  # fmt: skip
    config = read({**world, "experts": {"vqa": own}, "stages": {}, "data": {
        **world["data"], "expert": "vqa"}})  # fmt: skip
    bank = build_model(config).bank
    tensors = {key: torch.full_like(value, 0.01) for key, value in bank.state("vqa").items()}
    save_expert(folder / "adapter", tensors, bank.peft_config("vqa"))
    return world


def pairs(folder: Path) -> dict:
    """Contrastive pairs: each process has texts and pictures of all as negatives."""
    folder.mkdir()
    world = clip_world(folder, save_tiny("clip", folder / "base"), "clip")
    world["train"] = {"batch_size": 6}
    world["data"]["validation"] = {}  # whose negatives are those of a process's own batches
    world["stages"] = {"joint": {"steps": 2, "lr": {"experts": 0.05, "router": 0.01}}}
    return world


def layered(folder: Path) -> dict:
    """Layers have one A and one B for each expert, an MLP one router for the tokens of a prompt, ranks their gates."""
    folder.mkdir()
    world = toy_world(folder)
    for expert, kind in zip(world["experts"].values(), ("task", "token"), strict=True):
        expert |= {"tie_layers": [r".*\.(up|down)_proj"], "rank_gates": kind}
    world["router"] |= {"granularity": "token", "share": "module", "pool": "prompt_mean"}
    world["train"] = {"batch_size": 4, "micro_batch_size": 1, "save_every": 9}
    world["stages"] = {"joint": {"steps": 2, "lr": {"experts": 0.05, "router": 0.01}}}
    return world


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> list[RunConfig]:
    """What one process makes of each."""
    root = tmp_path_factory.mktemp("references")
    configs = []
    for make in (apart, pairs, layered, together):
        world = make(root / make.__name__)
        world["router"]["modality_dropout"] = 0.0  # each process draws its own
        world["losses"] = {"z": 0.01}  # balance is a micro-batch's
        grounding = world["experts"].get("grounding")  # the CLIP has none
        if grounding is not None and "rank_gates" not in grounding:
            world["losses"]["crosstalk"] = 0.1
        if grounding is not None and "share_a" not in grounding:
            world["losses"]["orthogonality"] = 0.1
        configs.append(read(world))
        run_once(configs[-1])
    return configs


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory) -> RunConfig:
    """What one process makes of a run with NaN at two steps, which are left out."""
    folder = tmp_path_factory.mktemp("spoiled")
    config = toy_config(folder, **SKIP, **ALIKE)
    run_spoiled(config, loss=2, gradient=3)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_processes_are_one_leave_out_the_step_of_one_and_resume_exactly(references, spoiled, tmp_path, name):
    if name != "ddp":  # a CLIP is not sharded
        references = [config for config in references if not config.out.endswith("pairs/run")]
    if name == "fsdp2":  # which gathers a block by itself
        references = [config for config in references if not config.out.endswith("layered/run")]
    configs = [replace(c, out=str(tmp_path / Path(c.out).parent.name)) for c in references]
    left_out = replace(spoiled, out=str(tmp_path / "spoiled"))
    files = [str(Path(read(as_mapping(c)).out).with_suffix(".json")) for c in (left_out, *configs)]
    script = str(ROOT / "tests" / "support" / "distributed.py")
    launch(launch_command(name, "--num_processes", "2", script, *files, "--resume", files[-1], "2"))
    assert_left_out(left_out, spoiled)
    for config, reference in zip(configs, references, strict=True):
        assert_same_run(config, reference)
    again = replace(configs[-1], out=configs[-1].out + "-again")
    assert log_of(again) == log_of(configs[-1])
    last, resumed = (tensors_of(step_folder(c.out, "last")) for c in (configs[-1], again))
    assert all(torch.equal(last[key], resumed[key]) for key in last)


@pytest.mark.slow
def test_two_machines_of_one_process_each_are_one(references, tmp_path):
    config = replace(references[0], out=str(tmp_path / "run"))
    file = str(Path(read(as_mapping(config)).out).with_suffix(".json"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    options = ["--num_machines", "2", "--num_processes", "2", "--main_process_port", port]
    machines = [
        launch_command("multi_node", *options, "--machine_rank", rank, "train.py", "--config", file)
        for rank in ("0", "1")
    ]
    launch(*machines)
    assert_same_run(config, references[0])


def assert_same_run(config: RunConfig, reference: RunConfig) -> None:
    for line, expected in zip(log_of(config), log_of(reference), strict=True):
        assert (line["step"], line["stage"]) == (expected["step"], expected["stage"])
        assert ("crosstalk" in line) == ("crosstalk" in expected)
        for key in ("loss", "grad_norm", "validation", "samples", "tokens_read", "crosstalk"):
            assert line.get(key, 0) == pytest.approx(expected.get(key, 0), rel=1e-5), line
    found, wanted = (tensors_of(step_folder(c.out, "last")) for c in (config, reference))
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=1e-5, msg=key)


def tensors_of(step: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint but the random states; each has elements."""
    files = [file for file in sorted(step.rglob("*.safetensors")) if file.stem != "rng"]
    tensors = {f"{file.relative_to(step)}:{key}": tensor for file in files for key, tensor in load_file(file).items()}
    empty = [key for key, tensor in tensors.items() if not tensor.numel()]
    assert tensors and not empty, empty
    return tensors
