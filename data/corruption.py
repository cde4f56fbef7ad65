"""Samples as the world spoils them, a little or much: what a model's scores are worth outside of its data set.

    typos    in the question: letters swapped, dropped, doubled or hit beside, each letter by a chance
    ocr      OCR words misread (0 for O, rn for m) or lost, each by a chance
    noise    on the pixels: normal, of a deviation that is a share of their range
    blur     of the image: Gaussian, of a radius that is a share of its shorter side

The draws are a function of (seed, corruption, sample), whatever the batch, and the same for every strength. Answers,
boxes and the other fields stay.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from data.sample import Sample

ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
BESIDE = {
    key: row[max(i - 1, 0) : i] + row[i + 1 : i + 2] for row in ROWS for i, key in enumerate(row)
}  # on a keyboard
ALIKE = {
    "o": "0", "0": "O", "l": "1", "1": "l", "i": "l", "s": "5", "5": "S", "b": "6", "8": "B", "z": "2", "2": "Z",
    "m": "rn", "w": "vv", "d": "cl", "g": "9", "e": "c", "c": "e", "t": "f", "n": "ri", "u": "ii", "a": "o",
}  # fmt: skip
LOST = 0.3  # of the words that are spoilt: they are not read at all


def typos(sample: Sample, chance: float, rng: random.Random) -> Sample:
    letters, written, place = sample.question, list[str](), 0
    draws = [(rng.random(), rng.randrange(4), rng.random()) for _ in letters]
    while place < len(letters):
        letter, (drawn, way, which) = letters[place], draws[place]
        place += 1
        if drawn >= chance or not letter.isalpha():
            written.append(letter)
        elif way == 0 and place < len(letters):
            written += [letters[place], letter]
            place += 1
        elif way == 1:
            written += [letter, letter]
        elif way == 2:
            near = BESIDE.get(letter.lower()) or letter
            written.append(near[int(which * len(near))])
    text = "".join(written)
    return replace(sample, question=text if text.strip() else sample.question)


def misread(sample: Sample, chance: float, rng: random.Random) -> Sample:
    if not sample.ocr:
        return sample
    words = []
    for word in sample.ocr:
        hit, lost, place = rng.random() < chance, rng.random() < LOST, rng.randrange(len(word.text) or 1)
        if hit and lost:
            continue
        letter = word.text[place : place + 1]
        text = word.text[:place] + ALIKE.get(letter.lower(), "") + word.text[place + 1 :] if hit else word.text
        if text:
            words.append(replace(word, text=text))
    return replace(sample, ocr=tuple(words))


def noise(sample: Sample, deviation: float, rng: random.Random) -> Sample:
    def noisy(image: Image.Image) -> Image.Image:
        pixels = np.asarray(image, np.float32)
        drawn = np.random.default_rng(rng.getrandbits(63)).standard_normal(pixels.shape, np.float32)
        return Image.fromarray(np.clip(np.rint(pixels + 255 * deviation * drawn), 0, 255).astype(np.uint8))

    return sample.with_images([noisy(image) for image in sample.images])


def blur(sample: Sample, share: float, rng: random.Random) -> Sample:
    return sample.with_images([i.filter(ImageFilter.GaussianBlur(share * min(i.size))) for i in sample.images])


@dataclass(frozen=True, kw_only=True)
class Corruption:
    spoil: Callable[[Sample, float, random.Random], Sample]
    strengths: tuple[float, ...]  # rising
    unit: str


CORRUPTIONS = {
    "typos": Corruption(spoil=typos, strengths=(0.05, 0.1, 0.2, 0.4), unit="share of letters"),
    "ocr": Corruption(spoil=misread, strengths=(0.25, 0.5, 0.75, 1.0), unit="share of OCR words"),
    "noise": Corruption(spoil=noise, strengths=(0.05, 0.1, 0.2, 0.4), unit="deviation, of the range"),
    "blur": Corruption(spoil=blur, strengths=(0.01, 0.02, 0.04, 0.08), unit="radius, of the shorter side"),
}


def spoilt(sample: Sample, name: str, strength: float, seed: int = 0) -> Sample:
    """The sample under a corruption; at strength 0 as it is."""
    rng = random.Random(f"{seed}/{name}/{sample.id}")
    return CORRUPTIONS[name].spoil(sample, strength, rng) if strength else sample
