"""The page of a run: whole from files alone, safe from what they hold, and open about what is missing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from moa.checkpoint import weights_fingerprint
from moa.evaluation.fingerprints import digest
from moa.evaluation.run_page import crosstalk_section, federation_section, interval, run_page, scores_section
from moa.evaluation.runs import read_run
from scripts import report
from tests.evaluation.test_runs import CONFIG, make_run, write_result
from tests.support.tiny import random_image
from tests.support.toy import write_rows

EVIL = "<script>alert('&')</script>"


def full_run(folder: Path) -> Path:
    """A run of two experts with scores, other gates, a summary, gates by task, and samples whose text is hostile."""
    random_image(0).save(folder / "0.png")
    asked = [{"image": "0.png", "question": f"{EVIL} {n}", "task": "vqa", "id": str(n)} for n in range(3)]
    source = {"format": "jsonl", "path": str(write_rows(folder / "rows.jsonl", asked)), "task": "vqa", "expert": "a"}
    run = make_run(
        folder / "run",
        experts={"a": {"rank": 2}, "b": {"rank": 2}},
        data={"sources": {"vqa": source}, "validation": {"vqa": source}, "tasks": ["vqa"]},
    )
    weights = weights_fingerprint(run / "checkpoints" / "step-000012")
    row = {"image_id": "0.png", "task": "vqa", "answers": [EVIL], "boxes": [[1, 2, 20, 20]], "gates": [0.25, 0.75]}
    rows = [
        {**row, "id": one["id"], "question": one["question"], "prediction": EVIL, "score": 1.0, "predicted_box": None}
        for one in asked
    ]
    rows[0]["predicted_box"] = [0, 0, 400, 3]  # beyond the image
    for gates, score in (("", 1.0), ("off", 0.0)):
        place = run / "eval" / gates
        write_result(place, weights, score)
        text = "".join(json.dumps({**one, "score": score}) + "\n" for one in rows)
        record = json.loads((place / "vqa.json").read_text())
        record["fingerprints"]["rows"] = digest(text)
        (place / "vqa.jsonl").write_text(text)
        (place / "vqa.json").write_text(json.dumps(record))
    score = {"vqa": {"value": 0.4, "se": None}}
    summary = {"rows": {f"merged, {EVIL}": score}, "weights": {"routed experts": weights}, "gains": ["gained 60"]}
    (run / "summary.json").write_text(json.dumps(summary))
    routing = {
        **{"experts": ["a", "b"], "choices": ["a", "b"], "sites": [], "mean_over": ["vqa"], "missing_tasks": []},
        **{"per_task": {"vqa": [0.25, 0.75]}, "per_kind": {"vqa": [0.25, 0.75]}, "held_out": [], "dead": ["a"]},
        **{"samples_per_task": {"vqa": 3}, "mutual_information": 0.0, "weights": weights},
    }
    (run / "eval" / "routing.json").write_text(json.dumps(routing))
    return run


class Reader(HTMLParser):
    """Tags, links and visible text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.links, self.said = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data):
        self.said.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return full_run(tmp_path_factory.mktemp("page"))


@pytest.mark.slow
def test_the_page_holds_scores_gates_and_samples_and_nothing_from_outside(run):
    report.main([f"run={run}"])
    source = (run / "report.html").read_text()
    page = Reader(source)
    text = " ".join(" ".join(page.said).split())
    assert "script" not in page.tags and text.count(EVIL) >= 3 + 3 + 1  # questions, answers, the merged row
    assert all(link.startswith("data:image/") for link in page.links)
    assert [link[:16] for link in page.links].count("data:image/jpeg;") == 3  # the samples
    heads = re.findall(r"<h2>(.*?)</h2>", source)
    assert heads == ["Scores", "What was trained", "Losses", "Who answers what", "Samples", "Cost"]
    assert "gained 60" in text and "100.0 (80.4 to 100.0)" in text and "+100.0" in text and "40.0" in text
    assert "Hardly used in any task: a." in text and 'class="problem"' not in source


def test_an_interval_has_both_ends_and_none_without_an_error():
    assert interval({"value": 0.5, "se": 0.01}) == "50.0 (48.0\xa0to\xa052.0)"
    assert interval({"value": -0.02, "se": None}, "+") == "-2.0" and interval(None) == "-"


@pytest.mark.slow
def test_a_federation_has_its_rounds_and_the_scores_of_each_client(tmp_path):
    run = make_run(tmp_path / "run")
    partition = {"clients": 2, "how": "by_source", "zipf": 0.0}
    (run / "federated.yaml").write_text(yaml.safe_dump(CONFIG | {"federated": {"rounds": 2, "partition": partition}}))
    nobody = {"stage": "server", "dropouts": [], "failed": {}, "refused": [], "bytes_up": 2**20, "bytes_down": 2**21}
    rounds = [
        nobody | {"round": 1, "step": 3, "clients": ["c0"], "dropouts": ["c1"], "validation": 0.5},
        nobody | {"round": 2, "step": 9, "clients": ["c0", "c1"], "refused": [["c2", "too far"]]},
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rounds))
    row = {"scores": {"vqa": 0.25}, "own": {"vqa": 1.0}}
    totals = {"global": 0.25, "personal": 0.5, "worst": {"client": "c1", "value": 0.125}, "unseen_client": None}
    record = {"data_sets": ["vqa"], "rows": {"global": row | {"own": {}}, "c0": row}, "summary": totals}
    (run / "federated.json").write_text(json.dumps(record))
    page = "".join(federation_section(read_run(run)))
    cells = [re.findall(r"<t[dh]>(.*?)</t[dh]>", line) for line in re.findall(r"<tr>(.*?)</tr>", page)]
    assert cells[:3] == [
        ["round", "clients", "absent", "refused", "MiB up", "MiB down", "validation loss"],
        ["1", "1", "1", "0", "1.0", "2.0", "0.500"],
        ["2", "2", "0", "1", "1.0", "2.0", "-"],
    ]
    assert [value for _, value in cells[3:]] == ["25.0", "50.0", "12.5"] and page.count("<img") == 1
    assert "clients=2, how=by_source." in page


def test_crosstalk_is_by_pair_and_other_models_have_scores_where_they_had_the_same_samples(tmp_path):
    run = make_run(tmp_path / "run", experts={"a": {"rank": 2}, "b": {"rank": 2}})
    assert not crosstalk_section(read_run(run))
    (run / "log.jsonl").write_text(json.dumps({"step": 20, "crosstalk": 0.3, "crosstalk/b/a": 0.3}) + "\n")
    rows = re.findall(r"<tr>(.*?)</tr>", crosstalk_section(read_run(run))[0])
    assert rows[1] == "<td>a</td><td>-</td><td>0.30</td>" and rows[2] == "<td>b</td><td>-</td><td>-</td>"
    for name, data in (("lora", "same"), ("cut", "fewer")):
        write_result(run / "others" / name / "eval", name, 0.125)
        for folder, own in ((run, "same"), (run / "others" / name, data)):
            file = folder / "eval" / "vqa.json"
            record = json.loads(file.read_text())
            record["fingerprints"]["data"] = own
            file.write_text(json.dumps(record))
    page = "".join(scores_section(read_run(run)))
    assert "<th>lora</th>" in page and "12.5 (" in page and "cut" not in page


@pytest.mark.slow
def test_what_cannot_be_shown_is_named_and_the_rest_is_there(run, tmp_path):
    broken = full_run(tmp_path)
    (tmp_path / "0.png").unlink()
    (broken / "eval" / "routing.json").write_text("{")
    (broken / "summary.json").write_text('{"weights": {"routed experts": "others"}}')
    (broken / "merged").mkdir()
    (broken / "merged" / "fidelity.json").write_text("[]")
    page = run_page(read_run(broken))
    problems = re.findall(r'<p class="problem">(.*?)</p>', page)
    reasons = ["summary.json: of other", "routing.json: not readable", "3 images of vqa", "AttributeError"]
    assert len(problems) == 4 and all(map(str.__contains__, problems, reasons))
    assert "100.0 (80.4\xa0to\xa0100.0)" in page
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    assert "config.yaml is missing" in run_page(read_run(empty))
    with pytest.raises(SystemExit):
        report.main([f"run={tmp_path / 'nowhere'}"])
