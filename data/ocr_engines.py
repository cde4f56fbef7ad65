"""OCR engines: from an image to its words in reading order, with boxes in its pixels."""

import importlib.metadata
import io
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import ImageOps
from PIL.Image import Image

from data.images import to_rgb
from data.sample import Box, OcrWord

Words = tuple[OcrWord, ...]
NARROWEST = 10  # times the short side
ONE_THREAD = {"OMP_THREAD_LIMIT": "1"}  # several images at once are faster than several threads


class Engine(Protocol):
    """`settings` is what a cache records: two caches with equal settings hold equal words."""

    @property
    def settings(self) -> dict[str, Any]: ...

    def read(self, image: Image) -> Words: ...


def split_line(text: str, box: Box, confidence: float) -> list[OcrWord]:
    """The words of a line, each with its share of the line's box, by characters: exact to about a letter."""
    x0, y0, x1, y1 = box
    step = (x1 - x0) / max(len(text), 1)
    words, start = [], 0
    for part in text.split(" "):
        if part.strip():
            end = start + len(part)
            share = (x0 + start * step, y0, x0 + end * step, y1)
            words.append(OcrWord(text=part, box=whole(share), confidence=confidence))
        start += len(part) + 1
    return words


def whole(box: Sequence[float]) -> Box:
    """Whole pixels, as the cache stores them."""
    x0, y0, x1, y1 = (float(round(value)) for value in box)
    return x0, y0, x1, y1


def reading_order(boxes: Sequence[Box]) -> list[int]:
    """Positions of boxes by rows, left to right; a box joins the row above whose bottom edge is below its centre."""
    rows: list[tuple[float, list[int]]] = []
    for index in sorted(range(len(boxes)), key=lambda i: boxes[i][1] + boxes[i][3]):
        x0, top, x1, bottom = boxes[index]
        if rows and (top + bottom) / 2 < rows[-1][0]:
            rows[-1][1].append(index)
        else:
            rows.append((bottom, [index]))
    return [i for _, row in rows for i in sorted(row, key=lambda i: boxes[i][0])]


class RapidOcr:
    """RapidOCR on one thread. The session is made at the first reading, so an engine pickles.

    The detector's settings are for small images: the package's own upsize the short side to 736,
    which is five times slower and no more exact here. Lines under `min_confidence` are dropped.
    """

    def __init__(self, *, min_confidence: float = 0.5, limit_side_len: int = 320):
        self.min_confidence, self.limit_side_len = min_confidence, limit_side_len
        self._session: Any = None

    @property
    def settings(self) -> dict[str, Any]:
        try:
            version = importlib.metadata.version("rapidocr")
        except importlib.metadata.PackageNotFoundError:
            raise ModuleNotFoundError("rapidocr is not installed: pip install 'moa[ocr]'", name="rapidocr") from None
        own = {"engine": "rapidocr", "version": version, "min_confidence": self.min_confidence}
        return own | {"limit_side_len": self.limit_side_len}

    def read(self, image: Image) -> Words:
        """The words of an image in reading order; boxes in its pixels."""
        pixels = np.asarray(widened(to_rgb(image)))[:, :, ::-1]  # the engine takes BGR
        result = self._started()(np.ascontiguousarray(pixels))
        if not result.txts:
            return ()
        found = zip(result.txts, result.boxes, result.scores, strict=True)
        sure = [line for line in found if line[2] >= self.min_confidence]
        lines = [(t, _bounds(box, image.size), round(float(score), 3)) for t, box, score in sure]
        order = reading_order([box for _, box, _ in lines])
        return tuple(word for i in order for word in split_line(*lines[i]))

    __call__ = read

    def _started(self) -> Any:
        if self._session is None:
            from rapidocr import RapidOCR

            threads = "EngineConfig.onnxruntime."
            params: dict[str, Any] = {"Global.use_cls": False, "Global.log_level": "error"}
            params |= {"Det.limit_side_len": self.limit_side_len, "Det.limit_type": "min"}
            params |= {threads + f"{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
            self._session = RapidOCR(params=params)
        return self._session

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}


def widened(image: Image) -> Image:
    """With white beside or below where the long side is more than ten short ones.

    The engine enlarges an image by its short side. That takes seconds and gigabytes for a narrow one, and fails on a
    line of pixels.
    """
    side = max(image.size) // NARROWEST
    return ImageOps.expand(image, (0, 0, max(side - image.width, 0), max(side - image.height, 0)), "white")


def _bounds(corners: np.ndarray, size: tuple[int, int]) -> Box:
    """The upright box around the engine's four corners, clipped to the image."""
    x0, y0 = np.clip(corners.min(axis=0), 0, size)
    x1, y1 = np.clip(corners.max(axis=0), 0, size)
    return float(x0), float(y0), float(x1), float(y1)


class Tesseract:
    """The `tesseract` program, one process an image; words under `min_confidence` are dropped.

    `layout` is its page segmentation mode: 11 finds sparse text in any order, as images have it.
    Raises ValueError where the program is not installed.
    """

    def __init__(self, *, min_confidence: float = 0.5, layout: int = 11):
        if shutil.which("tesseract") is None:
            advice = "Debian: apt install tesseract-ocr); the engine rapidocr comes with requirements.txt"
            raise ValueError(f"the program `tesseract` is not installed ({advice}")
        self.min_confidence, self.layout = min_confidence, layout

    @property
    def settings(self) -> dict[str, Any]:
        own = {"engine": "tesseract", "version": self._run("--version").decode().split()[1]}
        return own | {"min_confidence": self.min_confidence, "layout": self.layout}

    def read(self, image: Image) -> Words:
        stream = io.BytesIO()
        to_rgb(image).save(stream, "PNG")
        table = self._run("stdin", "stdout", "--psm", str(self.layout), "tsv", by=stream.getvalue())
        words = [w for w in tsv_words(table.decode()) if w.confidence >= self.min_confidence]
        return tuple(words[i] for i in reading_order([w.box for w in words]))

    def _run(self, *arguments: str, by: bytes = b"") -> bytes:
        """What the program prints; `by` is what it reads."""
        environment = os.environ | ONE_THREAD
        done = subprocess.run(["tesseract", *arguments], input=by, capture_output=True, env=environment)
        if done.returncode != 0:
            raise ValueError(f"tesseract: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout


def tsv_words(table: str) -> Words:
    """The words of Tesseract's table; its other rows are blocks and lines, of confidence -1."""
    header, *lines = table.strip("\r\n").split("\n")
    names = header.split("\t")
    found = []
    for line in lines:
        row = dict(zip(names, line.split("\t"), strict=False))  # quotes stand for themselves
        text, confidence = row.get("text", "").strip(), float(row["conf"])
        if text and confidence >= 0:
            x, y, width, height = (float(row[key]) for key in ("left", "top", "width", "height"))
            box = (x, y, x + width, y + height)
            found.append(OcrWord(text=text, box=box, confidence=round(confidence / 100, 3)))
    return tuple(found)


ENGINES: dict[str, Callable[..., Engine]] = {"rapidocr": RapidOcr, "tesseract": Tesseract}
