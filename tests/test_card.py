"""The card of everything that is handed over: what it says holds, and the lines that load it run."""

import re
from pathlib import Path

import pytest
from peft import PeftModel

from moa.backbones.fingerprint import base_fingerprint
from moa.card import CARD, REPORT_FILE, Card, hub_name
from moa.checkpoint import CONFIG, step_folder
from moa.config import load_config
from moa.evaluation.card_parts import measured_of, put_scores
from moa.sections import RouterConfig
from scripts import average_checkpoints
from scripts import merge as script
from tests.evaluation.test_runs import make_run as make_scored
from tests.merging.test_export import make_adapter
from tests.merging.test_merge_script import make_run
from tests.support.tiny import tiny_llava

MATTER = "---\nlicense: other\nlicense_name: their-own\nlicense_link: LICENSE\n---\n# The base\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base with a card, a recipe, a log and a license; two adapters, two models and a run of it."""
    folder = tmp_path_factory.mktemp("world")
    model, processor = tiny_llava()
    for name in ("base", "a", "b"):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    (folder / "base" / CARD).write_text(MATTER)
    for name in ("recipe.json", "pretraining_log.jsonl", "LICENSE", "notes.txt"):
        (folder / "base" / name).write_text(name)
    make_adapter(folder / "one", 1, r=2, lora_alpha=3)
    make_adapter(folder / "two", 2, r=3, lora_alpha=2)
    make_run(folder / "run", folder / "base", RouterConfig())
    return folder


def code_of(card: str) -> str:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]


MERGES = {
    "adapter": ["adapters=[W/one,W/two]", "base=W/base", "verify=false"],
    "checkpoint": ["adapters=[W/one,W/two]", "base=W/base", "verify=false", "merged=true"],
    "models": ["models=[W/a,W/b]", "base=W/base"],
    "stacked": ["slices=[{model: W/base, layers: [0, 1]}, {model: W/base, layers: [0, 2]}]",
                "stack=language_model.model.layers", "method=passthrough"],
    "run": ["run=W/run", "verify=false", "weights={vqa: 0.25, caption: 2}"],
}  # fmt: skip
NAMED = {
    "models": ["| a | 0.5 |", "| b | 0.5 |"],
    "stacked": ["| slice 1 | layers 0 to 1 |"],
    "run": ["| vqa | 0.25 |", "| caption | 2 |", "[TASK] QUESTION"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MERGES)
def test_the_card_of_a_merge_names_base_parts_and_license_and_its_lines_load_it(world, tmp_path, monkeypatch, kind):
    arguments = [argument.replace("W/", f"{world}/") for argument in MERGES[kind]]
    script.main([*arguments, f"out={tmp_path / 'out'}"])
    card = (tmp_path / "out" / CARD).read_text()
    assert f"`{world}/base`, fingerprint `{base_fingerprint(world / 'base')}`" in card
    for line in NAMED.get(kind, ["| one | 0.5 |", "| two | 0.5 |"]):
        assert line in card
    assert "license: other\nlicense_name: their-own\nlicense_link: LICENSE\n" in card
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written.isdisjoint({"recipe.json", "pretraining_log.jsonl", "notes.txt"})
    assert ("LICENSE" in written) == (kind not in ("adapter", "run"))
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(code_of(card), found)
    assert isinstance(found["model"], PeftModel) == (kind in ("adapter", "run"))


@pytest.mark.slow
def test_every_expert_of_a_step_has_a_card_whose_lines_load_it(world, monkeypatch):
    step = step_folder(world / "run")
    monkeypatch.chdir(step / "experts")
    for name in load_config(step / CONFIG).experts:
        card = Path(name, CARD).read_text()
        assert f"`{world}/base`" in card and "rank 2" in card and "license: other" in card
        found: dict = {}
        exec(code_of(card), found)
        assert isinstance(found["model"], PeftModel)


@pytest.mark.slow
def test_the_card_of_an_average_names_its_steps(world, tmp_path, monkeypatch):
    average_checkpoints.main([f"run={world / 'run'}", "steps=[1]", f"out={tmp_path / 'mean'}"])
    card = (tmp_path / "mean" / CARD).read_text()
    assert "| step-000001 | 1 |" in card and base_fingerprint(world / "base") in card
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(code_of(card), found)
    assert found["config"].model.name == str(world / "base")
    assert (tmp_path / "mean" / "experts" / "vqa" / CARD).is_file()


def test_a_name_of_the_hub_is_the_base_model_of_the_front_matter_also_from_its_cache():
    for base in (
        "org/model-7b",
        "/c/models--org--model-7b/snapshots/8f4d",
        "/c/models--org--model-7b/snapshots/8f4d/",
    ):
        assert hub_name(base) == "org/model-7b"
        text = Card(name="x", kind="adapter", about="A.", base=base).text()
        assert "base_model: org/model-7b\n" in text
    assert "base_model" not in Card(name="x", kind="adapter", about="A.", base="/disk/base").text()


def test_scores_of_a_run_are_named_as_such_until_the_export_has_its_own(tmp_path):
    run, out = make_scored(tmp_path / "run", value=0.5), tmp_path / "out"
    measured = measured_of(step_folder(run))
    row = ["vqa", "vqa_accuracy", "50.0 (30.4 to 69.6)", "-"]
    assert [[cell.replace("\xa0", " ") for cell in line] for line in measured["scores"]] == [row]
    gates = {"gates": [["task", "a"], ["vqa", "0.75"]]}
    card = Card(name="x", kind="adapter", about="A.", base="org/b", **(measured | gates)).text()
    assert "| vqa | 0.75 |" in card and card.count("## Scores") == 1 and "export itself was not scored" in card
    out.mkdir()
    (out / CARD).write_text(card)
    record = {"name": "vqa", "score": {"value": 0.25, "se": None}, "n": 8, "tasks": {"vqa": {"primary": "m"}}}
    put_scores(out, [record])
    assert (out / CARD).read_text() == card  # no export
    (out / REPORT_FILE).write_text("{}")
    for _ in range(2):
        put_scores(out, [record])
        text = (out / CARD).read_text()
        assert "| vqa | m | 25.0 | 8 |" in text and "50.0" not in text and text.count("## Scores") == 1
    assert text.split("## Scores")[0] == card.split("## Scores")[0] and text.endswith(card[card.index("## Load") :])
    (run / "checkpoints" / "step-000012" / "manifest.json").write_text('{"other": {"sha256": "weights"}}')
    assert measured_of(step_folder(run)) == {"scores": [], "gates": []}  # of other weights


def test_a_damaged_front_matter_is_no_license(tmp_path):
    (tmp_path / CARD).write_text("---\nlicense: [\n---\n")
    assert "license" not in Card(name="x", kind="adapter", about="A.", base=str(tmp_path)).text()
