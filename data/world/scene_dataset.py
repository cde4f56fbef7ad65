"""Scenes as data sets of samples: one per split and task, and four slices where one kind of evidence decides.

Sample i of a task is a question about a scene that every other task asks about too: the same image, several tasks.
The slices are asked about new scenes of the test split:

    slice_text     same image, another question         -> the words of the question decide
    slice_ocr      "what is this?", a word or a scribble  -> the OCR evidence decides
    slice_prefix   "where is the ...?", words or a box    -> the task prefix decides
    slice_image    same question, coloured or line-drawn  -> the image decides
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from typing import Any

from PIL.Image import Image

from data.sample import OcrWord, Sample
from data.world.concepts import SPLITS, check_choice
from data.world.questions import CONVENTIONS, TASKS, Question, converted, questions
from data.world.scenes import Scene, render_scene, scene_rng

SIGNS = ("word", "scribble")
TRAINED_TASKS = ("vqa", "caption", "grounding", "ocr_vqa")
OcrReader = Callable[[Image], tuple[OcrWord, ...] | None]


@dataclass(frozen=True, kw_only=True)
class Pick:
    """Which question of which scene: everything but the wording."""

    split: str
    task: str
    scene: int
    kind: str | None = None
    style: str | None = None
    num_things: int | None = None


class SceneDataset:
    """`num_samples` questions of one `task` about the scenes of `split`; slices need no task.

    `style` overrides the drawing style; `expert` and `source` label the samples (default: by task and style).
    `ocr` maps an image to its words (a cache or a live engine); None leaves the samples without OCR.
    `asks` is the task whose questions they are, where `task` is another name; `convention` is one of CONVENTIONS; with
    `sign` only scenes are asked about whose sign has a word, or has scribble.
    Raises ValueError for an unknown split, task, convention or sign, and for options of scenes on a slice.
    """

    def __init__(
        self,
        split: str,
        task: str | None = None,
        *,
        num_samples: int,
        style: str | None = None,
        asks: str | None = None,
        convention: str | None = None,
        sign: str | None = None,
        expert: str | None = None,
        source: str | None = None,
        seed: int = 0,
        ocr: OcrReader | None = None,
    ):
        check_choice("split", split, (*SPLITS, *SLICES))
        if split in SLICES and (asks or convention or sign):
            raise ValueError(f"asks, convention, sign: have no effect on {split}, which has its own")
        check_choice("task" if asks is None else "asks", asks or task, TASKS if split in SPLITS else (task,))
        check_choice("convention", convention, (None, *CONVENTIONS))
        check_choice("sign", sign, (None, *(SIGNS if (asks or task) != "ocr_vqa" else ("word",))))
        self.split, self.task, self.num_samples, self.style = split, task, num_samples, style
        self.asks, self.convention, self.sign = asks or task, convention, sign
        self.expert, self.source, self.seed, self.ocr = expert, source or task or split, seed, ocr

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        pick = self._pick(index)
        image, scene = _scene(pick, self.seed)
        question = converted(_choose(pick, scene, self.seed), self.convention)
        task = self.task or pick.task
        rng = scene_rng(f"wording/{pick.task}", pick.scene, self.seed)
        wordings = question.wordings(SPLITS[pick.split].wordings)
        number = 0 if self.split in SLICES else int(rng.integers(len(wordings)))
        own: dict[str, Any] = {"id": f"{self.split}/{task}/{scene.id}", "image_id": scene.id}
        own |= {"task": task, "expert": self.expert or expert_of(pick.task, scene.style)}
        own |= {"question": wordings[number], "answers": question.answers, "boxes": question.boxes}
        own |= {"tags": (question.kind, scene.style, scene.ground), "source": self.source}
        return Sample(image=image, ocr=None if self.ocr is None else self.ocr(image), **own)

    def _pick(self, index: int) -> Pick:
        if self.split in SLICES:
            return SLICES[self.split](index, self.seed)
        assert self.asks is not None  # checked in __init__
        scene = scene_of(index, self.asks, self.sign)
        return Pick(split=self.split, task=self.asks, scene=scene, style=self.style)


def scene_of(index: int, task: str, sign: str | None = None) -> int:
    """The scene that sample `index` asks about: `ocr_vqa` skips the scenes without a word."""
    if sign == "scribble":
        return index * 4 + 2
    return index // 2 * 4 + index % 2 if sign == "word" or task == "ocr_vqa" else index


def expert_of(task: str, style: str) -> str | None:
    """The expert that a scene question belongs to; None for the tasks that no expert trains."""
    if task not in TRAINED_TASKS:
        return None
    return "line" if (task, style) == ("vqa", "line") else task


# about 110 kB an image; the tasks of one scene share it
_render = lru_cache(maxsize=4096)(render_scene)


def _scene(pick: Pick, seed: int) -> tuple[Image, Scene]:
    return _render(pick.split, pick.scene, seed, pick.style, pick.num_things)


def _choose(pick: Pick, scene: Scene, seed: int) -> Question:
    """One question of the pick's task: kinds are equally likely, however many questions fit."""
    rng = scene_rng(f"question/{pick.task}", pick.scene, seed)
    names = {thing.name for thing in scene.things}
    absent = tuple(str(n) for n in rng.permutation(sorted(SPLITS[pick.split].concepts - names))[:1])
    kinds: dict[str, list[Question]] = {}
    for question in questions(scene, pick.task, absent):
        kinds.setdefault(question.kind, []).append(question)
    of_kind = kinds[pick.kind or str(rng.choice(sorted(kinds)))]
    return of_kind[0] if pick.kind else of_kind[int(rng.integers(len(of_kind)))]


def _slice_text(index: int, seed: int) -> Pick:
    turn, task = divmod(index, len(TRAINED_TASKS))
    scene = 10_000 + scene_of(turn, "ocr_vqa")
    return Pick(split="test", task=TRAINED_TASKS[task], scene=scene)


def _slice_ocr(index: int, seed: int) -> Pick:
    word = index % 2 == 0
    scene = 20_000 + index // 2 * 4 + (0 if word else 2)
    task = "ocr_vqa" if word else "vqa"
    return Pick(split="test", task=task, scene=scene, kind="this", num_things=1)


def _slice_prefix(index: int, seed: int) -> Pick:
    pick = Pick(split="test", task="vqa", scene=0, kind="place", num_things=1)
    for scene in count(30_000 + index // 2 * 16):  # the next scene whose thing has a clear place
        pick = replace(pick, scene=scene)
        if any(q.kind == "place" for q in questions(_scene(pick, seed)[1], "vqa")):
            break
    return pick if index % 2 == 0 else replace(pick, task="grounding", kind="box")


def _slice_image(index: int, seed: int) -> Pick:
    style, scene = ("color", "line")[index % 2], 40_000 + index // 2
    return Pick(split="test", task="vqa", scene=scene, kind="category", style=style, num_things=1)


SLICES = {f.__name__.removeprefix("_"): f for f in (_slice_text, _slice_ocr, _slice_prefix, _slice_image)}
