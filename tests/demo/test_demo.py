"""The commands of `make demo` on the real base and real scenes, cut to a few steps and samples."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from scripts.demo.base.model import cut_layers
from tests import ROOT
from tests.support.tiny import tiny_llava

BASE = ROOT / "assets" / "demo_base"
EVAL_SOURCES = ("vqa", "line", "caption", "grounding", "ocr_vqa", "count", "yes_no")
SHORT = ["stages.experts.steps=3", "stages.joint.steps=3",
         "stages.experts.warmup_steps=1", "stages.joint.warmup_steps=1",
         "train.batch_size=10", "eval.every=0", "data.validation={}",
         *(f"eval.sources.{name}.num_samples=4" for name in EVAL_SOURCES)]  # fmt: skip


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def keys_of(checkpoint: Path) -> set[str]:
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_the_base_is_small_enough_to_lie_in_the_repository():
    model = AutoModelForImageTextToText.from_pretrained(BASE)
    assert sum(p.numel() for p in model.parameters()) <= 8e6
    assert (BASE / "model.safetensors").stat().st_size <= 16 * 2**20


def test_a_base_without_its_later_layers_is_stored_and_loaded_as_one(tmp_path):
    whole, _ = tiny_llava(num_layers=3)
    first = {key: value for key, value in whole.state_dict().items() if ".language_model.layers.2." not in key}
    cut_layers(whole, 2)
    whole.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.config.text_config.num_hidden_layers == 2
    assert loaded.state_dict().keys() == first.keys()
    assert all(value.equal(first[key]) for key, value in loaded.state_dict().items())


@pytest.mark.slow
def test_the_demos_commands_lead_from_pictures_to_one_adapter_that_plain_peft_loads(tmp_path):
    out, adapter, whole = tmp_path / "run", tmp_path / "adapter", tmp_path / "whole"
    run("train.py", "--config", "configs/demo.yaml", f"out={out}", *SHORT)
    table = run("eval.py", f"run={out}", "eval.num_images=2")
    assert "grounding" in table
    run("-m", "scripts.merge", f"run={out}", "weights=gates", "rank=sum", f"out={adapter}")
    run("-m", "scripts.merge", f"run={out}", "weights=gates", "merged=true", f"out={whole}")

    report = json.loads((adapter / "export_report.json").read_text())
    assert report["kind"] == "adapter"
    base = AutoModelForImageTextToText.from_pretrained(BASE)
    assert PeftModel.from_pretrained(base, adapter).peft_config["default"].r == 40
    assert keys_of(whole) == keys_of(BASE)
    for picture in ("samples.png", "gates.png", "losses.png"):
        assert (out / "pictures" / picture).stat().st_size > 10_000
    routing = json.loads((out / "eval" / "routing.json").read_text())
    assert routing["experts"] == ["vqa", "caption", "grounding", "ocr_vqa", "line"]
