"""The mixing desk in a browser: an image, a question, the answers of several gates beside each other, sliders.

The only room of NiceGUI. Nothing here computes: `Desk` does, in a thread, so that the page answers meanwhile.
"""

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from nicegui import app, events, run, ui
from PIL import Image
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response

from data.sample import OcrWord
from moa.loaded import GateRule
from moa.playground.desk import (
    MISTAKES,
    MOST_BYTES,
    MOST_IMAGES,
    WITHHELD,
    Answer,
    Desk,
    SupersededError,
    bars,
    check_text,
    data_url,
    open_upload,
    overlay,
)

LOCAL = ("127.0.0.1", "localhost", "::1")
GREY, BLUE, GREEN, ORANGE = "#8792A2", "#0072B2", "#009E73", "#D55E00"
FORM = 64 * 2**10  # bytes of a request beside the file in it
STYLE = """
.nicegui-content { padding: 0; }
.gate { display: flex; gap: .5rem; align-items: center; font-size: .75rem; line-height: 1.25rem; opacity: .9; }
.gate span { width: 6rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.gate i { flex: 1; background: rgba(128, 128, 128, .2); height: .45rem; border-radius: .25rem; overflow: hidden; }
.gate b { display: block; height: 100%; }
.dot { width: .7rem; height: .7rem; border-radius: 50%; flex: none; }
.answer { font-size: 1.15rem; line-height: 1.5rem; min-height: 1.5rem; overflow-wrap: anywhere; }
.mistake { color: #C62828; font-size: .9rem; } .body--dark .mistake { color: #FF8A80; }
.small { font-size: .75rem; opacity: .7; overflow-wrap: anywhere; }
.q-uploader { width: 100%; max-height: none; } .q-uploader__list, .q-uploader__subtitle { display: none; }
.q-uploader__header { background: transparent !important; color: inherit !important; }
.q-uploader__title { font-weight: 400; font-size: .9rem; }
"""
# Of the page: an image in the clipboard goes where an uploaded one goes.
PASTE = """
document.addEventListener("paste", event => {
  const files = [...event.clipboardData.files].filter(file => file.type.startsWith("image/"));
  if (files.length) getElement(ID).$refs.qRef.addFiles(files.slice(0, 1));
});
"""


# What the camera sees after a second, when it has found its exposure, goes there too; its value is what went wrong.
CAMERA = """
try {
  const stream = await navigator.mediaDevices.getUserMedia({video: {facingMode: "environment"}});
  const video = Object.assign(document.createElement("video"), {srcObject: stream, muted: true, playsInline: true});
  await video.play();
  await new Promise(done => setTimeout(done, 1000));
  const canvas = Object.assign(document.createElement("canvas"), {width: video.videoWidth, height: video.videoHeight});
  canvas.getContext("2d").drawImage(video, 0, 0);
  stream.getTracks().forEach(track => track.stop());
  const blob = await new Promise(done => canvas.toBlob(done, "image/jpeg"));
  getElement(ID).$refs.qRef.addFiles([new File([blob], "camera.jpg", {type: "image/jpeg"})]);
} catch (error) { return String(error); }
"""


@dataclass(eq=False, kw_only=True)
class Card:
    """One answer: what its gates are called, its color, and where it is shown."""

    title: str
    color: str
    gates: GateRule
    turn: int = 0  # of the question or gates that it shows; a newer one ends the older
    answer: Answer | None = None
    text: Any = None
    raw: Any = None
    detail: Any = None
    mistake: Any = None


@dataclass(eq=False, kw_only=True)
class Visit:
    """The page of one visitor: what is asked, and the elements that change."""

    desk: Desk
    images: list[Image.Image] = field(default_factory=list)
    words: Sequence[OcrWord] = ()
    asked: bool = False
    cards: list[Card] = field(default_factory=list)
    sliders: dict[str, Any] = field(default_factory=dict)
    zips: list[Path] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)  # an element for each image, in `shown`
    shown: Any = None
    adds: Any = None
    question: Any = None
    task: Any = None
    expert: Any = None
    preset: Any = None
    show_words: Any = None
    note: Any = None
    moving: bool = False  # a preset moves several sliders, of which only the last counts

    # -- Layout -------------------------------------------------------------------------------------

    def build(self) -> None:
        model = self.desk.model
        ui.colors(primary="#1C86C7")
        ui.add_css(STYLE)
        ui.context.client.on_delete(self.leave)
        with ui.column().classes("w-full max-w-6xl mx-auto p-4 gap-4"):
            with ui.row().classes("items-baseline gap-x-4 gap-y-0"):
                ui.label("Mixing desk").classes("text-xl font-semibold")
                ui.label(self.about()).classes("text-sm opacity-70 break-all")
            with ui.element("div").classes("grid grid-cols-1 md:grid-cols-2 gap-5 w-full"):
                with ui.column().classes("gap-3 min-w-0"):
                    self.build_question()
                with ui.column().classes("gap-3 min-w-0"):
                    self.build_answers()
                    if model.experts:
                        self.build_sliders()

    def about(self) -> str:
        names = self.desk.model.experts
        reads = "reads words on images" if self.desk.model.ocr is not None else "no OCR"
        experts = f"{len(names)} expert{'s' if len(names) > 1 else ''}" if names else "a base without experts"
        return f"{experts} on {Path(self.desk.model.config.model.name).name}, {reads}"

    def build_question(self) -> None:
        self.shown = ui.element("div")
        upload = ui.upload(
            label="Image: choose, drop, or paste anywhere",
            auto_upload=True,
            max_file_size=MOST_BYTES,
            on_upload=self.receive,
            on_rejected=lambda: self.complain(f"image: at most {MOST_BYTES / 2**20:.0f} MB, and an image file"),
        )
        upload.props('accept="image/*" flat bordered')
        ui.timer(0.1, lambda: ui.run_javascript(PASTE.replace("ID", str(upload.id))), once=True)
        ui.button("Camera", on_click=lambda: self.photograph(upload)).props("flat dense no-caps")
        if self.desk.most_images > 1:
            self.adds = ui.switch("Beside the images above; <image> in the question is the place of one")
        with ui.row().classes("gap-2"):
            for sample in self.desk.samples():
                picture = ui.image(data_url(sample.images[0], 96)).classes("w-14 h-14 rounded cursor-pointer")
                picture.tooltip(sample.asked).props("fit=cover")
                picture.on("click", lambda _, s=sample: self.take([*s.images], s.asked, s.task))
        label = "Names, by line or comma" if self.desk.compares else "Question"
        self.question = ui.textarea(label).props("autogrow outlined dense").classes("w-full")
        self.question.on("keydown.enter.prevent", self.ask)
        with ui.row().classes("items-center gap-3 w-full"):
            tasks = [WITHHELD, *self.desk.model.config.data.tasks]
            self.task = ui.select(tasks, value=WITHHELD, label="Task").props("outlined dense").classes("grow")
            ui.button("Compare" if self.desk.compares else "Ask", on_click=self.ask)
        if self.desk.model.ocr is not None:
            self.show_words = ui.switch("OCR words", value=True, on_change=self.draw)

    def build_answers(self) -> None:
        names = self.desk.model.experts
        self.cards = [Card(title="base", color=GREY, gates="off" if names else "router")]
        if names:
            self.cards += [
                Card(title="one expert", color=BLUE, gates=names[0]),
                Card(title="as trained: the router decides", color=GREEN, gates="router"),
                Card(title="merged: the gates below, by hand", color=ORANGE, gates={}),
            ]
        for card in self.cards:
            with ui.card().classes("w-full p-3 gap-1"):
                with ui.row().classes("items-center gap-2 w-full no-wrap"):
                    ui.element("div").classes("dot").style(f"background: {card.color}")
                    ui.label(card.title).classes("text-sm opacity-70")
                    if card.color == BLUE:
                        self.expert = ui.select(names, value=names[0]).props("dense options-dense borderless")
                        self.expert.on_value_change(lambda event, own=card: self.choose(own, event.value))
                card.text = ui.label("").classes("answer")
                card.raw, card.mistake = ui.label("").classes("small"), ui.label("").classes("mistake")
                card.detail = ui.html("", sanitize=False).classes("w-full")

    def build_sliders(self) -> None:
        presets = self.desk.presets()
        with ui.card().classes("w-full p-3 gap-1"):
            with ui.row().classes("items-center gap-2 w-full"):
                ui.label("Gates by hand").classes("text-sm font-semibold grow")
                self.preset = ui.select(["as the router decided", *presets], label="Preset").classes("w-56")
                self.preset.props("dense outlined options-dense")
                self.preset.on_value_change(lambda event: event.value and self.set_gates(presets.get(event.value)))
            for name, gate in presets["uniform"].items():
                with ui.row().classes("items-center gap-3 w-full no-wrap"):
                    ui.label(name).classes("w-28 text-sm truncate")
                    slider = ui.slider(min=-1, max=1, step=0.05, value=round(gate, 2)).classes("grow")
                    slider.props["aria-label"] = name
                    ui.label().bind_text_from(slider, "value", lambda v: f"{v:+.2f}").classes("w-12 text-sm text-right")
                    slider.on_value_change(self.move)
                    self.sliders[name] = slider
            with ui.row().classes("items-center gap-3 w-full"):
                button = ui.button("Export this mix").props("outline")
                button.on_click(lambda: self.export(button))
                self.note = ui.label("One LoRA at these gates, as a zip for PEFT").classes("text-xs opacity-70")
        self.cards[-1].gates = self.gates()

    # -- What visitors do ---------------------------------------------------------------------------

    async def receive(self, event: events.UploadEventArguments) -> None:
        try:
            image = await run.io_bound(open_upload, await event.file.read())
        except MISTAKES as error:
            return self.complain(str(error))
        finally:
            cast(ui.upload, event.sender).reset()
        before = self.images if self.adds is not None and self.adds.value else []
        if len(before) >= MOST_IMAGES:
            return self.complain(f"images: at most {MOST_IMAGES} in a question")
        if image is not None:  # None: the server ends
            await self.take([*before, image])

    async def photograph(self, upload: ui.upload) -> None:
        if mistake := await ui.run_javascript(CAMERA.replace("ID", str(upload.id)), timeout=60):
            self.complain(f"camera: {mistake}")

    async def take(self, images: list[Image.Image], question: str | None = None, task: str | None = None) -> None:
        """Other images, and the question of a sample."""
        self.images, self.seen, self.words, self.asked = images, [], (), False
        for card in self.cards:
            self.clear(card)
        if question is not None and not self.desk.compares:
            self.question.set_value(question)
        if task in self.desk.model.config.data.tasks:
            self.task.set_value(task)
        if self.expert is not None and task in self.desk.model.experts:
            self.expert.set_value(task)
        addresses = await run.io_bound(lambda: [*map(data_url, images)])
        if self.images is not images:
            return
        self.shown.clear()
        self.shown.classes(replace=f"grid gap-2 w-full {'grid-cols-2' if len(images) > 1 else ''}")
        with self.shown:
            self.seen = [ui.interactive_image(address).classes("w-full rounded") for address in addresses or ()]
        try:
            found = await run.io_bound(self.desk.words, images)
        except MISTAKES as error:
            return self.complain(f"OCR: {error}")
        if self.images is images:
            self.words = found or ()
            self.draw()

    async def ask(self) -> None:
        if not self.images:
            return self.complain("choose an image first")
        try:
            check_text(self.question.value)
        except ValueError as error:
            return self.complain(str(error))
        self.asked = True
        turns = {id(card): self.clear(card) for card in self.cards}
        for card in self.cards:
            await self.fill(card, turns[id(card)])

    async def choose(self, card: Card, gates: GateRule) -> None:
        card.gates = gates
        if self.asked:
            await self.fill(card, self.clear(card))

    async def move(self) -> None:
        if not self.moving:
            self.preset.set_value(None)
            await self.choose(self.cards[-1], self.gates())

    async def set_gates(self, gates: dict[str, float] | None) -> None:
        """All sliders at once; None: as the router decided for what was asked last."""
        if gates is None:
            routed = self.cards[-2].answer
            if routed is None or routed.gates is None:
                return self.complain("the router has decided nothing yet, or decides for each token: ask first")
            gates = routed.gates
        self.moving = True
        for name, slider in self.sliders.items():
            slider.set_value(round(min(1.0, max(-1.0, gates[name])), 2))
        self.moving = False
        await self.choose(self.cards[-1], self.gates())

    async def export(self, button: Any) -> None:
        self.note.set_text("merging and checking, a minute or so ...")
        button.disable()
        try:
            found = await run.io_bound(self.desk.export, self.gates())
        except MISTAKES as error:
            self.note.set_text("")
            return self.complain(f"export: {error}")
        finally:
            button.enable()
        if found is None:  # the server ends
            return
        file, line = found
        self.forget_zips()
        self.zips.append(file.parent)
        self.note.set_text(line)
        ui.download.file(file, "mix.zip")

    def leave(self) -> None:
        """The tab is closed: end its answers, remove its files."""
        for card in self.cards:
            card.turn += 1
        self.forget_zips()

    # -- What changes on the page -------------------------------------------------------------------

    def gates(self) -> dict[str, float]:
        return {name: float(slider.value) for name, slider in self.sliders.items()}

    def clear(self, card: Card) -> int:
        """Nothing on the card; the number of its next answer."""
        card.turn += 1
        card.answer = None
        for element in (card.text, card.raw, card.mistake):
            element.set_text("")
        card.detail.set_content("")
        return card.turn

    async def fill(self, card: Card, turn: int) -> None:
        """Ask by the card's gates, and show the answer as it grows, unless something newer is asked meanwhile."""
        loop, task = asyncio.get_running_loop(), self.task.value

        def on_text(text: str) -> None:
            if card.turn != turn:
                raise SupersededError
            loop.call_soon_threadsafe(card.text.set_text, text or "...")

        if not self.images:
            return
        asked = self.images, self.question.value, None if task == WITHHELD else task, card.gates
        try:
            answer = await run.io_bound(self.desk.answer, *asked, on_text)
        except SupersededError:
            return
        except MISTAKES as error:
            answer = None
            if card.turn == turn:
                card.text.set_text("")
                card.mistake.set_text(str(error))
        if answer is not None and card.turn == turn:
            self.show(card, answer)

    def show(self, card: Card, answer: Answer) -> None:
        card.answer = answer
        box = answer.box and "box " + ", ".join(f"{value:.0f}" for value in answer.box)
        card.text.set_text(box or answer.text or "(nothing)")
        card.raw.set_text(answer.text if box else "")
        card.detail.set_content(bars(answer.shares or (answer.gates if card.color == GREEN else None)))
        self.draw()

    def draw(self) -> None:
        shows = self.show_words is not None and self.show_words.value
        boxes = {card.color: card.answer.box for card in self.cards if card.answer and card.answer.box}
        for number, (image, seen) in enumerate(
            zip(self.images, self.seen, strict=False)
        ):  # the second is empty until they are drawn
            words = [word for word in self.words if shows and word.image == number]
            seen.set_content(overlay(image.size, words, boxes))

    def complain(self, text: str) -> None:
        ui.notify(text[:500], type="negative", position="top", timeout=8000, close_button=True, multi_line=True)

    def forget_zips(self) -> None:
        while self.zips:
            shutil.rmtree(self.zips.pop(), ignore_errors=True)


async def limit_bodies(request: Request, call_next: Any) -> Response:
    """Refuse a request whose body is larger than a file may be, or of unknown length, before it is read."""
    length = request.headers.get("content-length", "")
    if request.method not in ("GET", "HEAD") and not (length.isdigit() and int(length) <= MOST_BYTES + FORM):
        return Response("too large", status_code=413)
    return await call_next(request)


def serve(desk: Desk, host: str, port: int, *, show: bool) -> None:
    """Serve the page until the process ends; on loopback it answers requests to this machine's own names alone."""
    app.middleware("http")(limit_bodies)
    if host in LOCAL:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL, "[::1]"])
    app.on_shutdown(lambda: shutil.rmtree(desk.folder, ignore_errors=True))
    ui.page("/")(lambda: Visit(desk=desk).build())
    ui.run(host=host, port=port, title="Mixing desk", dark=None, reload=False, show=show, reconnect_timeout=30)
