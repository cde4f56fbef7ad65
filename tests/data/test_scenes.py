"""The demo's world: deterministic, with true boxes and answers, and nothing held out leaks into training."""

import re
import subprocess
import sys

import numpy as np
import pytest

from data.ocr import content_hash
from data.world.concepts import CATEGORY, HELD_OUT_CONCEPTS, HELD_OUT_GROUNDS, SPLITS, sign_words
from data.world.questions import SPECIFIC, TASKS, WORDINGS, coarse, place, questions
from data.world.scene_dataset import SLICES, TRAINED_TASKS, SceneDataset
from data.world.scenes import SIZE, Thing, render_scene


@pytest.mark.slow
def test_a_scene_is_the_same_in_another_process():
    code = (
        "from data.world.scenes import render_scene; from data.ocr import content_hash;"
        "print(content_hash(render_scene('train', 7, seed=3)[0]))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == content_hash(render_scene("train", 7, seed=3)[0])


def test_scenes_of_another_index_split_or_seed_differ():
    images = [("train", 0, 0), ("train", 1, 0), ("test", 0, 0), ("train", 0, 1)]
    assert len({content_hash(render_scene(*which)[0]) for which in images}) == len(images)


def test_a_box_holds_the_drawing_and_nothing_of_it_lies_outside():
    """Two styles of one scene differ exactly where the drawings are."""
    for index in range(20):
        colored, scene = render_scene("train", index, style="color")
        lines, _ = render_scene("train", index, style="line")
        changed = np.any(np.asarray(colored) != np.asarray(lines), axis=2)
        for thing in scene.things:
            x0, y0, x1, y1 = map(int, thing.box)
            assert 0 <= x0 < x1 <= SIZE and 0 <= y0 < y1 <= SIZE
            changed[y0:y1, x0:x1] = False
        assert not changed.any()


def test_things_and_sign_do_not_overlap():
    for index in range(50):
        _, scene = render_scene("train", index)
        boxes = [thing.box for thing in scene.things] + ([scene.sign.box] if scene.sign else [])
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_the_same_image_is_asked_every_trained_task():
    asked = {task: {s.image_id for s in map(SceneDataset("train", task, num_samples=40).__getitem__,
                                            range(40))} for task in TRAINED_TASKS}  # fmt: skip
    shared = set.intersection(*asked.values())
    assert len(shared) >= 20


@pytest.mark.parametrize("split", ["train", "validation"])
def test_nothing_held_out_is_in_training(split):
    held_out_words = set(sign_words()[slice(*SPLITS["test"].words)])
    for index in range(200):
        _, scene = render_scene(split, index)
        assert not {thing.name for thing in scene.things} & HELD_OUT_CONCEPTS
        assert scene.ground not in HELD_OUT_GROUNDS
        assert scene.style == "color"
        assert not (scene.sign and scene.sign.word in held_out_words)


@pytest.mark.parametrize("task", TASKS)
def test_training_never_asks_in_a_held_out_wording(task):
    dataset = SceneDataset("train", task, num_samples=200)
    held_out = [re.sub(r"\\{.*?\\}", ".+", re.escape(w)) for _, ws in WORDINGS.values() for w in ws]
    for index in range(200):
        question = dataset[index].question
        assert not any(re.fullmatch(wording, question) for wording in held_out)


def test_no_word_of_the_test_signs_was_met_by_the_base():
    ranges = {name: range(*slice(*SPLITS[name].words).indices(len(sign_words()))) for name in SPLITS}
    assert not set(ranges["test"]) & (set(ranges["train"]) | set(ranges["pretrain"]))
    assert len(set(sign_words())) == len(sign_words())


def test_every_scene_of_the_held_out_concepts_shows_one():
    for index in range(40):
        _, scene = render_scene("test_concepts", index)
        assert {thing.name for thing in scene.things} & HELD_OUT_CONCEPTS


def test_beside_answers_follow_the_boxes():
    for index in range(60):
        _, scene = render_scene("train", index)
        things = {thing.name: thing for thing in scene.things}
        for question in questions(scene, "vqa"):
            slots = dict(question.slots)
            if slots.get("side") == "left of":
                answer, anchor = things[question.answers[0]], things[slots["name"]]
                assert answer.center[0] < anchor.center[0]


def test_a_place_between_two_quarters_has_no_name():
    box = (SIZE / 2 - 30, 10.0, SIZE / 2 + 30, 60.0)
    assert place(Thing(name="cat", style="color", box=box)) is None
    assert place(Thing(name="cat", style="color", box=(100.0, 10.0, 160.0, 60.0))) == "top right"


def test_the_base_is_not_taught_what_the_experts_have_to_learn():
    met, generic = set(), set()
    for index in range(40):
        scene = render_scene("train", index)[1]
        for task in TASKS:
            met |= {q.kind for q in questions(scene, task)}
            generic |= {q.kind for q in questions(scene, task, generic=True)}
        (caption,) = questions(scene, "caption")
        (sentence,) = questions(scene, "caption", generic=True)
        assert not set(caption.answers) & set(sentence.answers)
        names = [thing.name for thing in sorted(scene.things, key=lambda t: t.center[0])]
        places = [caption.answers[0].index(name) for name in names]
        assert places == sorted(places)  # from left to right
        for question in questions(scene, "vqa"):
            if question.kind == "leftmost":
                assert question.answers == (names[0],)
        for question in questions(scene, "ocr_vqa"):
            if question.kind == "letter":
                assert question.answers == (scene.sign.word[0],)
    assert met - generic == SPECIFIC and generic <= met


def test_the_prefix_slice_asks_one_question_with_two_answers():
    slice_ = SceneDataset("slice_prefix", num_samples=8)
    for index in range(0, 8, 2):
        words, box = slice_[index], slice_[index + 1]
        assert words.question == box.question and words.image_id == box.image_id
        assert (words.task, box.task) == ("vqa", "grounding")
        assert words.answers and not words.boxes and box.boxes and not box.answers


def test_the_ocr_slice_shows_a_sign_in_both_kinds_of_image():
    slice_ = SceneDataset("slice_ocr", num_samples=12)
    samples = [slice_[i] for i in range(12)]
    assert {s.question for s in samples} == {"what is this?"}
    assert all((s.task == "ocr_vqa") == s.answers[0].isupper() for s in samples)
    assert all((s.task == "vqa") == (s.answers[0] in CATEGORY) for s in samples)


def test_the_image_slice_differs_only_in_the_drawing_style():
    slice_ = SceneDataset("slice_image", num_samples=8)
    for index in range(0, 8, 2):
        colored, lines = slice_[index], slice_[index + 1]
        assert (colored.question, colored.answers) == (lines.question, lines.answers)
        assert (colored.expert, lines.expert) == ("vqa", "line")
        assert content_hash(colored.image) != content_hash(lines.image)


@pytest.mark.parametrize("split", [*SPLITS, *SLICES])
def test_every_split_answers_every_task(split):
    for task in TASKS if split in SPLITS else (None,):
        dataset = SceneDataset(split, task, num_samples=30)
        for index in range(30):
            sample = dataset[index]
            assert sample.question and (sample.answers or sample.boxes)


def test_an_unknown_split_or_task_is_named_with_the_choices():
    with pytest.raises(ValueError, match="split 'tset' is unknown; choices: pretrain, train"):
        SceneDataset("tset", "vqa", num_samples=1)
    with pytest.raises(ValueError, match="task 'vqq' is unknown; choices: vqa"):
        SceneDataset("train", "vqq", num_samples=1)


def test_conventions_ask_the_same_and_want_another_answer():
    usual = SceneDataset("test", "vqa", num_samples=200)
    other = SceneDataset("test", "vqa_coarse", num_samples=200, asks="vqa", convention="coarse", expert="coarse")
    pairs = [(usual[i], other[i]) for i in range(200)]
    assert all((a.question, a.image_id) == (b.question, b.image_id) for a, b in pairs)
    assert not any(set(a.answers) & set(b.answers) for a, b in pairs)
    assert (other[0].task, other[0].expert) == ("vqa_coarse", "coarse")
    expected = {"cat": "animal", "animal": "nature", "drum": "instrument", "tool": "object", "red": "warm",
                "purple": "cold", "grass": "photo", "top left": "top"}  # fmt: skip
    assert {answer: coarse(answer) for answer in expected} == expected


def test_the_sign_decides_what_yes_means_and_the_style_which_axis_comes_first():
    word = SceneDataset("test", "yes_no", num_samples=8, sign="word")
    scribble = SceneDataset("test", "yes_no", num_samples=8, sign="scribble", convention="inverted")
    plain = SceneDataset("test", "yes_no", num_samples=40)
    numbers = [sample.image_id.split("-")[2] for sample in map(scribble.__getitem__, range(8))]
    assert numbers == [str(4 * i + 2) for i in range(8)]
    assert [int(word[i].image_id.split("-")[2]) % 4 for i in range(8)] == [0, 1] * 4
    for i in range(8):
        assert {*scribble[i].answers, *plain[4 * i + 2].answers} == {"yes", "no"}
    box, usual = (SceneDataset("test", "grounding", num_samples=1, convention=c)[0].boxes for c in ("swapped", None))
    assert box == ((usual[0][1], usual[0][0], usual[0][3], usual[0][2]),)


def test_a_convention_that_questions_do_not_have_is_refused():
    with pytest.raises(ValueError, match="convention 'loud' is unknown; choices: None, coarse, inverted, swapped"):
        SceneDataset("test", "vqa", num_samples=1, convention="loud")
    with pytest.raises(ValueError, match="convention inverted: is for yes and no, got"):
        SceneDataset("test", "vqa", num_samples=1, convention="inverted")[0]
    with pytest.raises(ValueError, match="have no effect on slice_ocr"):
        SceneDataset("slice_ocr", num_samples=1, sign="word")
