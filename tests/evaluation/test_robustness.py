"""The study of corruptions: paired falls with intervals, in a table and an image."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from data.corruption import CORRUPTIONS
from data.sample import OcrWord, Sample
from moa.analysis.plots import mixing_chart, robustness_chart
from moa.benchmarks.scores import Response, Scores
from moa.evaluation.result import Result
from moa.evaluation.robustness import mixing, mixing_table, study, table
from scripts import robustness
from tests.support.toy import toy_config
from tests.test_train import run_once


def read(text: str, number: int) -> Sample:
    word = OcrWord(text=text, box=(0, 0, 9, 9), confidence=0.9)
    made = {"image": None, "answers": (text,), "ocr": (word,)}
    return Sample(id=str(number), image_id=str(number), question="q", task="vqa", source="s", **made)


def scorer(view) -> list[Result]:
    """A model that reads the sign, on two data sets."""
    results = []
    for name, text in (("one", "FROM"), ("two", "STOP")):
        whole = [read(text, number) for number in range(40)]
        seen = whole if view is None else view(whole)
        samples = [seen[i] for i in range(len(seen))]
        values = [float(any(word.text == text for word in s.ocr)) for s in samples]
        responses = [Response(sample=s, text="") for s in samples]
        results.append(Result(name=name, tasks={"vqa": (responses, Scores(primary="x", values={"x": values}))}))
    return results


@pytest.mark.slow
def test_falls_are_those_of_the_scores_with_intervals_around_them(tmp_path):
    record = study(scorer, ["typos", "ocr"])
    assert record["clean"]["mean"] == {"value": 100.0, "low": 100.0, "high": 100.0}
    typos = record["corruptions"]["typos"]["strengths"]
    assert all(row["fall"]["value"] == row["fall"]["low"] == 0 for row in typos.values())  # nothing is read there
    rows = [*record["corruptions"]["ocr"]["strengths"].values()]
    falls = [row["fall"]["value"] for row in rows]
    assert falls == sorted(falls, reverse=True) and falls[0] < 0
    assert falls[-1] == pytest.approx(-100)  # every word is lost or misread
    for row in rows:
        assert row["mean"]["value"] == pytest.approx(sum(row["scores"].values()) / 2, abs=1e-3)
        assert row["fall"]["low"] <= row["fall"]["value"] <= row["fall"]["high"]
    console = Console(width=120, record=True)
    console.print(table(record))
    text = console.export_text()
    assert "clean" in text and "-100.0 [-100.0, -100.0]" in text
    robustness_chart(tmp_path / "robustness.png", record)
    assert (tmp_path / "robustness.png").stat().st_size > 5000


def mixed_scorer(experts, data_sets) -> list[Result]:
    """Each data set is right as often as its expert has gates, and `c` is spoilt by all that is beside it."""
    results = []
    for name in data_sets:
        share = (name in experts) / len(experts) if name == "c" or "c" in experts else 1.0
        samples = [read("STOP", number) for number in range(40)]
        values = [float(number < 40 * share) for number in range(40)]
        responses = [Response(sample=s, text="") for s in samples]
        results.append(Result(name=name, tasks={"vqa": (responses, Scores(primary="x", values={"x": values}))}))
    return results


@pytest.mark.slow
def test_pairs_lose_what_their_data_sets_lose_and_signs_go_with_it(tmp_path):
    signs = {("a", "b"): 0.4, ("a", "c"): 0.6, ("b", "c"): 0.6, ("d", "e"): 0.5}  # nobody has data of d and e
    record = mixing(mixed_scorer, {name: name for name in "abc"}, signs)
    assert [pair["experts"] for pair in record["pairs"]] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert [pair["fall"]["value"] for pair in record["pairs"]] == [0, -50, -50]
    assert record["correlation"] == pytest.approx(-1)
    assert mixing(mixed_scorer, {"a": "a"}, {("a", "b"): 0.4})["correlation"] is None
    console = Console(width=120, record=True)
    console.print(mixing_table(record))
    text = console.export_text()
    assert "correlation -1.00" in text and "60.0%" in text
    mixing_chart(tmp_path / "mixing.png", record)
    assert (tmp_path / "mixing.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_command_scores_a_run_and_leaves_its_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(CORRUPTIONS, "noise", replace(CORRUPTIONS["noise"], strengths=(0.1,)))
    config = toy_config(tmp_path, stages={"joint": {"steps": 1}}, eval__every=0)
    run_once(config)
    asked = [f"run={config.out}", "corruptions=[noise]", "num_samples=2", "progress=false", "device=cpu"]
    robustness.main([*asked, "mixing=true"])
    folder = tmp_path / "run" / "robustness"
    record = json.loads((folder / "robustness.json").read_text())
    assert record["data_sets"] == ["vqa", "grounding"] and len(record["corruptions"]["noise"]["strengths"]) == 1
    (pair,) = record["mixing"]["pairs"]
    assert pair["experts"] == ["vqa", "grounding"] and 0 <= pair["sign_disagreement"] <= 1
    assert (folder / "mixing.png").is_file() and record["mixing"]["correlation"] is None
    assert (folder / "robustness.png").is_file() and "noise" in capsys.readouterr().out
