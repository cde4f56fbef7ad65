"""eval.py on two processes, through torchrun: the files of one process, and one clear error."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import eval as eval_script
from moa.build import build_model
from moa.checkpoint import TrainState, save_checkpoint, write_run_header
from moa.config import load_config
from tests.evaluation.test_eval import make_run
from tests.support.ranks import free_port
from tests.support.tiny_clip import save_tiny
from tests.support.toy import toy_world, write_rows
from tests.training.test_clip_training import clip_world

pytestmark = pytest.mark.slow
CLOCKS = ("seconds", "tokens_per_second", "num_processes")


def llava_run(folder: Path) -> Path:
    """A run with two sources of 8 rows, one of which has no picture and one a strange task."""
    world = toy_world(folder, count=8)
    rows = [json.loads(line) for line in (folder / "vqa.jsonl").read_text().splitlines()]
    rows[1]["task"], rows[4]["image"] = "dance", "gone.png"
    bad = write_rows(folder / "bad.jsonl", rows)
    source = {"format": "jsonl", "path": str(bad), "expert": "vqa"}
    sources = world["data"]["sources"] | {"bad": source}
    return make_run(folder, eval={"batch_size": 3, "sources": sources, "compare": ["off"]})


def clip_run(folder: Path) -> Path:
    base = save_tiny("clip", folder / "base")
    changes = {"out": str(folder / "clip"), "eval": {"batch_size": 2}}
    world = clip_world(folder / "world", base, "clip") | changes
    (folder / "run.yaml").write_text(yaml.safe_dump(world))
    config = load_config(folder / "run.yaml")
    write_run_header(Path(config.out), config)
    model = build_model(config)
    save_checkpoint(Path(config.out), 1, model, config, TrainState(progress={"step": 1}))
    return Path(config.out)


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               "--master_port", str(free_port()), "eval.py", *arguments]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def files_of(run: Path) -> dict[str, object]:
    """What an evaluation has written, without what a clock says."""
    found = {}
    for folder in (*run.rglob("eval"), run / "pictures"):
        for file in filter(Path.is_file, folder.rglob("*")):
            content = file.read_bytes()
            if file.suffix == ".json":
                content = json.loads(content)
                if isinstance(content, dict):
                    content = {k: v for k, v in content.items() if k not in CLOCKS}
            found[str(file.relative_to(run))] = content
    return found


def test_two_processes_write_what_one_writes(tmp_path):
    torch.set_num_threads(1)  # as torchrun's processes have
    run, clip = llava_run(tmp_path / "llava"), clip_run(tmp_path / "clip")
    base = run.parent / "base"
    options = [
        "device=cpu",
        "eval.on_bad_sample=skip",
        "eval.max_new_tokens=6",
        "eval.num_images=3",
    ]
    arguments = [f"run={run}", f"models=[{base}, {clip}]", *options]
    eval_script.main(arguments)
    expected = [files_of(run), files_of(clip)]
    assert {"eval/bad.jsonl", "eval/off/vqa.json", "others/base/eval/grounding.json",
            "pictures/samples.png"} <= expected[0].keys()  # fmt: skip
    assert {"eval/photos.json", "eval/maps.jsonl", "pictures/samples.png"} <= expected[1].keys()
    assert expected[0]["eval/bad.json"]["num_skipped"] == 2
    for folder in (run / "eval", run / "others", run / "pictures", clip / "eval"):
        shutil.rmtree(folder)
    done = torchrun(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("data set ") == 4  # a table for each model and gates, by one process
    for before, found in zip(expected, (files_of(run), files_of(clip)), strict=True):
        assert found.keys() == before.keys()
        assert [name for name in before if found[name] != before[name]] == []
    times = json.loads((run / "eval" / "vqa.json").read_text())
    assert times["num_processes"] == 2 and times["tokens_per_second"] > 0
