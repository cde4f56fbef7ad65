"""Generic questions about the scenes, several of them in one row, each blind to the others."""

from dataclasses import dataclass, fields
from functools import cache

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from data.boxes import location_tokens
from data.geometry import whole
from data.world.concepts import SPLITS
from data.world.questions import TASKS, Question, questions
from data.world.scenes import SIZE, Scene, render_scene
from scripts.demo.base.model import NUM_BINS
from scripts.demo.base.world import LABELS

MIXTURE = {  # the base is a generalist: the experts' own tasks are a part of what it sees
    "vqa": 2.0, "caption": 0.7, "grounding": 1.2, "ocr_vqa": 1.2, "count": 0.7, "yes_no": 1.5,
}  # fmt: skip


def prompt(question: Question, wording: str, words: str | None, with_task: bool) -> str:
    """As the collator writes it: prefix, question, OCR words."""
    prefix = f"[{question.task}] " if with_task else ""
    evidence = f"\nocr: {words}" if words else ""
    return f"{prefix}{wording}{evidence}\nanswer:"


@dataclass(frozen=True, kw_only=True)
class Asked:
    task: str
    prompt: str
    answer: str
    name: str | None  # of the thing that the question is about, if it names one
    asks_where: bool


def ask(scene: Scene, words: str | None, rng: np.random.Generator) -> Asked | None:
    """A random question about a scene, or None if its task has none here."""
    task = str(rng.choice(TASKS, p=np.array([MIXTURE[t] for t in TASKS]) / sum(MIXTURE.values())))
    names = {thing.name for thing in scene.things}
    absent = str(rng.choice(sorted(SPLITS["pretrain"].concepts - names)))
    if task == "ocr_vqa" and not words:
        return None
    kinds: dict[str, list[Question]] = {}
    for question in questions(scene, task, (absent,), generic=True):
        kinds.setdefault(question.kind, []).append(question)
    if not kinds:
        return None
    of_kind = kinds[str(rng.choice(sorted(kinds)))]
    question = of_kind[int(rng.integers(len(of_kind)))]
    wordings = question.wordings("all")
    wording = wordings[int(rng.integers(len(wordings)))]
    codec, frame = location_tokens(NUM_BINS), whole(SIZE, SIZE)
    boxes = [codec.encode([box], frame) for box in question.boxes]
    answer = [*boxes, *question.answers][0]
    # "where is the cat?" has two answers: without the prefix both are right, and both are seen
    said = prompt(question, wording, words, bool(rng.random() < 0.7))
    name, where = dict(question.slots).get("name"), question.kind in ("box", "place")
    return Asked(task=task, prompt=said, answer=" " + answer, name=name, asks_where=where)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Several questions about one image, side by side after its tokens."""

    ids: list[int]
    labels: list[int]
    segments: list[int]  # which question each token belongs to
    positions: list[int]
    weights: list[float]  # 1 / answer tokens: every question counts the same
    tasks: list[int]
    names: list[int]  # LABELS' number at the token that names the thing in question, else -1
    places: list[int]  # the same, where the next token is of the answer that says where it is


class Packer:
    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.encode = cache(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])

    def row(self, scene: Scene, words: str | None, rng: np.random.Generator, count: int) -> Row:
        row = Row(**{item.name: [] for item in fields(Row)})
        for segment in range(count):
            asked = ask(scene, words, rng)
            if asked is None:
                continue
            question, answer = self.encode(asked.prompt), self.encode(asked.answer)
            answer = [*answer, self.tokenizer.eos_token_id]
            length, label = len(question) + len(answer), -1
            names = [-1] * length
            if asked.name is not None:
                label = LABELS.index(asked.name)
                names[question.index(self.encode(f" {asked.name}")[0])] = label
            row.ids.extend([*question, *answer])
            row.labels.extend([-100] * len(question) + answer)
            row.segments.extend([segment] * length)
            row.positions.extend(range(length))
            row.weights.extend([1 / len(answer)] * length)
            row.names.extend(names)
            where = label if asked.asks_where else -1
            row.places.extend([-1] * (len(question) - 1) + [where] * len(answer) + [-1])
            row.tasks.extend([TASKS.index(asked.task)] * length)
        return row


def pad(rows: list[Row], name: str, value: float, dtype: torch.dtype) -> Tensor:
    width = max(len(row.ids) for row in rows)
    values = [getattr(row, name) + [value] * (width - len(row.ids)) for row in rows]
    return torch.tensor(values, dtype=dtype)


def block_mask(segments: Tensor, prefix: int) -> Tensor:
    """[batch, 1, seq, seq] 0 where a token may look, the image and its own question before it, else -inf."""
    image = torch.full((segments.shape[0], prefix), -1, device=segments.device)
    owner = torch.cat([image, segments], 1)
    same = (owner[:, :, None] == owner[:, None, :]) | (owner == -1)[:, None, :]
    # tril: no token looks at a later one
    return torch.where(same.tril(), 0.0, -torch.inf)[:, None]


def corpus(seed: int) -> list[str]:
    """Texts of some scenes for the tokenizer; signs' words are left out, so that they stay spelled."""
    rng = np.random.default_rng(seed)
    texts = []
    for index in range(2000):
        scene = render_scene("pretrain", index, seed)[1]
        for _ in range(4):
            if asked := ask(scene, None, rng):
                texts.append(asked.prompt + asked.answer)
    return [*texts, *(f"[{task}] \nocr:\nanswer:" for task in TASKS for _ in range(50))]
