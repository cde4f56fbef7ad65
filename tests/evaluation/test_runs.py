"""Run folders side by side: what differs, the scores of their own weights, and the reason of each broken one."""

import json
from pathlib import Path

import pytest
import yaml

from moa.checkpoint import weights_fingerprint
from moa.config import load_config
from moa.evaluation.fingerprints import digest
from moa.evaluation.runs import differences, find_runs, read_run
from scripts import runs

SOURCE = {"format": "jsonl", "path": "rows.jsonl", "task": "vqa", "expert": "a"}
CONFIG = {
    "experts": {"a": {"rank": 2}},
    "data": {"sources": {"vqa": SOURCE}},
    "stages": {"experts": {"steps": 20}},
    "train": {"batch_size": 4},
}


def make_run(folder: Path, value: float = 0.5, **changes) -> Path:
    """A run folder as train.py and eval.py leave it, without a model."""
    step = folder / "checkpoints" / "step-000012"
    step.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | changes))
    lines = [{"step": n, "stage": "experts", "loss": float(n)} for n in range(1, 21)] + [{"validation": 0.25}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "checkpoints" / "last").write_text("step-000012\n")
    (step / "manifest.json").write_text(json.dumps({"router.safetensors": {"bytes": 1, "sha256": folder.name}}))
    write_result(folder / "eval", weights_fingerprint(step), value)
    return folder


def write_result(folder: Path, weights: str, value: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = json.dumps({"id": "1", "score": value}) + "\n"
    tasks = {"vqa": {"primary": "vqa_accuracy"}}
    record = {"name": "vqa", "score": {"value": value, "se": 0.1}, "tasks": tasks}
    record["fingerprints"] = {"weights": weights, "rows": digest(rows)}
    (folder / "vqa.jsonl").write_text(rows)
    (folder / "vqa.json").write_text(json.dumps(record))


def test_only_settings_that_differ_are_listed_and_what_some_lack_is_one_row(tmp_path):
    one = make_run(tmp_path / "a") / "config.yaml"
    some = load_config(one, ["train.batch_size=7", "experts.extra={rank: 3}", "out=elsewhere"])
    found = differences([load_config(one), some])
    assert [*found] == ["experts.extra", "train.batch_size"] and found["train.batch_size"] == ["4", "7"]
    absent, there = found["experts.extra"]
    assert absent == "-" and "rank: 3" in there
    assert not differences([some, some])


def test_the_table_has_steps_losses_scores_settings_and_reasons(tmp_path, capsys):
    first = make_run(tmp_path / "a", value=0.5)
    make_run(tmp_path / "deep" / "b", value=0.75, train={"batch_size": 7})
    (make_run(tmp_path / "c") / "config.yaml").unlink()
    write_result(first / "eval" / "off", weights_fingerprint(first / "checkpoints" / "step-000012"), 0.25)
    assert [path.name for path in find_runs(tmp_path)] == ["a", "c", "b"]
    runs.main([str(tmp_path)])
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()]
    # the mean of the last ten losses, which are the numbers of their steps
    assert ["a", "20", "of", "20", "15.500", "0.250"] in rows
    assert ["a", "50±10"] in rows and ["a:", "off", "25±10"] in rows and ["deep/b", "75±10"] in rows
    assert ["train.batch_size", "4", "7"] in rows and "c: config.yaml is missing" in shown


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda run: (run / "config.yaml").unlink(), "config.yaml is missing"),
        (lambda run: (run / "config.yaml").write_bytes(b"\xff\x00{"), "config.yaml: "),
        (lambda run: (run / "config.yaml").write_text("experts: {a: {rank: many}}"), "config.yaml: "),
        (lambda run: (run / "log.jsonl").write_text('{"st\n{"step": 1}\n'), "log.jsonl:1: not JSON"),
        (lambda run: (run / "log.jsonl").write_text("[1]\n"), "log.jsonl:1: is no object"),
        (lambda run: (run / "log.jsonl").write_text('{"step": 3, "loss": NaN}\n'), "has 3 of"),
        (lambda run: (run / "checkpoints" / "last").unlink(), "no checkpoint: "),
        (lambda run: (run / "checkpoints" / "step-000012" / "manifest.json").write_text("{"), "no checkpoint: "),
        (lambda run: (run / "eval" / "vqa.json").write_text("{"), "vqa.json: missing, damaged"),
        (lambda run: write_result(run / "eval", "others", 1.0), "of other weights"),
        (lambda run: write_record(run, {"fingerprints": 3}), "vqa.json: missing, damaged"),
        (lambda run: write_record(run, {"tasks": 3}), "is not what eval.py writes"),
    ],
)
def test_what_is_broken_is_one_line(tmp_path, harm, reason):
    run = make_run(tmp_path / "run")
    harm(run)
    (found,) = read_run(run).problems
    assert reason in found and "\n" not in found


def test_a_federation_has_rounds_and_the_last_loss_of_its_server(tmp_path, capsys):
    run = make_run(tmp_path / "fed")
    (run / "federated.yaml").write_text("federated: {rounds: 3}")
    lines = [{"step": 60 * n, "stage": "server", "round": n, "rounds": 3, "validation": 1.0 / n} for n in (1, 2)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "has 2 of 3 rounds" in read_run(run).problems[0]
    runs.main([str(tmp_path)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["fed", "2", "of", "3", "rounds", "-", "0.500", "1"] in rows


def write_record(run: Path, changes: dict) -> None:
    file = run / "eval" / "vqa.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_one_run_and_no_run(tmp_path, capsys):
    runs.main([str(make_run(tmp_path / "alone"))])
    assert "alone" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    for folder, message in (("empty", "holds no run"), ("gone", "no such folder")):
        with pytest.raises(SystemExit):
            runs.main([str(tmp_path / folder)])
        assert message in capsys.readouterr().err
