"""The tutorials, command by command as they are written, on a tiny base, a few rows and one step for each stage."""

import importlib
import re
import shutil
import sys

import pytest
from accelerate.state import AcceleratorState

from moa.merging.export import verify
from tests import ROOT
from tests.cli.test_docs import commands
from tests.evaluation.test_eval import make_run
from tests.support.peft import outputs_here
from tests.support.tiny import random_image
from tests.support.toy import toy_rows, write_rows

TASKS = {"vqa": "vqa", "boxes": "grounding", "count": "count"}
FILES = TASKS | {f"{name}_held_out": task for name, task in TASKS.items()}
QUICK = {
    r"llava-hf/\S+, dtype: bf16": "base",
    r"(steps|rounds): \d+": r"\1: 1",
    "num_samples: 400": "num_samples: 4",
    "rank: 16, alpha": "rank: 2, alpha",
    r"(?s)\n## 4\..*?\n## 5\.": "\n## 5.",  # eight GPUs and published data sets
}
ONCE = "train: {batch_size: 4}\neval: {max_new_tokens: 2, num_images: 0}\nlogging: {progress: false}\n"


@pytest.mark.slow
def test_the_tutorials_run_as_they_are_written(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "tutorials.md").read_text()
    for pattern, quick in QUICK.items():
        text = re.sub(pattern, quick, text)
    shutil.copytree(make_run(tmp_path) / "checkpoints" / "step-000001" / "experts", tmp_path / "loras")
    (tmp_path / "my").mkdir()
    for number, (name, task) in enumerate(FILES.items()):
        rows = toy_rows(tmp_path / "my", task, 8)
        for place, row in enumerate(rows):
            row["image"] = f"{name}_{place}.png"
            random_image(100 * number + place).save(tmp_path / "my" / row["image"])
        write_rows(tmp_path / "my" / f"{name}.jsonl", rows)
    for name, body in re.findall(r"```yaml\n# (\w+\.yaml)\n(.*?)```", text, re.S):
        (tmp_path / name).write_text(body + (ONCE if name == "mixture.yaml" else ""))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verify, "fresh_outputs", outputs_here)
    followed = []
    for name, *words in commands(text):
        if name == "scripts.playground":
            continue
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(sys, "argv", [name, *words])  # what train.py and federate.py read
        main = importlib.import_module(name.removesuffix(".py")).main
        try:
            main() if name in ("train.py", "federate.py") else main(words)
        except SystemExit as end:  # scripts.data
            assert not end.code
        followed.append(name)
    assert followed.count("train.py") == 2 and followed.count("eval.py") == 4 and "scripts.serving" in followed
    assert (tmp_path / "runs" / "mixture" / "merged" / "adapter_model.safetensors").is_file()
    assert "--enable-lora --enable-tower-connector-lora --max-lora-rank 8 --max-loras" in capsys.readouterr().out
