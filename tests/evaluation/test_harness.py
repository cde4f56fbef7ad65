"""A run inside lmms-eval: registered by the entry point, and asked one question. (Needs lmms-eval.)"""

import tomllib
from importlib.metadata import EntryPoint

import pytest
from PIL import Image

from tests import ROOT

pytest.importorskip("lmms_eval", reason="pip install lmms-eval: see docs/evaluation.md")

from lmms_eval.api.instance import Instance
from lmms_eval.models import registry_v2

from moa.evaluation.lmms_eval import Moa, Options
from moa.loaded import load
from tests.evaluation.test_eval import make_run

GROUP = "lmms_eval.models"
DOCS = {"toy": {"test": [{"image": Image.new("RGB", (40, 30), color)} for color in ("red", "blue")]}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("harness"))


def request(doc_id: int, question: str, **options) -> Instance:
    arguments = (question, options, lambda doc: [doc["image"]], doc_id, "toy", "test")
    described = {"task": "toy", "doc_id": doc_id, "repeats": 1}
    return Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=described)


def harnessed(monkeypatch, arguments: str) -> Moa:
    """The model as lmms-eval makes it: entry point, registry, argument string."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [EntryPoint(name, value, GROUP) for name, value in project["entry-points"][GROUP].items()]
    registry = registry_v2.ModelRegistryV2()
    monkeypatch.setattr(registry, "_select_entry_points", lambda group: found)
    registry.load_entrypoint_manifests()
    assert registry.list_model_names() == ["moa"]
    model = registry.get_model_class("moa").create_from_arg_string(arguments, {"device": "cpu"})
    model.task_dict = DOCS
    return model


def test_the_entry_point_gives_a_model_that_answers_as_the_run_itself(run, monkeypatch):
    model = harnessed(monkeypatch, f"run={run},task=vqa,batch_size=2")
    asked = [request(0, "<image> what is this?", max_new_tokens=6),
             request(1, "how many?", max_new_tokens=6),
             request(0, "how many?", max_new_tokens=3)]  # fmt: skip
    image, question = model.pair(asked[0])
    assert question == "what is this?"
    alone = load(run).ask(image, question, "vqa", max_new_tokens=6).text
    answers = model.generate_until(asked)
    assert len(answers) == 3 and answers[0] == alone
    assert model.generate_until(asked[1:2]) == answers[1:2]  # alone as in a batch


def test_stop_words_cut_the_answer():
    assert Options.of({"until": ["\n\n", "."]}).cut(" a cat. A dog\n\n") == "a cat"
    assert Options.of({"until": "\n"}).cut("a cat") == "a cat"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": 0.7}, "not sampled here"), ({"top_k": 5}, "unknown \\['top_k'\\]")],
)
def test_options_that_would_have_no_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Options.of(options)


def test_what_a_run_cannot_answer_is_said(run, monkeypatch):
    with pytest.raises(ValueError, match="task=dance: unknown; choices: vqa, grounding"):
        harnessed(monkeypatch, f"run={run},task=dance")
    model = harnessed(monkeypatch, f"run={run}")
    with pytest.raises(ValueError, match="no likelihoods"):
        model.loglikelihood([])

    def about(images: list) -> Instance:
        return Instance("generate_until", ("<image> or <image>?", {}, lambda doc: images, 0, "toy", "test"), 0,
                        {"task": "toy", "doc_id": 0, "repeats": 1})  # fmt: skip

    with pytest.raises(ValueError, match="toy, 0: moa reads questions about images, got \\[\\]"):
        model.pair(about([]))
    images = [doc["image"] for doc in DOCS["toy"]["test"]]
    assert model.pair(about(images[:1])) == (images[0], "or ?")
    assert model.pair(about(images)) == (images, "<image> or <image>?")
