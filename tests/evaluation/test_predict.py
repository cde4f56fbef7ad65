"""One question about one image: the answer, box and gates that the evaluation of the run has."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data.boxes import BoxCodec
from moa.evaluation.predict import load
from moa.evaluation.settings import with_eval
from moa.evaluation.sources import score_sources
from tests import ROOT
from tests.evaluation.test_eval import make_run


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "dance"}, "task=dance: unknown; choices: vqa, grounding"),
        ({"gates": "oracle"}, "gates=oracle: a question alone names no expert"),
        ({"gates": "vaq"}, "gates=vaq: unknown; choices: router"),
        ({"image": "gone.png"}, "image: missing image: gone.png"),
        ({"image": 3}, "image: must be a path, a PIL image or an array, got int"),
        ({"image": np.zeros((4, 4))}, r"uint8 \[height, width, 3\], got float64 of shape"),
        ({"question": " "}, "empty question"),
    ],
)
def test_what_cannot_be_answered_is_named(run, model, changes, message):
    asked = {"image": run.parent / "0.png", "question": "what?"} | changes
    with pytest.raises(ValueError, match=message):
        model.ask(**asked)


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
    assert len(blocks) == 2 and names["model"].experts == ["vqa", "grounding"]
    assert len(capsys.readouterr().out.splitlines()) >= 3 and isinstance(names["answer"].text, str)


def test_importing_moa_imports_no_torch():
    code = "import sys, moa; assert not {'torch', 'transformers'} & set(sys.modules); print('load' in dir(moa))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
