"""Samples of a run as cards on its page: the image with its boxes, the question, the answer, the gates."""

import io
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from PIL import Image, ImageDraw

from data.checks import BadSampleError
from data.mixture import read_sample
from data.sample import Sample
from data.sources import open_sources
from moa.analysis import html
from moa.analysis.gallery import PREDICTED, TRUE
from moa.analysis.plots import color
from moa.evaluation.runs import RunFolder
from moa.evaluation.settings import chosen_sources

WIDTH, SHORTEST = 480, 160  # pixels of a sample's image
SEARCHED = 2000  # rows of a data set in which its samples are looked for
STYLE = f"""
.samples {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 45%), 1fr)); gap: 1.2rem; }}
.samples section {{ break-inside: avoid; }} .samples p {{ margin: .15rem 0; overflow-wrap: anywhere; }}
.samples img {{ width: 100%; }} .question {{ font-weight: bold; color: var(--ink); }} .right {{ color: {TRUE}; }}
.wrong {{ color: {PREDICTED}; }} .problem {{ color: #d33; }}
.gate {{ display: flex; gap: .5rem; align-items: center; font-size: .8rem; }}
.gate span {{ width: 5.5rem; overflow-wrap: anywhere; }}
.gate i {{ flex: 1; background: var(--faint); height: .6rem; }} .gate b {{ display: block; height: 100%; }}
"""


def samples_section(run: RunFolder) -> list[str]:
    """The first answers of each data set in turn, with the image from the data set, where that can still be opened."""
    own = run.results.get("", {})
    if run.config is None or not own:
        return []
    count = run.config.eval.num_images or 12
    turns = zip_longest(*([(name, row) for row in rows[:count]] for name, (_, rows) in own.items()))
    chosen = [pair for turn in turns for pair in turn if pair is not None][:count]
    images, reasons = images_of(run, chosen)
    cards = [card(name, row, images.get((name, *key_of(row))), [*run.config.experts]) for name, row in chosen]
    legend = (
        '<p>Boxes: <span class="right">true</span>, <span class="wrong">answered</span>. '
        "The first questions of each data set, right or wrong.</p>"
    )
    notes = [html.element("p", reason, "problem") for reason in reasons]
    return [legend, *notes, f'<div class="samples">{"".join(cards)}</div>']


def key_of(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["id"], row["image_id"], row["question"]


def images_of(
    run: RunFolder, chosen: Sequence[tuple[str, Mapping[str, Any]]]
) -> tuple[dict[tuple[str, ...], Sample], list[str]]:
    """The samples of the chosen rows by data set and key, and why some are missing; no OCR is run."""
    assert run.config is not None
    found: dict[tuple[str, ...], Sample] = {}
    reasons = []
    sources = {source.name: source for source in chosen_sources(run.config)}
    for name in dict.fromkeys(name for name, _ in chosen):
        wanted = {key_of(row) for other, row in chosen if other == name}
        try:
            if name not in sources:
                raise ValueError("the config names no such data set")
            dataset = open_sources([sources[name]], run.config.data, None)[name]
            for index in range(min(len(dataset), SEARCHED)):
                if not wanted:
                    break
                sample = read_sample(dataset, index, name)
                if isinstance(sample, BadSampleError):
                    continue
                key = (sample.id, sample.image_id, sample.asked)
                if key in wanted:
                    found[(name, *key)] = sample
                    wanted.discard(key)
            if wanted:
                reasons.append(f"{len(wanted)} images of {name} are not shown: the data set lacks them now")
        except (ValueError, OSError, ModuleNotFoundError) as error:
            reasons.append(f"Images of {name} are not shown: {error}")
    return found, reasons


def card(name: str, row: Mapping[str, Any], sample: Sample | None, experts: Sequence[str]) -> str:
    parts = []
    for image in sample.images if sample is not None else ():
        boxed = sample is not None and image is sample.main_image
        boxes, answered = (row["boxes"], row["predicted_box"]) if boxed else ([], None)
        parts.append(sample_image(image, boxes, answered, str(row["question"])))
    task = row["task"] if row["task"] == name else f"{name} ({row['task']})"
    parts += [html.element("p", task), html.element("p", row["question"], "question")]
    right = row["score"] is not None and row["score"] >= 0.5
    answer = row["prediction"] or "(nothing)"
    parts.append(html.element("p", f"{'✓' if right else '✗'} {answer}", "right" if right else "wrong"))
    if truth := " / ".join(dict.fromkeys(row["answers"])):
        parts.append(html.element("p", f"true: {truth}"))
    if row["gates"] is not None and len(row["gates"]) == len(experts):
        parts += [gate_bar(i, expert, gate) for i, (expert, gate) in enumerate(zip(experts, row["gates"], strict=True))]
    return f"<section>{''.join(parts)}</section>"


def gate_bar(number: int, expert: str, gate: float) -> str:
    """A bar of up to its full width, and the number beside it: gates need not lie in [0, 1]."""
    share = 100 * min(1.0, max(0.0, float(gate)))
    bar = f'<i><b style="width: {share:.0f}%; background: {color(number)}"></b></i>'
    return f'<div class="gate">{html.element("span", expert)}{bar}{float(gate):.2f}</div>'


def sample_image(image: Image.Image, true: Sequence[Sequence[Any]], predicted: Sequence[Any] | None, alt: str) -> str:
    """The image at a reader's size with the true boxes and the answered one."""
    scale = min(WIDTH / image.width, max(1.0, SHORTEST / min(image.size)))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    way = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    drawn, file = image.convert("RGB").resize(size, way), io.BytesIO()
    pen = ImageDraw.Draw(drawn)
    for box, ink in [*((box, TRUE) for box in true), *([(predicted, PREDICTED)] if predicted else [])]:
        x0, y0, x1, y1 = (value * scale for value in box)
        corners = min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)
        pen.rectangle(corners, outline="white", width=5)
        pen.rectangle(corners, outline=ink, width=3)
    drawn.save(file, "JPEG", quality=85)
    return html.image(file.getvalue(), alt, "jpeg")
