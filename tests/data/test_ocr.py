import pickle
import shutil
import subprocess
import sys

import pytest
import yaml
from PIL import Image, ImageDraw, ImageFont

from data import ocr
from data.config import DataConfig, SourceConfig
from data.ocr import (
    OcrCache,
    build_cache,
    content_hash,
    merge_shards,
    read_table,
    shard_file,
    write_table,
)
from data.ocr_engines import ENGINES, RapidOcr, Tesseract, reading_order, split_line, tsv_words, widened
from data.ocr_images import source_images
from data.readers.table import open_records
from data.sample import OcrWord
from data.sources import open_sources
from moa.config import load_config
from scripts import ocr as script
from tests.support.toy import write_rows


def sign(text: str, size: tuple[int, int] = (192, 192)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=24)
    for row, line in enumerate(text.splitlines()):
        draw.text((20, 20 + 70 * row), line, fill="black", font=font)
    return image


class FakeEngine(RapidOcr):
    """Reads the colour of the first pixel; refuses pure red."""

    def read(self, image):
        red = image.getpixel((0, 0))[0]
        if red == 255:
            raise RuntimeError("engine failed")
        return (OcrWord(text=str(red), box=(0.0, 1.0, 2.0, 3.0), confidence=0.875),)


def plain(red: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (red, 0, 0))


class Broken:
    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 1:
            raise OSError("truncated")
        return plain(index)


@pytest.mark.slow
def test_the_engine_reads_rendered_words_in_reading_order_with_boxes_around_them():
    words = RapidOcr().read(sign("HELLO\ngood day"))
    assert [w.text for w in words] == ["HELLO", "good", "day"]
    hello, good, day = (w.box for w in words)
    assert 10 <= hello[0] <= 30 and hello[3] < good[1]
    assert good[2] < day[0] and good[1] == day[1]
    assert all(w.confidence > 0.8 for w in words)


def test_a_image_without_words_gives_an_empty_tuple():
    assert RapidOcr().read(Image.new("RGB", (192, 192), "white")) == ()


def test_narrow_images_are_widened_in_front_of_the_engine_and_others_are_not():
    sizes = {(1, 3000): (300, 3000), (3000, 3): (3000, 300), (300, 3000): (300, 3000), (20, 10): (20, 10)}
    assert {size: widened(Image.new("RGB", size)).size for size in sizes} == sizes
    assert widened(Image.new("RGB", (1, 20))).getpixel((0, 0)) == (0, 0, 0)  # added on the other side: boxes stay


@pytest.mark.slow
def test_lines_below_the_confidence_are_dropped():
    assert RapidOcr(min_confidence=1.0).read(sign("HELLO\ngood day")) == ()


def test_a_line_is_split_into_words_by_its_share_of_characters():
    words = split_line("ab  cde", (10.0, 5.0, 80.0, 15.0), 0.9)
    assert [(w.text, w.box) for w in words] == [
        ("ab", (10.0, 5.0, 30.0, 15.0)),
        ("cde", (50.0, 5.0, 80.0, 15.0)),
    ]


def test_boxes_are_read_by_rows_and_then_from_left_to_right():
    boxes = [(50, 12, 90, 22), (0, 40, 20, 50), (0, 10, 40, 20), (30, 39, 60, 49)]
    assert reading_order([tuple(map(float, b)) for b in boxes]) == [2, 0, 1, 3]


def test_the_hash_sees_pixels_and_size_and_not_the_file_or_mode():
    image = sign("HELLO")
    assert content_hash(image) == content_hash(image.convert("RGBA"))
    assert content_hash(image) != content_hash(sign("HELL0"))
    flat = Image.new("RGB", (2, 8)), Image.new("RGB", (8, 2))
    assert content_hash(flat[0]) != content_hash(flat[1])


@pytest.mark.slow
def test_cached_words_equal_the_live_reading(tmp_path):
    images, path = [sign("HELLO\ngood day"), sign("EXIT")], tmp_path / "ocr.parquet"
    report = build_cache(images, path, num_workers=2, progress=False)
    cache = OcrCache(path)
    assert (report.read, report.known, report.failed) == (2, 0, 0)
    assert [cache.get(p) for p in images] == [RapidOcr().read(p) for p in images]
    assert cache.get(sign("other")) is None


def test_a_cache_with_an_engine_reads_what_it_lacks_and_can_save_it(tmp_path):
    path = tmp_path / "live.parquet"
    live = OcrCache(path, engine=FakeEngine())
    assert live.get(plain(7))[0].text == "7"
    live.save()
    assert OcrCache(path).get(plain(7)) == live.get(plain(7))


def test_a_killed_build_goes_on_from_its_parts_to_the_same_file(tmp_path, monkeypatch):
    images = [plain(i) for i in range(7)]
    whole, killed = tmp_path / "whole.parquet", tmp_path / "killed.parquet"
    options = {"num_workers": 1, "part_size": 2, "engine": FakeEngine(), "progress": False}
    build_cache(images, whole, **options)

    read_one = ocr._read_one

    def dies(position, **shared):
        if position == 5:
            raise KeyboardInterrupt
        return read_one(position, **shared)

    monkeypatch.setattr(ocr, "_read_one", dies)
    with pytest.raises(KeyboardInterrupt):
        build_cache(images, killed, **options)
    monkeypatch.undo()
    assert not killed.exists()
    report = build_cache(images, killed, **options)
    assert (report.read, report.known) == (3, 4)
    assert killed.read_bytes() == whole.read_bytes()
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []


FAKE = {"num_workers": 1, "part_size": 2, "engine": FakeEngine(), "progress": False}
REDS = [3, 9, 3, 255, 7, 1, 9, 4, 5, 6]  # twice 3, twice 9, and one that cannot be read


def test_shards_of_several_machines_merge_to_the_file_of_one_even_after_a_kill(tmp_path, monkeypatch):
    images = [plain(red) for red in REDS]
    whole, path = tmp_path / "whole.parquet", tmp_path / "ocr.parquet"
    for file in (whole, path):
        build_cache([plain(6)], file, **FAKE)  # a file that is extended
    build_cache(images, whole, **FAKE)
    for index in (0, 1):
        build_cache(images, path, shard=(index, 3), **FAKE)

    read_one = ocr._read_one

    def dies(position, **shared):
        if position == 8:
            raise KeyboardInterrupt
        return read_one(position, **shared)

    with monkeypatch.context() as patch:
        patch.setattr(ocr, "_read_one", dies)
        with pytest.raises(KeyboardInterrupt):
            build_cache(images, path, shard=(2, 3), **FAKE)
    with pytest.raises(ValueError, match=r"ocr.2-of-3.parquet: missing; --shard 2/3 makes it"):
        merge_shards(path, 3)
    assert build_cache(images, path, shard=(2, 3), **FAKE).known == 2  # from its saved part
    merge_shards(path, 3)
    assert path.read_bytes() == whole.read_bytes()
    report = build_cache(images, path, shard=(0, 2), **FAKE)
    assert (report.read, report.known) == (0, 5)
    report = build_cache(images, path, shard=(1, 2), **FAKE)
    assert report.failures == {"RuntimeError: engine failed": [3]}  # its place among all images


def test_shards_that_do_not_belong_together_are_refused(tmp_path):
    path, word = tmp_path / "ocr.parquet", OcrWord(text="x", box=(0.0, 0.0, 1.0, 1.0), confidence=1)
    write_table(shard_file(path, 0, 2), {"a": ()}, {"engine": "one"})
    write_table(shard_file(path, 1, 2), {"a": (word,)}, {"engine": "one"})
    with pytest.raises(ValueError, match=r"1-of-2.parquet: has other words .* for image a"):
        merge_shards(path, 2)
    write_table(shard_file(path, 1, 2), {"a": ()}, {"engine": "two"})
    with pytest.raises(ValueError, match=r"1-of-2.parquet: engine is 'two' in this cache and 'one'"):
        merge_shards(path, 2)
    assert not path.exists()


def test_the_command_reads_shards_and_merges_them(tmp_path, monkeypatch, capsys):
    for number in range(5):
        plain(number).save(tmp_path / f"{number}.png")
    monkeypatch.setitem(ENGINES, "rapidocr", FakeEngine)
    out, folder = f"out={tmp_path / 'ocr.parquet'}", f"folder={tmp_path}"
    said = []
    for what in ([folder, "shard=0/2"], [folder, "shard=1/2"], ["merge=2"]):
        with pytest.raises(SystemExit, match="0"):
            script.main([out, "workers=1", *what])
        said.append(capsys.readouterr().out)
    assert "ocr.0-of-2.parquet: 3 images" in said[0] and "read 2, known" in said[1]
    assert "ocr.parquet: 5 images" in said[2] and len(OcrCache(tmp_path / "ocr.parquet")) == 5
    with pytest.raises(SystemExit):
        script.main([out, folder, "shard=2/2"])
    assert "write I/N with 0 <= I < N" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main([out, "merge=2", "shard=1/2"])
    assert "shard: has no effect without an engine" in capsys.readouterr().err


def test_failures_are_counted_by_reason_and_the_other_images_are_read(tmp_path):
    path = tmp_path / "ocr.parquet"
    report = build_cache(Broken(), path, num_workers=1, engine=FakeEngine(), progress=False)
    assert report.failures == {"OSError: truncated": [1]} and report.read == 2
    report = build_cache([plain(255), plain(9)], path, num_workers=1, engine=FakeEngine(), progress=False)
    assert report.failures == {"RuntimeError: engine failed": [0]}
    assert len(OcrCache(path)) == 3


def test_mixing_settings_in_one_file_is_refused_by_name(tmp_path):
    path = tmp_path / "ocr.parquet"
    write_table(path, {}, FakeEngine(min_confidence=0.5).settings)
    with pytest.raises(ValueError, match="min_confidence is 0.5 in this cache and 0.9 here"):
        OcrCache(path, engine=FakeEngine(min_confidence=0.9))
    with pytest.raises(ValueError, match="limit_side_len"):
        build_cache([plain(1)], path, engine=FakeEngine(limit_side_len=100), progress=False)


def test_missing_and_broken_cache_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none.parquet: no such OCR cache"):
        OcrCache(tmp_path / "none.parquet")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"broken.parquet: not a readable Parquet file"):
        OcrCache(broken)


def test_three_thousand_rows_stay_under_a_megabyte(tmp_path):
    word = OcrWord(text="station", box=(12.0, 100.0, 80.0, 120.0), confidence=0.987)
    table = {content_hash(Image.new("RGB", (i, 1))): (word,) for i in range(1, 3001)}
    path = tmp_path / "ocr.parquet"
    write_table(path, table, {})
    assert path.stat().st_size < 500_000
    assert read_table(path)[0] == table


@pytest.mark.slow
def test_the_command_reads_a_folder_and_names_a_truncated_image(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    sign("EXIT").save(folder / "exit.png")
    data = (folder / "exit.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    out = tmp_path / "ocr.parquet"
    command = [sys.executable, "-m", "scripts.ocr", f"out={out}", f"folder={folder}", "workers=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "failed 1" in done.stdout and "cut.png" in done.stdout
    assert [w.text for w in OcrCache(out).get(sign("EXIT"))] == ["EXIT"]


@pytest.mark.slow
def test_the_command_says_what_is_wrong_with_an_empty_folder(tmp_path):
    command = [sys.executable, "-m", "scripts.ocr", "out=x.parquet", f"folder={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no image files" in done.stderr


TABLE = """level\tpage_num\tblock_num\tpar_num\tline_num\tword_num\tleft\ttop\twidth\theight\tconf\ttext
1\t1\t0\t0\t0\t0\t0\t0\t192\t192\t-1\t
4\t1\t1\t1\t1\t0\t20\t28\t90\t18\t-1\t
5\t1\t1\t1\t1\t1\t20\t28\t90\t18\t95.843750\tHE"LO
5\t1\t1\t1\t2\t1\t20\t98\t60\t18\t31.5\t 
"""


def test_tesseracts_table_becomes_words_with_boxes_and_confidences():
    assert tsv_words(TABLE) == (OcrWord(text='HE"LO', box=(20.0, 28.0, 110.0, 46.0), confidence=0.958),)


def test_a_missing_tesseract_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="apt install tesseract-ocr"):
        Tesseract()


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="tesseract is not installed")
def test_tesseract_reads_rendered_words_in_reading_order():
    engine = Tesseract()
    words = engine.read(sign("HELLO\ngood day"))
    assert [w.text for w in words] == ["HELLO", "good", "day"]
    assert words[0].box[3] < words[1].box[1] and words[1].box[2] < words[2].box[0]
    assert engine.settings["version"][0].isdigit()


def test_the_images_of_a_data_set_are_read_once_each(tmp_path):
    for red, name in ((7, "a"), (9, "b")):
        plain(red).save(tmp_path / f"{name}.png")
    rows = [{"image": f"{name}.png", "question": f"{i}?", "task": "vqa", "answers": ["x"]}
            for i, name in enumerate(("a", "b", "a", "nowhere"))]  # fmt: skip
    file = write_rows(tmp_path / "rows.jsonl", rows)
    source = {"format": "jsonl", "path": str(file)}
    scenes = {"task": "vqa", "num_samples": 3}
    config = {"experts": {"one": {}}, "data": {"sources": {"mine": source, "scenes": scenes}}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    images = source_images(load_config(tmp_path / "run.yaml"), None)
    assert len(images) == 3 and len(pickle.loads(pickle.dumps(images))) == 3
    options = {"num_workers": 1, "engine": FakeEngine(), "progress": False}
    report = build_cache(images, tmp_path / "words.parquet", **options)
    assert (report.read, report.failed) == (2, 1)
    assert "rows.jsonl:4: missing image" in next(iter(report.failures))
    cached = OcrCache(tmp_path / "words.parquet")
    dataset = open_records(SourceConfig(**source), None, cached)
    assert [dataset[i].ocr[0].text for i in range(3)] == ["7", "9", "7"]
    with pytest.raises(ValueError, match="source: name one of mine"):
        source_images(load_config(tmp_path / "run.yaml"), "your")


def test_a_source_may_have_its_own_cache(tmp_path):
    plain(7).save(tmp_path / "a.png")
    build_cache([plain(7)], tmp_path / "words.parquet", num_workers=1, engine=FakeEngine())
    row = {"image": "a.png", "question": "?", "task": "vqa", "answers": ["x"]}
    path = str(write_rows(tmp_path / "rows.jsonl", [row]))
    sources = [SourceConfig(name="own", format="jsonl", path=path,
                            ocr_cache=str(tmp_path / "words.parquet")),
               SourceConfig(name="none", format="jsonl", path=path)]  # fmt: skip
    opened = open_sources(sources, DataConfig(), None)
    assert [word.text for word in opened["own"][0].ocr] == ["7"]
    assert opened["none"][0].ocr is None
