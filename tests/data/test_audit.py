"""What a check finds: in rows, between rows, between training and test; and the page of samples."""

import base64
import html
import importlib.util
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data.audit import DUPLICATE, LEAKS, LengthCheck, audit_source, find_leaks
from data.boxes import CODECS
from data.checks import BadSampleError
from data.collate import ChatCollator
from data.config import PromptConfig, SourceConfig
from data.readers.record import RecordDataset
from data.readers.table import open_records
from moa.analysis.preview_page import preview_page
from tests import ROOT
from tests.support.tiny import random_image, tiny_processor

COLLATE = ChatCollator(
    processor=tiny_processor(), tasks=["vqa"], experts=["one"], settings=PromptConfig(max_length=120),
    codec=CODECS["location_tokens"],
)  # fmt: skip


def row(number: int, **changes) -> dict:
    good = {"id": str(number), "image": f"{number % 3}.png", "question": "what?", "task": "vqa"}
    return good | {"answers": ["red"]} | changes


def data_set(folder: Path, rows: list[dict], name: str = "mine") -> RecordDataset:
    folder.mkdir(exist_ok=True)
    for number in range(3):
        random_image(number).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / "empty.png").write_bytes(b"")
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_records(SourceConfig(name=name, format="jsonl", path=str(file)), None, None)


BAD = [
    row(3, image="none.png"), row(4, image="broken.png"), row(5, image="empty.png"),
    row(6, task="cook"), row(7, question="why " * 90), row(8, question="<image> what?"),
    row(9, answers=[]), row(10, answers=[], boxes=[[0, 0, 50, 20]]), row(1), {"image": "0.png"},
]  # fmt: skip
FOUND = {
    "missing image": 1, "broken image": 2, "unknown task": 1, "too long": 1, DUPLICATE: 1,
    "image token in text": 1, "empty answer": 1, "box outside image": 1, "unreadable row": 1,
}  # fmt: skip


@pytest.mark.parametrize("workers", [1, 2])
def test_every_kind_of_bad_row_is_counted_with_its_first_example(tmp_path, workers, monkeypatch):
    monkeypatch.setattr("data.audit.CHUNK", 4)
    source = data_set(tmp_path, [*map(row, range(3)), *BAD])
    seen: list[int] = []
    audit = audit_source(source, "mine", COLLATE, workers=workers, advance=seen.append)
    assert {rule: finding.count for rule, finding in audit.found.items()} == FOUND
    assert audit.found["missing image"].examples[0].startswith(f"{tmp_path}/mine.jsonl:4: missing")
    assert "sample 7: too long" in audit.found["too long"].examples[0]
    assert "samples 2 and 12" in audit.found[DUPLICATE].examples[0]
    assert [e.partition(":")[2][:1] for e in audit.found["broken image"].examples] == ["5", "6"]
    assert seen == [4, 4, 4, 1] and audit.rows == 13 and sum(f.count for f in audit.found.values()) == 10


def test_a_clean_source_has_no_findings_and_a_limit_reads_no_further(tmp_path):
    source = data_set(tmp_path, [*map(row, range(5)), *BAD])
    audit = audit_source(source, "mine", COLLATE, limit=5)
    assert audit.found == {} and audit.rows == 5


def test_a_image_of_training_is_found_by_its_pixels_and_by_its_id(tmp_path):
    train = data_set(tmp_path / "train", [row(0), row(1)], "train")
    other = data_set(tmp_path / "test", [row(2), row(3, image_id="x"), row(4)], "test")
    (tmp_path / "test" / "1.png").write_bytes((tmp_path / "test" / "2.png").read_bytes())
    trained, held_out = (audit_source(s, s.source, COLLATE) for s in (train, other))
    find_leaks([trained], held_out)
    # row 3 has the pixels of 0.png under another id; row 4 the id of 1.png and other pixels
    assert {rule: f.count for rule, f in held_out.found.items()} == dict.fromkeys(LEAKS.values(), 1)
    assert "sample 2: " in held_out.found[LEAKS["contents"]].examples[0]
    assert "sample 3: " in held_out.found[LEAKS["image_ids"]].examples[0]
    assert "sample 1 of 'train'" in held_out.found[LEAKS["contents"]].examples[0]


def test_the_length_check_agrees_with_the_tokenizer_at_every_length(tmp_path):
    rows = [row(n, question="why is it so? " * n) for n in range(1, 14)]
    samples = [data_set(tmp_path, rows)[i] for i in range(13)]
    lengths = [COLLATE.num_tokens(sample) for sample in samples]
    for limit in (lengths[4] - 1, lengths[4], lengths[9] + 1):
        check = LengthCheck(replace(COLLATE, settings=PromptConfig(max_length=limit)))
        found = [check(sample) is not None for sample in samples]
        assert found == [length > limit for length in lengths]
        assert len(check.fixed) == 1  # one image size was encoded for its fixed part


def test_the_page_shows_pixels_boxes_words_and_supervised_tokens(tmp_path):
    boxed = row(0, answers=[], boxes=[[0, 0, 20, 15]], question="where <b>?",
                ocr=[{"text": "stop&go", "box": [20, 15, 40, 30]}])  # fmt: skip
    source = data_set(tmp_path, [boxed])
    bad = BadSampleError("rows.jsonl:3", "missing image", "a.png")
    page = preview_page([source[0], bad], COLLATE, "two samples")
    assert "rows.jsonl:3: missing image: a.png" in page
    assert "where &lt;b&gt;?" in page and "stop&amp;go" in page and "where <b>" not in page
    answers = re.findall(r'<span class="answer">(.*?)</span>', page)[1:]  # the legend's is first
    text = html.unescape("".join(answers)).strip()
    assert text == "<loc0000><loc0000><loc0016><loc0016></s>"
    assert '<span class="image">&lt;image&gt; x 4</span>' in page
    image = Image.open(io.BytesIO(base64.b64decode(re.findall(r"base64,(.*?)'", page)[0])))
    assert image.size == (336, 336)  # 28 pixels, enlarged 12 times
    assert image.getpixel((3, 100)) == (0, 158, 115)  # the true box, beside what the target says
    assert image.getpixel((168, 250)) == (0, 114, 178)  # the word's box


def script() -> object:
    spec = importlib.util.spec_from_file_location("data_script", ROOT / "scripts" / "data.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["data_script"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_settings_of_the_script_and_of_the_run_are_told_apart(tmp_path):
    read = script().read_settings
    settings, config, known = read(["source.path=a.jsonl", "workers=3", "prompt.max_length=99"])
    assert (settings.workers, config.prompt.max_length, known) == (3, 99, False)
    assert config.data.sources["source"].path == "a.jsonl"
    settings, config, known = read(["config=configs/demo.yaml", "only=[vqa]"])
    assert known and settings.only == ["vqa"] and len(config.data.sources) == 5
    for wrong in ([], ["config=configs/demo.yaml", "source.path=a.jsonl"]):
        with pytest.raises(ValueError, match="either config=FILE, that of a run, or source.path"):
            read(wrong)


@pytest.mark.slow
def test_check_exits_with_one_where_something_is_wrong_and_preview_writes_a_page(tmp_path, capsys):
    data_set(tmp_path, [*map(row, range(3)), row(2)])

    def run(*arguments: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as end:
            script().main(arguments)
        return end.value.code, "".join(capsys.readouterr())

    source = f"source.path={tmp_path}/mine.jsonl"
    code, said = run("check", source)
    assert code == 1 and "duplicate id" in said and "1 errors" in said
    assert run("check", source, "ignore=[duplicate id]")[0] == 0
    assert run("check", source, "limit=3")[0] == 0
    code, said = run("check", f"source.path={tmp_path}/none.jsonl")
    assert code == 2 and "none.jsonl: no such data file" in said
    for wrong in (
        "limit=-1",
        "workers=0",
        "ignore=[duplicte]",
        "only=[]",
    ):  # would check nothing, or too much
        assert run("check", source, wrong)[0] == 2
    out = tmp_path / "page.html"
    script().main(["preview", source, f"out={out}", "num_samples=2"])
    assert out.read_text().count("<section>") == 2


@pytest.mark.parametrize("show", [3, 9])
def test_check_shows_the_first_rows_of_each_reason_and_how_many_there_are(tmp_path, show):
    bad = [{"answers": 3}, {"colour": "red"}, {"task": 3}, {"image": "none.png"},
           {"answers": "red"}, {"boxes": [[0.1, 0.2, 0.5, 0.6]]}, {"answers": ["\ud800"]},
           {"boxes": [[0, 0, 10**400, 5]]}]  # fmt: skip
    data_set(tmp_path, [row(0), *(row(n, **wrong) for n, wrong in enumerate(bad, start=1))])
    settings, config, known = script().read_settings(
        [f"source.path={tmp_path}/mine.jsonl", f"show={show}", "progress=false"]
    )
    console = script().Console(file=io.StringIO(), soft_wrap=True)
    assert script().check(settings, config, known, console) == len(bad)
    said = console.file.getvalue()
    assert re.findall(r"mine\.jsonl:(\d): unreadable row: ", said) == [*"2346789"][:show]
    assert ("  ... 7 of 'source' in all: unreadable row (show=3)" in said) is (show == 3)


@pytest.mark.slow
def test_the_data_of_a_clip_is_checked_and_shown_too(tmp_path):
    page = tmp_path / "page.html"
    arguments = [
        "config=configs/clip_demo.yaml",
        "only=[kinds]",
        "limit=3",
        "num_samples=2",
        f"out={page}",
    ]
    settings, config, known = script().read_settings([*arguments, "progress=false"])
    console = script().Console(file=io.StringIO())
    assert script().check(settings, config, known, console) == 0
    script().preview(settings, config, known, console)
    assert "a kind of " in page.read_text() and page.read_text().count("<img") == 6  # of three sources
