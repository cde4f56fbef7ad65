"""What the mixing desk does, apart from its page: questions with several gates side by side, and a zip of a merge.

bytes -> image, within limits     gates -> answer as it grows, one at a time     gates -> merge -> zip
"""

import base64
import html
import io
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageOps

from data.checks import BadSampleError
from data.images import open_image
from data.mixture import read_sample
from data.ocr import words_on
from data.sample import Box, OcrWord, Sample
from data.sources import open_sources
from moa.clip_model import ClipMixture
from moa.evaluation.sample_cards import gate_bar
from moa.evaluation.settings import chosen_sources
from moa.loaded import GateRule, LoadedModel

MOST_BYTES = 20 * 2**20  # of an uploaded file
MOST_PIXELS = 25_000_000  # of an image
MOST_IMAGES = 8  # of a question, where the base takes several
MOST_CHARACTERS = 2000  # of a question, or of the names for a CLIP
SHOWN = 720  # pixels of the longer side of the image on the page
READ = "#0072B2"  # OCR words
MISTAKES = (ValueError, OSError, RuntimeError, LookupError, TypeError)  # shown on the page, which lives on
WITHHELD = "(withheld)"  # the choice of a task by which neither prompt nor router gets one


class SupersededError(Exception):
    """Somebody wants another answer, so this one ends."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A text, or the share of each name for a CLIP; its box in pixels of the image; each expert's gate."""

    text: str
    shares: dict[str, float] = field(default_factory=dict)
    box: Box | None = None
    gates: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Desk:
    """One model for all visitors: whoever comes second waits until the first answer is there."""

    model: LoadedModel
    folder: Path  # of the zips, until they are fetched
    busy: threading.Lock = field(default_factory=threading.Lock)
    merging: threading.Lock = field(default_factory=threading.Lock)

    @property
    def compares(self) -> bool:
        """A CLIP, which is given names and not a question."""
        return isinstance(self.model.network, ClipMixture)

    @property
    def prompt(self) -> str:
        """What stands around the names that a CLIP compares with: that of the run's first data set that has one."""
        prompts = [source.prompt or "" for source in self.model.config.data.sources.values()]
        return next((prompt for prompt in prompts if "{}" in prompt), "a photo of a {}")

    @property
    def most_images(self) -> int:
        """That one question may be about."""
        return 1 if self.compares or self.model.network.backbone.intake.one_image else MOST_IMAGES

    def answer(
        self,
        images: Sequence[Image.Image],
        question: str,
        task: str | None,
        gates: GateRule,
        on_text: Callable[[str], None] = lambda text: None,
    ) -> Answer:
        """The answer by some gates; `on_text` is called once before it, and with what there is of it."""
        with self.busy:
            on_text("")
            if not self.compares:
                found = self.model.ask(
                    [*images] if len(images) > 1 else images[0], question, task, gates=gates, on_text=on_text
                )
                return Answer(text=found.text, box=found.box, gates=found.gates)
            names = question.replace(",", "\n").splitlines()
            fits = self.model.classify(images[0], names, task, prompt=self.prompt, gates=gates)
            best = max(fits.shares, key=lambda name: fits.shares[name])
            return Answer(text=best, shares=fits.shares, gates=fits.gates)

    def words(self, images: Sequence[Image.Image]) -> Sequence[OcrWord]:
        """What the run's OCR reads; nothing for a run without."""
        if self.model.ocr is None:
            return ()
        with self.busy:
            return words_on(images, self.model.ocr) or ()

    def presets(self) -> dict[str, dict[str, float]]:
        """Gates to start from: by name those that any expert can have; a negated one is forgotten."""
        names = self.model.experts
        if not names:
            return {}
        rows = self.model.network.routing.oracle(torch.tensor([-1, *range(len(names))]).to(self._device))
        each = [dict(zip(names, row, strict=True)) for row in rows[:, 0].tolist()]
        found = {"uniform": each[0], "all off": dict.fromkeys(names, 0.0)}
        found |= {f"{name} alone": row for name, row in zip(names, each[1:], strict=True)}
        return found | {f"forget {name}": {**dict.fromkeys(names, 0.0), name: -1.0} for name in names}

    def export(self, gates: Mapping[str, float | int]) -> tuple[Path, str]:
        """A zip of the experts merged at these gates, in a folder of its own, and a line on its check."""
        if not self.merging.acquire(blocking=False):
            raise ValueError("another merge is under way; try again when it is done")
        place = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            by_token = self.model.network.routing.granularity != "sample"
            report = self.model.merge(place / "mix", gates, approximate=by_token)
            file = shutil.make_archive(str(place / "mix"), "zip", place / "mix")
            shutil.rmtree(place / "mix")
            gap = report["comparisons"]["written"]["max_abs_logit_diff"]
            return Path(file), f"reloaded in a fresh process by plain PEFT; logits differ by {gap:.1e}"
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        finally:
            self.merging.release()

    def samples(self, most: int = 8) -> list[Sample]:
        """One with images of each validation set, as far as its files are there."""
        found: list[Sample] = []
        try:
            sources = chosen_sources(self.model.config)[:most]
        except ValueError:
            return []
        for number, source in enumerate(sources):
            try:
                dataset = open_sources([source], self.model.config.data, None)[source.name]
                sample = read_sample(dataset, min(number, len(dataset) - 1), source.name)
            except (ValueError, OSError, ModuleNotFoundError):
                continue
            if not isinstance(sample, BadSampleError) and 1 <= len(sample.images) <= self.most_images:
                found.append(sample)
        return found

    @property
    def _device(self) -> torch.device:
        return next(self.model.network.parameters()).device


def check_text(text: str) -> None:
    if not text.strip():
        raise ValueError("question: it is empty")
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"question: at most {MOST_CHARACTERS:,} characters, got {len(text):,}")


def open_upload(data: bytes) -> Image.Image:
    """The image in a file's bytes; ValueError for other files, and above the limits."""
    if len(data) > MOST_BYTES:
        raise ValueError(f"image: at most {MOST_BYTES / 2**20:.0f} MB, got {len(data) / 2**20:.1f} MB")
    try:
        with Image.open(io.BytesIO(data)) as header:
            width, height = header.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        width = height = 0  # `open_image` gives the reason
    if width * height > MOST_PIXELS:
        raise ValueError(f"image: at most {MOST_PIXELS:,} pixels, got {width}x{height}; make it smaller")
    image = open_image(data, "image")
    with Image.open(io.BytesIO(data)) as header:  # a camera says how it was held; `open_image` shows pixels as stored
        image.getexif().update(header.getexif())
    return ImageOps.exif_transpose(image)


# -- What is drawn ----------------------------------------------------------------------------------


def shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """That of an image on the page: small ones are enlarged too."""
    scale = SHOWN / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def data_url(image: Image.Image, side: int | None = None) -> str:
    """The image at its size on the page, or within `side` pixels, as the address of itself."""
    drawn, file = image.convert("RGB"), io.BytesIO()
    if side is None:
        drawn = drawn.resize(shown_size(drawn.size), Image.Resampling.LANCZOS)
    else:
        drawn.thumbnail((side, side))
    drawn.save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def overlay(size: tuple[int, int], words: Sequence[OcrWord], boxes: Mapping[str, Box]) -> str:
    """SVG over an image of this size on the page: OCR words with their boxes, and answered boxes by color."""
    width, _ = shown_size(size)
    scale = width / size[0]
    parts = []
    for word in words:
        text = html.escape(f"{word.text} ({word.confidence:.2f})")
        x, y = word.box[0] * scale, word.box[1] * scale
        label = html.escape(word.text)
        parts.append(rectangle(word.box, scale, READ, 1.5, f"<title>{text}</title>"))
        parts.append(
            f'<text x="{x:.0f}" y="{max(12.0, y - 3):.0f}" font-size="14" font-family="sans-serif" fill="{READ}" '
            f'stroke="white" stroke-width="3" paint-order="stroke">{label}</text>'
        )
    for number, (ink, box) in enumerate(boxes.items()):  # dashes leave an equal box below visible
        parts.append(rectangle(box, scale, ink, 4, dashes=f"{24 - 6 * number} {6 * number}"))
    return "".join(parts)


def rectangle(box: Box, scale: float, ink: str, width: float | int, inside: str = "", dashes: str = "") -> str:
    x0, y0, x1, y1 = (value * scale for value in box)
    place = f'x="{min(x0, x1):.1f}" y="{min(y0, y1):.1f}" width="{abs(x1 - x0):.1f}" height="{abs(y1 - y0):.1f}"'
    line = f'stroke="{ink}" stroke-width="{width}" stroke-dasharray="{dashes or "none"}"'
    return f'<rect {place} fill="none" {line}>{inside}</rect>'


def bars(values: Mapping[str, float] | None, most: int = 12) -> str:
    """A bar for each gate or share, the largest first where there are more than `most`."""
    if values is None:
        return ""
    rows = [*enumerate(values.items())]
    if len(rows) > most:
        rows = sorted(rows, key=lambda row: -row[1][1])[:most]
    return "".join(gate_bar(number, name, value) for number, (name, value) in rows)
