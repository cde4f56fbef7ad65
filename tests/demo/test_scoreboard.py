"""The scoreboard's bookkeeping: what is there is used only if it belongs to what was asked for."""

import json
from dataclasses import replace

import pytest

from moa.checkpoint import MANIFEST
from scripts.demo.board import scoring
from scripts.demo.board.plan import ROWS, Column, Plan
from scripts.demo.board.table import collect
from scripts.demo.board.training import train


@pytest.fixture
def plan(tmp_path):
    columns = {"vqa": Column(split="test", task="vqa")}
    return Plan(out=tmp_path, seed=0, columns=columns, num_samples=8)


def checkpoint(plan, run, content):
    """The part of a trained run that a fingerprint is made of."""
    step = plan.folder / run / "checkpoints" / "step-000001"
    step.mkdir(parents=True, exist_ok=True)
    (step / MANIFEST).write_text(json.dumps({"experts": {"bytes": 1, "sha256": content}}))
    (step.parent / "last").write_text(step.name)


@pytest.mark.slow
def test_a_run_of_other_settings_is_neither_used_nor_overwritten(plan, monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.run", lambda command, **_: started.append(command) or Done())
    train(plan, "lora", "train.batch_size=8")
    train(plan, "lora", "train.batch_size=8")
    assert len(started) == 1
    for other in (replace(plan, overrides=["train.clip_norm=9"]), replace(plan, seed=0)):
        with pytest.raises(ValueError, match="lora: was trained with other settings.*another `out`"):
            train(other, "lora", "train.batch_size=4")
    assert len(started) == 1


class Done:
    returncode = 0


@pytest.mark.slow
def test_scores_are_measured_again_where_anything_that_they_belong_to_has_changed(plan, monkeypatch):
    for run in {scoring.run_of(row) for row in ROWS}:
        checkpoint(plan, run, "a")
    scored = []
    monkeypatch.setattr(scoring, "score_row", lambda p, row, ocr: scored.append(row) or record(p))
    monkeypatch.setattr(scoring, "git_commit", lambda: "c0ffee")

    def rescored(plan):
        scored.clear()
        scoring.score_rows(plan)
        return list(scored)

    assert rescored(plan) == list(ROWS) and rescored(plan) == []
    file = plan.folder / "scores" / "oracle.json"
    file.write_text(file.read_text()[:40])  # cut off by a kill
    assert rescored(plan) == ["oracle"]
    checkpoint(plan, "router_all", "b")
    of_run = ["router_all", "router_no_prefix"]
    assert rescored(plan) == [r for r in ROWS if r in of_run or r in scoring.MERGES]
    fewer = replace(plan, num_samples=4)
    assert rescored(fewer) == list(ROWS)
    assert rescored(replace(plan, overrides=["prompt.max_length=99"])) == list(ROWS)
    board = collect([plan])
    assert (board["samples_per_column"], board["commit"]) == (8, "c0ffee")


def record(plan):
    values = {"columns": {"vqa": 0.5}, "adapter_parameters": 1, "tokens_per_second": 1.0}
    return values | {"num_samples": plan.num_samples}
