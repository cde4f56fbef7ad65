"""Samples as the model reads them, on one HTML page without a script or a link.

Each card has the picture as it reaches the vision tower, with its boxes (true ones, and what the
target's text says), the OCR words, and the whole sequence with the supervised tokens in colour.
"""

import base64
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from PIL import Image, ImageDraw

from data.batch import Batch
from data.checks import BadSampleError
from data.collate import IGNORED, Collator, chosen_words
from data.geometry import Geometry
from data.sample import Box, Sample
from moa.analysis.gallery import READ, TRUE, seen_picture

SAID = "#D55E00"
SHORTEST = 320  # pixels that a card's picture is enlarged to
STYLE = f"""
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; color: #222 }}
section {{ display: flex; gap: 1.5em; padding: 1.2em 0; border-top: 1px solid #ddd }}
h1 {{ font-size: 1.3em }} h2 {{ font-size: 1em; margin: 0 0 .4em }}
.meta {{ color: #666; font-size: .87em }} .tokens {{ white-space: pre-wrap; font-family: monospace }}
.image {{ background: #e4e4e4; color: #555 }} .answer {{ background: #cdeee2 }}
.answer:nth-child(even) {{ background: #a5e0cc }} .bad {{ color: #b00 }}
.true {{ color: {TRUE} }} .said {{ color: {SAID} }} .read {{ color: {READ} }}
"""


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of one kind: `image`, `prompt`, or one supervised token as `answer`."""

    kind: str
    text: str


def preview_page(items: Sequence[Sample | BadSampleError], collator: Collator, title: str) -> str:
    """The page of some samples; a bad one has a card that says why."""
    cards = "".join(card(item, collator) for item in items)
    legend = (
        '<p class="meta">boxes: <span class="true">true</span>, <span class="said">as the target'
        ' says</span>, <span class="read">read by OCR</span>; supervised tokens are '
        '<span class="tokens"><span class="answer">coloured</span></span></p>'
    )
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{legend}{cards}\n"
    )


def card(item: Sample | BadSampleError, collator: Collator) -> str:
    if isinstance(item, BadSampleError):
        return f'<section class="bad">{html.escape(str(item))}</section>'
    batch, rejected = collator.split([item])
    if batch is None:
        return f'<section class="bad">{html.escape(str(rejected[0]))}</section>'
    picture, size = picture_html(item, batch, collator)
    words = chosen_words(item, collator.max_ocr_words)
    read = " ".join(word.text for word in words) or "none"
    name = f"{item.source} / {item.id}"
    about = f"task {item.task}, expert {item.expert or 'unknown'}, {size}"
    return (
        f"<section>{picture}<div><h2>{html.escape(name)}</h2><p class=meta>{html.escape(about)}, "
        f"{int(batch.attention_mask.sum())} tokens</p>"
        f"<p class=read>OCR: {html.escape(read)}</p>"
        f"<p class=tokens>{tokens_html(batch, collator)}</p></div></section>"
    )


def picture_html(sample: Sample, batch: Batch, collator: Collator) -> tuple[str, str]:
    """The picture with its boxes, and its sizes in words; nothing to show for text alone."""
    if sample.image is None:
        return "", "text alone"
    geometry = collator.geometry(sample)
    picture = drawn(frame_of(sample.image, batch, collator, geometry), sample, collator)
    tag = f"<img src='{data_url(picture)}' width={picture.width} height={picture.height}>"
    return tag, "{} x {} pixels, seen as {} x {}".format(*sample.image.size, *geometry.size)


def frame_of(
    image: Image.Image, batch: Batch, collator: Collator, geometry: Geometry
) -> Image.Image:
    """What reaches the vision tower; drawn by the geometry where that is tiles or flat patches."""
    pixels, processor = batch.pixel_values, collator.processor.image_processor
    if pixels.dim() == 4 and tuple(pixels.shape[:1:-1]) == geometry.size:
        return seen_picture(pixels[0], processor.image_mean, processor.image_std)
    return geometry.pixels(image)


def drawn(frame: Image.Image, sample: Sample, collator: Collator) -> Image.Image:
    """The frame, enlarged where it is small, with the sample's boxes and words on it."""
    geometry = collator.geometry(sample)
    zoom = max(1, -(-SHORTEST // min(frame.size)))
    picture = frame.resize((frame.width * zoom, frame.height * zoom), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    said = collator.box_codec.decode(collator.target(sample), geometry) if sample.boxes else None
    outlines = [(box, TRUE, 4) for box in sample.boxes]
    outlines += [(said, SAID, 2)] if said is not None else []
    outlines += [(w.box, READ, 1) for w in chosen_words(sample, collator.max_ocr_words)]
    for box, colour, width in outlines:
        pen.rectangle(zoomed(geometry.to_frame(box), zoom), outline=colour, width=width)
    return picture


def zoomed(box: Box, zoom: int) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (value * zoom for value in box)
    return x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)


def tokens_html(batch: Batch, collator: Collator) -> str:
    pieces = (f'<span class="{r.kind}">{html.escape(r.text)}</span>' for r in runs(batch, collator))
    return "".join(pieces)


def runs(batch: Batch, collator: Collator) -> Iterator[Run]:
    """The first row's tokens: prompts in one piece, image tokens counted, answers one by one."""
    tokenizer = collator.processor.tokenizer
    image_id = getattr(collator.processor, "image_token_id", None)  # a CLIP has none
    ids = batch.input_ids[0].tolist()
    labels = batch.labels[0].tolist() if batch.labels is not None else [IGNORED] * len(ids)
    kinds = [
        "answer" if label != IGNORED else "image" if token == image_id else "prompt"
        for token, label in zip(ids, labels, strict=True)
    ]
    for kind, group in groupby(zip(kinds, ids, strict=True), key=lambda pair: pair[0]):
        tokens = [token for _, token in group]
        if kind == "answer":
            yield from (Run(kind, tokenizer.decode([token])) for token in tokens)
        elif kind == "image":
            yield Run(kind, f"{tokenizer.decode(tokens[:1])} x {len(tokens)}")
        else:
            yield Run(kind, tokenizer.decode(tokens))


def data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
