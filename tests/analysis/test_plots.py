"""The pictures: what is drawn, from records small enough to know the answer."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from data.sample import OcrWord, Sample
from moa.analysis import gallery as cards
from moa.analysis import plots
from moa.benchmarks.scores import Response

ROUTING = {
    "experts": ["vqa", "caption"],
    "per_kind": {"vqa": [0.9, 0.1], "count": [0.5, 0.5]},
    "held_out": ["count"],
    "mutual_information": 0.4,
    "routing_accuracy": 0.75,
}


@pytest.fixture
def pages(monkeypatch):
    """The figures that were saved, to look into."""
    saved = []
    original = plots.Figure.savefig

    def keep(figure, path, **options):
        saved.append(figure)
        original(figure, path, **options)

    monkeypatch.setattr(plots.Figure, "savefig", keep)
    return saved


def words(figure):
    return [text.get_text() for text in figure.findobj(plots.matplotlib.text.Text)]


def card(score=1.0, reads=True, text="", box=(2.0, 3.0, 12.0, 13.0), gates=([0.25, 0.75],), **changes):
    values = {
        "id": "1", "image_id": "1", "image": Image.new("RGB", (40, 30)), "task": "grounding",
        "source": "grounding", "question": "where is the $5 note?", "answers": (),
        "boxes": ((2.0, 3.0, 12.0, 23.0),),
        "ocr": (OcrWord(text="EXIT", box=(5.0, 5.0, 9.0, 9.0), confidence=1.0),),
    }  # fmt: skip
    sample, seen = Sample(**{**values, **changes}), Image.new("RGB", (8, 8), "red")
    response = Response(sample=sample, text=text, box=box, gates=gates and [*gates])
    return cards.Card(image=seen, response=response, score=score, reads=reads)


def test_a_card_shows_both_boxes_in_original_pixels_the_words_and_the_gates(tmp_path, pages):
    cards.gallery(tmp_path / "samples.png", [card()], ["vqa", "grounding"], "Samples")
    picture, _, bars = pages[0].axes
    corners = [p.get_bbox().extents.tolist() for p in picture.patches]
    assert [2.0, 3.0, 12.0, 23.0] in corners and [2.0, 3.0, 12.0, 13.0] in corners
    assert [5.0, 5.0, 9.0, 9.0] in corners and picture.get_xlim() == (0, 40)
    assert [bar.get_width() for bar in bars.patches] == [0.25, 0.75]
    shown = words(pages[0])
    assert "✓ a box, IoU 0.50" in shown and "read: EXIT" in shown
    assert (tmp_path / "samples.png").stat().st_size > 5_000


def test_a_wrong_answer_is_shown_beside_the_true_one_and_missing_ocr_is_said(tmp_path, pages):
    wrong = card(answers=("cat", "a cat", "cat"), score=0.0, box=None, boxes=(), ocr=None, gates=None)
    cards.gallery(tmp_path / "samples.png", [wrong], ["vqa"], "Samples")
    shown = words(pages[0])
    assert {"✗ (nothing)", "true: cat / a cat", "no OCR was run"} <= set(shown)
    assert "gates differ by token" in shown


def test_a_model_that_reads_no_words_does_not_miss_them(tmp_path, pages):
    cards.gallery(tmp_path / "samples.png", [card(ocr=None, reads=False)], ["a", "b"], "Samples")
    assert "no OCR was run" not in words(pages[0])


def test_the_picture_is_the_one_that_reached_the_tower():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    pixels = (torch.from_numpy(np.array(image)) / 255 - torch.tensor(mean)) / torch.tensor(std)
    assert np.array_equal(cards.seen_image(pixels.permute(2, 0, 1), mean, std), image)


def test_the_heat_map_prints_every_gate_and_marks_held_out_tasks(tmp_path, pages):
    plots.gate_heat_map(tmp_path / "gates.png", ROUTING)
    shown = words(pages[0])
    assert {"0.90", "0.10", "0.50", "vqa", "count (held out)"} <= set(shown)
    assert any("0.40 bits" in text and "75%" in text for text in shown)


def test_the_heat_map_shows_what_is_left_to_the_null_expert(tmp_path, pages):
    rows = {"per_kind": {"vqa": [0.5, 1.0, 0.125]}}  # s is shared: its gate takes nothing of the routed ones
    routing = ROUTING | {"experts": ["a", "s", "b"], "choices": ["a", "b"]} | rows
    plots.gate_heat_map(tmp_path / "gates.png", routing, null_expert=True)
    assert {"none", "0.38"} <= set(words(pages[0]))


def test_sites_are_grouped_by_tower_and_layer():
    language, vision = "model.language_model.layers.3", "model.vision_tower.encoder.layers.0"
    sites = [f"{vision}.mlp.fc1", f"{language}.mlp.up_proj", f"{language}.self_attn.q_proj"]
    sites.append("model.multi_modal_projector.linear_1")
    groups = plots.layer_groups(sites)
    assert groups == {"vision 0": [0], "language 3": [1, 2], "multi_modal_projector": [3]}


def test_the_layer_map_averages_the_sites_of_a_layer_and_refuses_shared_gates(tmp_path, pages):
    sites = [f"model.language_model.layers.0.mlp.{name}" for name in ("up_proj", "down_proj")]
    per_site = {"vqa": [[1.0, 0.0], [0.5, 0.5]]}
    plots.layer_heat_map(tmp_path / "layers.png", {**ROUTING, "per_site": per_site}, sites)
    assert pages[0].axes[0].images[0].get_array().tolist() == [[0.75, 0.25]]
    with pytest.raises(ValueError, match="shared over sites"):
        plots.layer_heat_map(tmp_path / "layers.png", ROUTING, sites)


def test_the_running_mean_looks_back_only():
    assert plots.running_mean(np.array([2.0, 4.0, 6.0, 8.0]), 2).tolist() == [2.0, 3.0, 5.0, 7.0]


def test_losses_are_drawn_per_task_with_stages_named(tmp_path, pages):
    rows = [
        {"step": i, "stage": "experts" if i < 5 else "router", "loss/vqa": 2.0, "loss/caption": 1.0} for i in range(10)
    ]
    plots.loss_curves(tmp_path / "losses.png", [*rows, {"step": 10, "note": "no loss here"}])
    assert {"vqa 2.00", "caption 1.00", " experts", " router"} <= set(words(pages[0]))
    with pytest.raises(ValueError, match="no row with a loss per task"):
        plots.loss_curves(tmp_path / "losses.png", [{"step": 1}])


def test_a_board_shows_every_row_with_its_mean_and_its_words(tmp_path, pages):
    def row(about, value):
        means = {m: {"difference": value, "low": value - 2, "high": value + 1} for m in ("trained", "kept")}
        return {"about": about, "seeds": [0], "means": means, "means_by_seed": {m: [value / 100] for m in means}}

    rows = {"base": row("", 50.0), "lora": row("one LoRA", 61.5)}
    plots.board_chart(tmp_path / "board.png", {"title": "Together", "reference": "lora", "rows": rows})
    assert [axes.get_title("left") for axes in pages[0].axes] == ["trained", "kept"]
    assert {"  50.0", "  61.5"} <= set(words(pages[0]))
    assert [label.get_text() for label in pages[0].axes[0].get_yticklabels()] == ["base", "one LoRA"]


def test_a_log_may_end_in_half_a_line_but_not_hold_one(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"step": 1}) + '\n{"step":')
    assert plots.read_log(log) == [{"step": 1}]
    log.write_text('{"step":\n' + json.dumps({"step": 1}) + "\n")
    with pytest.raises(ValueError, match="log.jsonl:1: not JSON"):
        plots.read_log(log)
