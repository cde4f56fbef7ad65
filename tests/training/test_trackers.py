"""Trackers get more than metrics, without an account: what train.py and eval.py sent is read back from the files."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval as eval_script
from moa.training.report import mean_gates
from tests.support.toy import toy_config
from tests.test_train import run_once

BLOCK, HEADER = 32768, 7  # of the log of records that a .wandb file is, after a head of 7 bytes


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        patch.delenv("WANDB_API_KEY", raising=False)
        folder = tmp_path_factory.mktemp("world")
        trackers = ["tensorboard", "wandb"]
        config = toy_config(folder, logging__trackers=trackers, stages={"joint": {"steps": 2}}, eval__num_samples=2)
        run_once(config).accelerator.end_training()
        eval_script.main([f"run={config.out}", "progress=false", "eval.max_new_tokens=3", "eval.num_images=2"])
        patch.undo()
    return Path(config.out)


def records(file: Path) -> Iterator[bytes]:
    """The records of an offline run of wandb: pieces of [crc 4, length 2, type 1], none over the end of a block."""
    data, place, whole = file.read_bytes(), 7, b""
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + HEADER])
        whole += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):  # all of a record, or its last piece
            yield whole
            whole = b""


def read_offline(folder: Path) -> tuple[dict, list[dict]]:
    """Config and history of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    config, history = {}, []
    for data in records(next(folder.glob("*.wandb"))):
        record = Record.FromString(data)
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        if items := record.history.item:
            history.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return config, history


@pytest.mark.slow
def test_an_offline_run_of_wandb_has_metrics_the_config_images_and_tables(run):
    found = [read_offline(folder) for folder in sorted((run / "wandb").glob("offline-run-*"))]
    (config, history), (eval_config, evaluated) = sorted(found, key=lambda one: "train.batch_size" not in one[0])
    assert config["train.batch_size"] == eval_config["train"]["batch_size"] == 4
    steps = [line for line in history if "loss" in line]
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in steps] == [line["loss"] for line in logged if "loss" in line]
    gates = next(line["images/gates.path"] for line in history if "images/gates.path" in line)
    sent = {key: value for line in evaluated for key, value in line.items()}
    assert {f"images/{name}.path" for name in ("samples", "gates", "losses")} <= sent.keys()
    files = {file.name: file for file in (run / "wandb").rglob("media/**/*") if file.is_file()}
    image = Image.open(files[Path(gates).name])
    assert image.size == Image.open(run / "pictures" / "gates_in_training.png").size
    table = json.loads(files[Path(sent["tables/scores.path"]).name].read_text())
    own = json.loads((run / "eval" / "vqa.json").read_text())["score"]
    assert table["columns"][0] == "data set" and table["data"][0][3] == own["value"] == sent["score/vqa"]
    samples = json.loads(files[Path(sent["tables/samples.path"]).name].read_text())
    assert len(samples["data"]) == 2 and samples["columns"][-2:] == ["gate vqa", "gate grounding"]


@pytest.mark.slow
def test_tensorboard_has_metrics_the_config_images_and_tables(run):
    training, evaluated = (EventAccumulator(str(run / "moa" / name)).Reload() for name in ("", "eval"))
    assert [event.step for event in training.Scalars("loss")] == [1, 2]
    assert len(training.Images("images/gates")) == 1 and "experts" in str(
        next((run / "moa").rglob("hparams.yml")).read_text()
    )
    assert {"images/samples", "images/gates", "images/losses"} == {*evaluated.Tags()["images"]}
    assert evaluated.Images("images/samples")[0].step == 2
    assert {*evaluated.Tags()["tensors"]} == {
        "config/text_summary",
        *(f"tables/{n}/text_summary" for n in ("scores", "samples")),
    }


def test_mean_gates_are_of_the_steps_that_have_the_task():
    lines = [
        {"loss/a": 1.0, "gates/a/x": 1.0, "gates/a/y": 0.0},
        {"loss/a": 1.0, "gates/a/x": 0.5, "gates/a/y": 0.5, "loss/b": 1.0, "gates/b/x": 0.0, "gates/b/y": 1.0},
        {"validation": 1.0},
    ]
    assert mean_gates(lines, ["x", "y"])["per_kind"] == {"a": [0.75, 0.25], "b": [0.0, 1.0]}
    assert mean_gates(lines[2:], ["x", "y"]) == {}
