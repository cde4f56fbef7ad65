"""Samples as the model saw them, with its answers: one PNG page of cards."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from data.sample import Box
from moa.analysis.plots import INK, MUTED, color, page
from moa.benchmarks.scores import Response
from moa.metrics.boxes import best_iou

TRUE, PREDICTED, READ = "#009E73", "#D55E00", "#0072B2"


@dataclass(frozen=True, kw_only=True)
class Card:
    image: Image.Image
    response: Response
    score: float
    reads: bool = True  # whether the model takes OCR words: only then their absence is noted


def seen_image(pixels: Float[Tensor, "3 height width"], mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """The image of one row of `pixel_values`: exactly the input of the vision tower."""
    array = pixels.float().cpu().numpy().transpose(1, 2, 0) * np.array(std) + np.array(mean)
    return Image.fromarray((array.clip(0, 1) * 255).round().astype(np.uint8))


def gallery(path: str | Path, cards: Sequence[Card], experts: Sequence[str], title: str) -> None:
    """Samples with true (solid) and predicted (dashed) boxes, OCR words, answers and gate bars."""
    columns = min(3, max(len(cards), 1))
    rows = max(-(-len(cards) // columns), 1)
    legend = "boxes: solid = true, dashed = predicted, thin = read by OCR   ·   bars: the gates"
    with page(path, 5.3 * columns, 2.5 * rows + 0.8, title, legend) as figure:
        grid = figure.add_gridspec(rows, 2 * columns, width_ratios=[1, 1.25] * columns)
        for number, card in enumerate(cards):
            row, column = divmod(number, columns)
            draw_image(figure.add_subplot(grid[row, 2 * column]), card)
            side = grid[row, 2 * column + 1].subgridspec(2, 1, height_ratios=[1.7, 1])
            draw_words(figure.add_subplot(side[0]), card)
            draw_gates(figure.add_subplot(side[1]), card.response.gates, experts)


def draw_image(axes: Axes, card: Card) -> None:
    sample, answer = card.response.sample, card.response.box
    width, height = sample.size
    axes.imshow(card.image, extent=(0, width, height, 0), interpolation="nearest")
    axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    task = sample.task
    axes.set_title(task if sample.source == task else f"{sample.source} ({task})", fontsize=9)
    for word in sample.ocr or ():
        if word.image == (sample.box_image or 0):
            _box(axes, word.box, READ, linewidth=0.9)
    for box in sample.boxes:
        _box(axes, box, "white", linewidth=3.4)
        _box(axes, box, TRUE, linewidth=2)
    if answer is not None:
        _box(axes, answer, "white", linewidth=3.4)
        _box(axes, answer, PREDICTED, linewidth=2, linestyle=(0, (4, 2)))


def _box(axes: Axes, box: Box, edge: str, **style: Any) -> None:
    x0, y0, x1, y1 = box
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=edge, **style))


def draw_words(axes: Axes, card: Card) -> None:
    axes.axis("off")
    mark, ink = ("✓", TRUE) if card.score >= 0.5 else ("✗", PREDICTED)
    sample, found, box = card.response.sample, card.response.text, card.response.box
    if box is not None:
        found = f"a box, IoU {best_iou(box, sample.boxes):.2f}"
    lines = [(sample.asked, INK, "bold", 2), (f"{mark} {found or '(nothing)'}", ink, "normal", 3)]
    if (truth := " / ".join(dict.fromkeys(sample.answers))) and card.score < 1:
        lines.append((f"true: {truth}", MUTED, "normal", 2))
    if sample.ocr:
        lines.append((f"read: {' '.join(word.text for word in sample.ocr)}", READ, "normal", 1))
    elif sample.ocr is None and card.reads:
        lines.append(("no OCR was run", MUTED, "normal", 1))
    top = 1.0
    for text, ink, weight, most in lines:
        text = text.replace("$", r"\$")  # matplotlib reads a dollar sign as the start of a formula
        wrapped = textwrap.wrap(text, 30, max_lines=most, placeholder=" …") or [""]
        drawn = axes.text(0, top, "\n".join(wrapped), color=ink, weight=weight, va="top",
                          fontsize=8.5, transform=axes.transAxes, linespacing=1.25,
                          clip_on=True)  # fmt: skip
        drawn.set_in_layout(False)  # a long word must not squeeze its neighbours
        top -= 0.105 * len(wrapped) + 0.04


def draw_gates(axes: Axes, by_site: Sequence[Sequence[float]] | None, experts: Sequence[str]) -> None:
    if by_site is None:
        axes.axis("off")
        why = "gates differ by token" if experts else "no experts"
        axes.text(0, 1, why, color=MUTED, va="top", transform=axes.transAxes)
        return
    places, gates = range(len(experts)), torch.tensor(by_site).mean(0).tolist()
    axes.barh(places, gates, color=[color(i) for i in places], height=0.68)
    axes.set(xlim=(0, max(1.0, *gates) * 1.18), ylim=(len(experts) - 0.4, -0.6), xticks=[])
    axes.set_yticks(places, experts, fontsize=8)
    axes.spines["bottom"].set_visible(False)
    for place, gate in zip(places, gates, strict=True):
        axes.text(gate + 0.02, place, f"{gate:.2f}", va="center", fontsize=7.5, color=MUTED)
