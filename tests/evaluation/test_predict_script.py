"""Batch answers: those of the evaluation, kept over a kill at any moment, with bad images counted by file."""

import json

import pytest

from moa.evaluation import models, predictions
from moa.evaluation.settings import with_eval
from moa.evaluation.sources import score_sources
from moa.loaded import load
from scripts import predict, score
from tests.evaluation.test_eval import make_run
from tests.support.toy import write_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("predictions"), eval={"batch_size": 3, "max_new_tokens": 2})


@pytest.fixture(scope="module")
def model(run):
    return load(run, device="cpu")


@pytest.fixture(scope="module", autouse=True)
def loaded_once(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "open_model", lambda *_: model.network)
        yield


@pytest.fixture(scope="module")
def whole(run, loaded_once):
    """The answers to the run's eight questions."""
    answer(run, run.parent / "whole.jsonl", f"input={run.parent / 'vqa.jsonl'}")
    return run.parent / "whole.jsonl"


def answer(run, out, *overrides):
    predict.main([f"run={run}", f"out={out}", "device=cpu", "progress=false", *overrides])
    return rows_of(out)


def rows_of(out):
    return [json.loads(line) for line in out.read_text().splitlines()]


def answers_of(rows):
    return {row["id"]: row["answer"] for row in rows}


def count_answered(monkeypatch, most=None):
    """Counts the rows that are answered from now on; a KeyboardInterrupt stands for a kill before batch `most`."""
    answered, batches, real = [], [], predictions.answer_batch

    def counted(model, samples, *rest):
        if len(batches) == most:
            raise KeyboardInterrupt
        batches.append(1)
        answered.extend(sample.id for sample in samples)
        return real(model, samples, *rest)

    monkeypatch.setattr(predictions, "answer_batch", counted)
    return answered


def test_the_answers_to_a_file_are_those_of_the_evaluation_and_can_be_scored(run, model, whole, tmp_path):
    rows = rows_of(whole)
    source = model.config.data.sources["vqa"]
    (result,) = score_sources(model.network, with_eval(model.config, sources={"vqa": source}))
    assert answers_of(rows) == {r.sample.id: r.text for r in result.responses} and len(rows) == 8
    assert [row["gates"]["vqa"] for row in rows] == pytest.approx([r.gates[0][0] for r in result.responses], abs=1e-4)
    described = f"{{name: val, format: jsonl, path: {run.parent / 'vqa.jsonl'}}}"
    score.main([f"predictions={whole}", f"source={described}", f"out={tmp_path}", "progress=false"])
    assert json.loads((tmp_path / "val.json").read_text())["score"] == result.score


def test_a_folder_is_asked_one_question_and_its_bad_images_are_counted_by_file(run, model, tmp_path, capsys):
    images = tmp_path / "images"
    (images / "inner").mkdir(parents=True)
    for number in range(2):
        (images / "inner" / f"{number}.png").write_bytes((run.parent / f"{number}.png").read_bytes())
    (images / "a.png").write_bytes(b"no image")
    rows = answer(run, tmp_path / "out.jsonl", f"input={images}", "question=what?")
    found = model.ask_all([(images / "inner" / f"{number}.png", "what?") for number in range(2)])
    assert answers_of(rows) == {f"inner/{number}.png": one.text for number, one in enumerate(found)}
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["skipped"] == {"broken image": 1} and report["num_answered"] == 2
    assert [(row["file"], row["count"]) for row in report["skipped_files"]] == [(str(images / "a.png"), 1)]
    assert f"1 x {images / 'a.png'}" in capsys.readouterr().out


def test_what_was_answered_before_a_kill_is_kept_and_the_file_is_the_same(run, whole, tmp_path, monkeypatch):
    asked, out = f"input={run.parent / 'vqa.jsonl'}", tmp_path / "out.jsonl"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        count_answered(patch, most=2)
        answer(run, out, asked)
    partial = predictions.partial_of(out)
    assert not out.exists()
    partial.write_bytes(partial.read_bytes()[:-20])  # the last of its six lines half written
    answered = count_answered(monkeypatch)
    assert answer(run, out, asked) == rows_of(whole) and len(answered) == 3
    assert out.read_bytes() == whole.read_bytes() and not partial.exists()


def test_only_what_changed_is_answered_again(run, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (run.parent / "vqa.jsonl").read_text().splitlines()[:4]]
    rows = [{**row, "id": str(number), "image": str(run.parent / row["image"])} for number, row in enumerate(rows)]
    asked, out = write_rows(tmp_path / "asked.jsonl", rows), tmp_path / "out.jsonl"
    answer(run, out, f"input={asked}")
    answered = count_answered(monkeypatch)
    rows[2]["question"] = "another?"
    write_rows(asked, [rows[3], rows[2], rows[0]])
    assert [row["id"] for row in answer(run, out, f"input={asked}")] == ["3", "2", "0"] and answered == ["2"]
    answer(run, out, f"input={asked}", "gates=off")
    assert answered == ["2", "3", "2", "0"]  # another model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "one of input and source"),
        (["input=gone.csv"], "no such file or folder: gone.csv"),
        (["input=.", "question= "], "question: missing"),
        (["input=README.md", "question=what?"], "question: has no effect on a file"),
        (["input=README.md", "task=a", "withhold_task=true"], "task: has no effect"),
        (["input=README.md", "gates=oracle"], "names no expert"),
        (["input=README.md", "out=README.md"], "must be a .jsonl file"),
        (["source={format: scenes, num_samples: 3}"], "scenes has no files"),
        (["source={format: jsonl, path: out.jsonl}"], "is the file of the questions"),
    ],
)
def test_settings_without_effect_are_refused(run, settings, message, capsys):
    with pytest.raises(SystemExit):
        predict.main([f"run={run}", "out=out.jsonl", *settings])
    assert message in capsys.readouterr().err


def test_a_file_of_another_kind_is_not_overwritten_and_ids_are_unique(run, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text('{"id": "1", "answer": "mine"}\n')
    with pytest.raises(SystemExit):
        answer(run, tmp_path / "out.jsonl", f"input={run.parent / 'vqa.jsonl'}")
    assert "holds other things than answers" in capsys.readouterr().err
    row = {"image": str(run.parent / "0.png"), "question": "what?", "task": "vqa", "id": "1"}
    with pytest.raises(SystemExit):
        answer(run, tmp_path / "new.jsonl", f"input={write_rows(tmp_path / 'twice.jsonl', [row, row])}")
    assert "the id '1' is not unique" in capsys.readouterr().err
