"""Samples as a run sees them, on one HTML page.

Each card has its images as they reach the vision tower, with their boxes (true ones, and those in the
target's text), the OCR words, and the whole sequence with the supervised tokens in colour.
"""

import io
from collections.abc import Iterator, Sequence
from itertools import groupby

from PIL import Image, ImageDraw

from data.batch import Batch
from data.checks import BadSampleError
from data.collate import IGNORED, Collator
from data.geometry import Geometry, seen_by
from data.sample import Sample
from moa.analysis import html
from moa.analysis.gallery import READ, TRUE, seen_image

TARGET = "#D55E00"
SHORTEST = 320  # pixels that a card's image is enlarged to
STYLE = f"""
section {{ display: flex; gap: 1.5em; padding: 1.2em 0; border-top: 1px solid var(--faint) }}
section img {{ max-width: none; align-self: start }}
.tokens {{ white-space: pre-wrap; font-family: monospace }}
.image {{ background: #e4e4e4; color: #555 }} .answer {{ background: #cdeee2; color: #1c2430 }}
.answer:nth-child(even) {{ background: #a5e0cc }} .bad {{ color: #b00 }}
.true {{ color: {TRUE} }} .said {{ color: {TARGET} }} .read {{ color: {READ} }}
"""
LEGEND = (
    '<p>boxes: <span class="true">true</span>, <span class="said">in the target</span>, '
    '<span class="read">read by OCR</span>; supervised tokens are '
    '<span class="tokens"><span class="answer">coloured</span></span></p>'
)


def preview_page(items: Sequence[Sample | BadSampleError], collator: Collator, title: str) -> str:
    """The page of some samples; the card of a bad one has the reason."""
    return html.page(title, [LEGEND, *(card(item, collator) for item in items)], STYLE)


def card(item: Sample | BadSampleError, collator: Collator) -> str:
    batch, rejected = collator.split([item])
    if batch is None or isinstance(item, BadSampleError):
        return html.element("section", str(rejected[0]), "bad")
    shown = [image_html(item, number, batch, collator) for number in range(len(item.images))]
    sizes = ", ".join(size for _, size in shown) or "text alone"
    words = " ".join(word.text for word in collator.words(item))
    about = f"task {item.task}, expert {item.expert or 'unknown'}, {sizes}, "
    tokens = (html.element("span", text, kind) for kind, text in tokens_of(batch, collator))
    parts = [
        html.element("h2", f"{item.source} / {item.id}"),
        html.element("p", f"{about}{int(batch.attention_mask.sum())} tokens"),
        html.element("p", f"OCR: {words or 'none'}", "read"),
        f"<p class=tokens>{''.join(tokens)}</p>",
    ]
    return f"<section>{''.join(image for image, _ in shown)}<div>{''.join(parts)}</div></section>"


def image_html(sample: Sample, number: int, batch: Batch, collator: Collator) -> tuple[str, str]:
    """One of the sample's images with its boxes, and its sizes in words."""
    size = sample.images[number].size
    geometry, file = collator.way(*size), io.BytesIO()
    drawn(frame_of(sample, number, batch, collator, geometry), sample, number, collator).save(file, "PNG")
    words = "{} x {} pixels, seen as {} x {}".format(*size, *geometry.size)
    return html.image(file.getvalue()), words


def frame_of(sample: Sample, number: int, batch: Batch, collator: Collator, geometry: Geometry) -> Image.Image:
    """The input of the vision tower; drawn by the geometry where that is tiles or flat patches."""
    pixels, processor = batch.pixel_values, collator.processor.image_processor
    if pixels.dim() == 4 and len(pixels) == len(sample.images) and tuple(pixels.shape[:1:-1]) == geometry.size:
        return seen_image(pixels[number], processor.image_mean, processor.image_std)
    image = collator.images(sample)[number]
    return seen_by(processor, *image.size).pixels(image)


def drawn(frame: Image.Image, sample: Sample, number: int, collator: Collator) -> Image.Image:
    """The frame, enlarged where it is small, with the image's boxes and words on it."""
    geometry, boxes = collator.way(*sample.images[number].size), sample.boxes if sample.box_image == number else ()
    zoom = max(1, -(-SHORTEST // min(frame.size)))
    image = frame.resize((frame.width * zoom, frame.height * zoom), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    target = collator.box_codec.decode(collator.target(sample), geometry) if boxes else None
    outlines = [(box, TRUE, 4) for box in boxes]
    outlines += [(target, TARGET, 2)] if target is not None else []
    outlines += [(w.box, READ, 1) for w in collator.words(sample) if w.image == number]
    for box, colour, width in outlines:
        x0, y0, x1, y1 = (value * zoom for value in geometry.to_frame(box))
        pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=width)
    return image


def tokens_of(batch: Batch, collator: Collator) -> Iterator[tuple[str, str]]:
    """Kind and text of the first row's tokens: prompts in one piece, image tokens counted, answers one by one."""
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
            yield from ((kind, tokenizer.decode([token])) for token in tokens)
        elif kind == "image":
            yield kind, f"{tokenizer.decode(tokens[:1])} x {len(tokens)}"
        else:
            yield kind, tokenizer.decode(tokens)
