"""One question about one image: the answer, box and gates that the evaluation of the run has."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModel

from data.boxes import BoxCodec
from moa.build import build_model
from moa.config import load_config
from moa.evaluation.settings import with_eval
from moa.evaluation.sources import score_sources
from moa.loaded import LoadedModel, load
from moa.playground.desk import Desk
from moa.training.further import further_config
from tests import ROOT
from tests.evaluation.test_eval import make_run
from tests.support.tiny import random_image
from tests.support.tiny_clip import EXPERTS, save_tiny
from tests.test_train import same_expert
from tests.training.test_clip_training import clip_world


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("predict"))


@pytest.fixture(scope="module")
def model(run):
    return load(run, device="cpu")


def test_an_answer_is_that_of_the_evaluation_with_its_gates_by_expert(model):
    (result,) = score_sources(model.network, with_eval(model.config, only=["vqa"]))
    responses = [r for r in result.responses if not r.sample.ocr]  # the rows' own OCR words
    pairs = [(r.sample.image, r.sample.question) for r in responses]
    found = model.ask_all(pairs, "vqa")
    assert [p.text for p in found] == [r.text for r in responses] and len(found) > 1
    assert list(found[0].gates) == ["vqa", "grounding"]
    assert list(found[0].gates.values()) == pytest.approx(responses[0].gates[0])
    assert model.ask(*pairs[0], task="vqa").text == found[0].text  # alone as in a batch


@pytest.mark.slow
def test_a_file_its_pixels_and_an_array_of_them_have_one_answer(run, model):
    file = run.parent / "0.png"
    pixels = Image.open(file).convert("RGB")
    found = [model.ask(image, "what?") for image in (file, str(file), pixels, np.array(pixels))]
    assert found[0] == found[1] == found[2] == found[3]


def test_a_box_is_in_pixels_of_the_given_image(model, monkeypatch):
    """The codec finds the box in the text; here every text has the same one, the whole image."""
    monkeypatch.setattr(BoxCodec, "decode", lambda codec, text, geometry: geometry.seen)
    image = Image.new("RGB", (40, 30), "red")
    assert model.ask(image, "where?", "grounding").box == (0.0, 0.0, 40.0, 30.0)


@pytest.mark.slow
def test_without_experts_the_base_answers(run, model):
    base = load(run.parent / "base", like=run, device="cpu")
    image = run.parent / "0.png"
    found = base.ask(image, "what?", "vqa")
    assert found.gates is None
    assert found.text == model.ask(image, "what?", "vqa", gates="off").text
    with pytest.raises(ValueError, match="merge: a base has no experts"):
        base.merge("none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "dance"}, "task=dance: unknown; choices: vqa, grounding"),
        ({"gates": "oracle"}, "gates=oracle: a question alone names no expert"),
        ({"gates": "vaq"}, "gates=vaq: unknown; choices: router"),
        ({"gates": {"vaq": 1}}, "gates.vaq: no such expert; choices: vqa, grounding"),
        ({"gates": {"vqa": float("nan")}}, "gates.vqa: must be a finite number, got nan"),
        ({"image": "gone.png"}, "image: missing image: gone.png"),
        ({"image": 3}, "image: must be a path, a PIL image or an array, got int"),
        ({"image": np.zeros((4, 4))}, r"uint8 \[height, width, 3\], got float64 of shape"),
        ({"question": " "}, "empty question"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be a whole number of at least 1, got 0"),
    ],
)
def test_what_cannot_be_answered_is_named(run, model, changes, message):
    asked = {"image": run.parent / "0.png", "question": "what?"} | changes
    with pytest.raises(ValueError, match=message):
        model.ask(**asked)


def test_gates_by_hand_are_those_of_the_rule_that_has_them(run, model):
    asked = {"image": run.parent / "0.png", "question": "what?", "max_new_tokens": 4}
    for rule, gates in {"vqa": {"vqa": 1}, "uniform": {"vqa": 0.5, "grounding": 0.5}, "off": {}}.items():
        assert model.ask(**asked, gates=gates) == model.ask(**asked, gates=rule)
    assert model.ask(**asked, gates={"grounding": -1}).gates == {"vqa": 0.0, "grounding": -1.0}


def test_an_answer_is_heard_as_it_grows_and_ends_where_the_listener_raises(run, model):
    asked, heard = {"image": run.parent / "0.png", "question": "what?", "max_new_tokens": 4}, list[str]()
    answer = model.ask(**asked, on_text=heard.append)
    assert answer == model.ask(**asked)
    assert heard[0] == "" and len(heard) == 4 and all(map(answer.text.startswith, heard))

    def stop(text):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        model.ask(**asked, on_text=stop)
    assert model.ask(**asked) == answer


def test_a_merge_of_an_unknown_expert_or_of_a_base_is_refused(run, model):
    with pytest.raises(ValueError, match="weights.vaq: no such expert; choices: vqa, grounding"):
        model.merge("none", {"vaq": 1})
    with pytest.raises(ValueError, match="all are 0, which is the base"):
        model.merge("none", {"vqa": 0})
    with pytest.raises(ValueError, match="like: has no effect beside adapters"):
        load(run, like=run, adapters=["any"])


@pytest.mark.slow
def test_adapters_take_the_place_of_a_runs_experts(run, model):
    folder = run / "checkpoints" / "step-000001" / "experts"
    mixed, asked = (
        load(run, adapters=[f"{folder}/*"], device="cpu"),
        {"image": run.parent / "0.png", "question": "what?"},
    )
    assert mixed.experts == ["grounding", "vqa"] and mixed.adapters == (f"{folder}/grounding", f"{folder}/vqa")
    assert mixed.ask(**asked).gates == {"grounding": 0.5, "vqa": 0.5}
    assert mixed.ask(**asked, gates="vqa").text == model.ask(**asked, gates="vqa").text


@pytest.mark.slow
def test_an_expert_learns_from_samples_in_memory_and_the_others_stay(run, model, tmp_path):
    pixels = [random_image(n) for n in range(2)]
    rows = [{"image": pixels[n % 2], "question": f"how many? {n}", "answers": "two"} for n in range(5)]
    rows[0]["image"] = run.parent / "0.png"
    settings = {"train.batch_size": 4, "experts.count.rank": 1}
    grown = model.train(rows, tmp_path / "more", "count", steps=4, settings=settings)
    assert grown.experts == ["vqa", "grounding", "count"] and grown.config.data.tasks == ["vqa", "grounding", "count"]
    assert all(same_expert(model.network, grown.network, name) for name in model.experts)
    assert grown.config.experts["count"].rank == 1 and sum(grown.ask(pixels[0], "how many?").gates.values()) > 0.99
    log = [json.loads(line) for line in (tmp_path / "more" / "log.jsonl").read_text().splitlines()]
    assert [(row["stage"], "source_loss/vqa" in row) for row in log if "loss" in row][:4] == [("experts", False)] * 4
    assert sum(row["stage"] == "router" for row in log if "loss" in row) == 2
    assert len([*(tmp_path / "more" / "rows").glob("*.png")]) == 2  # one is a file already, others are stored once
    both = model.add(tmp_path / "more" / "checkpoints" / "step-000006" / "experts" / "count")
    assert both.experts == grown.experts and both.ask(pixels[0], "how many?").gates["count"] == pytest.approx(1 / 3)
    alone = both.ask(pixels[0], "how many?", gates="count")
    assert alone.text == grown.ask(pixels[0], "how many?", gates="count").text
    with pytest.raises(ValueError, match="more holds other things"):
        model.train(rows, tmp_path / "more", "count")
    with pytest.raises(ValueError, match="rows: there are none"):
        model.train([], tmp_path / "none", "count")
    assert not (tmp_path / "none").exists()  # free for the call with rows
    again = further_config(Path(grown.run), grown.config, tmp_path / "none", (tmp_path, ["count"]), "count", 2, {})
    assert [*again.data.sources] == [*grown.config.data.sources, "count_2"] and "count" in grown.config.data.sources
    assert again.stages["experts"].sources == ["count_2"]
    with pytest.raises(ValueError, match="train: needs a run"):
        both.train(rows, tmp_path / "none", "count")


@pytest.mark.slow
def test_the_page_on_python_runs_as_it_is_written(run, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(run)
    (tmp_path / "street.png").symlink_to(run.parent / "0.png")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 3 and names["model"].experts == ["vqa", "grounding"]
    assert len(capsys.readouterr().out.splitlines()) >= 3 and isinstance(names["answer"].text, str)
    assert names["merged"].text == names["by_hand"].text
    assert names["report"]["comparisons"]["live_mixture"]["max_abs_logit_diff"] < 1e-4


@pytest.mark.slow
def test_the_notebook_runs_cell_by_cell(run, tmp_path, monkeypatch):
    cells = json.loads((ROOT / "docs" / "python.ipynb").read_text())["cells"]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in cells:
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace("steps=100", "steps=1").replace('"train", 400', '"train", 4')
            exec(source, names)
    assert names["both"].experts == names["grown"].experts == ["vqa", "grounding", "count"]
    assert names["answer"].gates and len(names["rows"]) == 4


@pytest.mark.slow
def test_a_clip_shares_out_names_as_its_own_logits_do_and_refuses_questions(tmp_path):
    world = clip_world(tmp_path / "world", save_tiny("clip", tmp_path / "base"), "clip")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(world, sort_keys=False))
    config = load_config(tmp_path / "run.yaml")
    clip = LoadedModel(network=build_model(config).eval(), config=config, ocr=None)
    for parameter in clip.network.bank.parameters():
        parameter.data.normal_(std=0.3)
    asked, names = {"image": random_image(0), "prompt": "a photo of a {}"}, ["cat", "bus", "small dog"]
    plain = AutoModel.from_pretrained(tmp_path / "base").eval()
    probe = clip.network.backbone.probe([random_image(0)] * 3, [f"a photo of a {name}" for name in names])
    with torch.no_grad():
        expected = plain(**probe).logits_per_image[0].softmax(-1)
    found = clip.classify(**asked, names=[*names, " cat ", ""], gates="off")
    assert [*found.shares] == names and found.gates == dict.fromkeys(EXPERTS, 0.0)
    torch.testing.assert_close(torch.tensor([*found.shares.values()]), expected, rtol=1e-5, atol=1e-6)
    alone = clip.classify(**asked, names=names, gates={"drawings": 1})
    assert alone == clip.classify(**asked, names=names, gates="drawings") and alone.shares != found.shares
    desk = Desk(model=clip, folder=tmp_path)
    answer = desk.answer([random_image(0)], "cat, bus\nsmall dog", None, "router")
    assert desk.compares and [*answer.shares] == names and answer.shares[answer.text] == max(answer.shares.values())
    with pytest.raises(ValueError, match="a dual encoder generates no text"):
        clip.ask(random_image(0), "what?")
    with pytest.raises(ValueError, match="names: there are none"):
        clip.classify(random_image(0), [" "])


def test_a_model_that_answers_refuses_to_compare_with_names(model):
    with pytest.raises(ValueError, match="classify: compares an image with names, which a CLIP does"):
        model.classify(Image.new("RGB", (40, 30)), ["cat"])


def test_importing_moa_imports_no_torch():
    code = "import sys, moa; assert not {'torch', 'transformers'} & set(sys.modules); print('load' in dir(moa))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
