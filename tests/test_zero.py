"""DeepSpeed ZeRO: the losses and checkpoints of plain training, and an exact resume."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from moa.checkpoint import load_model
from moa.config import RunConfig
from tests.test_train import assert_close, log_of, run_once, steps_of
from tests.toy import toy_config

pytest.importorskip("deepspeed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles an operator"),
]
STAGES = [{"name": "experts", "steps": 2}, {"name": "joint", "steps": 3}]


def sharded(
    folder: Path, config: RunConfig, stage: int, *flags: str, script: str = "train.py"
) -> None:
    """Train on two processes; every parameter is sharded in stage 3, however small."""
    settings = folder / "zero.json"
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    settings.write_text(json.dumps({"zero_optimization": zero}))
    (folder / "run.json").write_text(json.dumps(asdict(config)))
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed",
        "--deepspeed_config_file", str(settings), "--zero3_init_flag", "false",
        "--num_processes", "2", "--num_machines", "1", "--dynamo_backend", "no",
        script, "--config", str(folder / "run.json"), *flags,
    ]  # fmt: skip
    paths = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": paths,
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("stage", [2, 3])
def test_sharded_training_equals_plain_training_and_resumes_exactly(tmp_path, stage):
    changes = {"router__modality_dropout": 0, "losses__load_balancing": 0, "stages": STAGES,
               "train__save_every": 2, "train__keep_last": 9, "train__micro_batch_size": 1}  # fmt: skip
    plain = toy_config(tmp_path, out=str(tmp_path / "plain"), **changes)
    zero = toy_config(tmp_path, out=str(tmp_path / "zero"), **changes)
    run_once(plain)
    sharded(tmp_path, zero, stage)
    assert_close(log_of(plain), log_of(zero))
    (one, *_), (two, *_) = load_model(plain.out), load_model(zero.out)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name
    if stage == 2:
        return  # the same code resumes both, and a launch is slow
    before = [line["loss"] for line in steps_of(zero)]
    (Path(zero.out) / "checkpoints" / "last").write_text("step-000004\n")
    sharded(tmp_path, zero, stage, "--resume")
    assert [line["loss"] for line in steps_of(zero)] == pytest.approx(before, rel=1e-9)
