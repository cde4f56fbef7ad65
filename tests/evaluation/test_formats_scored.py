"""From files as their authors publish them to scores and submissions, each by its own benchmark."""

import json

import pytest

from data.config import SourceConfig
from moa.benchmarks.table import BENCHMARKS, BY_FORMAT
from moa.checkpoint import load_model
from moa.evaluation.report import write_results
from moa.evaluation.settings import with_eval
from moa.evaluation.sources import score_sources
from tests.data.test_readers import PATHS
from tests.evaluation.test_eval import make_run
from tests.support.formats import CASES

NEEDS_JAVA = "coco_captions"  # METEOR loads its tables for ten seconds


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    model, _, config = load_model(make_run(tmp_path_factory.mktemp("world")))
    return model, with_eval(config, max_new_tokens=2)


def slow(name):
    marks = [pytest.mark.slow] if BY_FORMAT[name] == NEEDS_JAVA else []
    return pytest.param(name, marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize("name", [slow(name) for name in BY_FORMAT if name in CASES])
def test_a_published_file_is_asked_scored_and_handed_in(name, loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("MOA_CACHE", str(tmp_path / "index"))
    folder, given = tmp_path / "data", CASES[name].config
    folder.mkdir()
    CASES[name].write(folder)
    paths = {key: str(folder / given[key]) for key in PATHS if given.get(key)}
    source = SourceConfig(name="set", format=name, **given | paths)
    model, config = loaded
    results = score_sources(model, with_eval(config, sources={"set": source}))
    write_results(tmp_path / "eval", results, [source], {})
    record = json.loads((tmp_path / "eval" / "set.json").read_text())
    assert list(record["tasks"]) == [BY_FORMAT[name]] and record["n"] == CASES[name].count
    expected = CASES[name].first.get("split")
    assert expected is None or expected in record["split"]
    instruction = BENCHMARKS[BY_FORMAT[name]].instruction
    assert instruction in record["settings"]["prompt"]["example"]
    has_server = BENCHMARKS[BY_FORMAT[name]].submission is not None
    assert list(record["submissions"]) == ([BY_FORMAT[name]] if has_server else [])
