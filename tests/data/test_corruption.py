"""Spoilt samples: the same for every batch, worse by strength, and their answers untouched."""

import dataclasses
from difflib import SequenceMatcher

import numpy as np
import pytest

from data.corruption import CORRUPTIONS, spoilt
from data.sample import OcrWord, Sample
from tests.support.tiny import random_image


def sample(number: int = 0) -> Sample:
    words = tuple(OcrWord(text=f"world{i}", box=(0, 0, 9, 9), confidence=0.9) for i in range(12))
    question = "what is the colour of the large animal beside the tree?"
    made = {"image": random_image(number), "answers": ("red",), "boxes": ((1.0, 2.0, 3.0, 4.0),), "ocr": words}
    return Sample(id=str(number), image_id="i", question=question, task="vqa", source="s", **made)


def distance(name: str, one: Sample, other: Sample) -> float:
    if name in ("noise", "blur"):
        return float(np.abs(np.asarray(one.image, float) - np.asarray(other.image, float)).mean())
    if name == "ocr":
        return len({word.text for word in one.ocr} - {word.text for word in other.ocr})
    return 1 - SequenceMatcher(None, one.question, other.question).ratio()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_a_function_of_the_sample_and_changes_only_its_own_field(name):
    strength, whole = CORRUPTIONS[name].strengths[-1], sample()
    first, second = (spoilt(whole, name, strength) for _ in range(2))
    assert distance(name, first, second) == 0 < distance(name, whole, first)
    assert distance(name, first, spoilt(whole, name, strength, seed=1)) > 0 or name == "blur"
    changed = {"typos": "question", "ocr": "ocr"}.get(name, "image")
    fields = {"question", "answers", "boxes", "ocr", "image", "id"} - {changed}
    assert all(getattr(first, field) == getattr(whole, field) for field in fields)
    assert spoilt(whole, name, 0.0) is whole


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_stronger_corruption_changes_more(name):
    found = [
        np.mean([distance(name, sample(n), spoilt(sample(n), name, strength)) for n in range(8)])
        for strength in CORRUPTIONS[name].strengths
    ]
    assert found == sorted(found) and found[0] < found[-1]


def test_text_alone_and_no_words_stay():
    bare = dataclasses.replace(sample(), image=None, ocr=None, question="7?")
    for name in CORRUPTIONS:
        assert spoilt(bare, name, 1.0) == bare
