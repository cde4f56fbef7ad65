"""What a step waits for: samples made ahead, without images or OCR engines on the way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.boxes import CODECS
from data.collate import ChatCollator
from data.sources import open_sources
from moa.training.batches import collate, make_loader
from tests import ROOT
from tests.support.tiny import tiny_processor
from tests.support.toy import toy_config
from tests.test_train import run_once

WITHOUT_ENGINES = """
import runpy, sys
runpy.run_path("train.py", run_name="__main__")
found = {"rapidocr", "onnxruntime", "pytesseract", "easyocr"} & sys.modules.keys()
sys.exit(f"imported {found}" if found else 0)
"""


@pytest.mark.slow
def test_the_log_says_what_each_step_waited_and_the_end_of_a_run_its_share(tmp_path, capsys):
    config = toy_config(tmp_path, stages={"joint": {"steps": 3}}, data__validation={})
    run_once(config)
    lines = [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]
    assert all(0 < line["data_wait_s"] < line["step_s"] for line in lines)
    waited, whole = (sum(line[name] for line in lines) for name in ("data_wait_s", "step_s"))
    told = f"waited for data: {waited:.1f} s of {whole:.1f} s in steps ({waited / whole:.1%})"
    assert told in capsys.readouterr().out


def toy_source(folder: Path):
    config = toy_config(folder)
    collator = ChatCollator(processor=tiny_processor(), tasks=["vqa"], experts=["vqa"], codec=CODECS["location_tokens"])
    return open_sources(config.data.sources.values(), config.data, None)["vqa"], collator


def test_samples_leave_their_images_behind(tmp_path):
    source, collator = toy_source(tmp_path)
    batch, rejected = collate(collator, [source[0], source[1]])
    assert batch is not None and not rejected
    assert [sample.image for sample in batch.samples] == [None, None]
    assert batch.image_mask.tolist() == [True, True]


def test_a_loader_keeps_a_step_of_micro_batches_ready(tmp_path):
    source, collator = toy_source(tmp_path)
    loader = make_loader(source, collator, [[0]], num_workers=2, ahead=5)
    assert loader.prefetch_factor is not None
    assert loader.prefetch_factor * 2 >= 5 + 2
    assert make_loader(source, collator, [[0]], num_workers=0, ahead=5).prefetch_factor is None


@pytest.mark.slow
def test_training_with_a_warm_cache_imports_no_ocr_engine(tmp_path):
    command = [
        sys.executable, "-c", WITHOUT_ENGINES, "--config", "configs/demo.yaml",
        f"out={tmp_path / 'run'}", "stages={joint: {steps: 1}}", "train.batch_size=4",
        "data.validation={}", "data.num_workers=0", "data.ocr_engine=true",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run/log.jsonl").read_text().count('"loss"') == 1
