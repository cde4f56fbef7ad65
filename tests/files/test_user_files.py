"""What users' own files hold that no published one does: the right sample, or one line that names the place."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import SourceConfig
from data.ocr import OcrCache, content_hash, write_table
from data.ocr_images import folder_images
from data.readers.record import RecordDataset, clipped
from data.readers.table import open_records
from data.sample import OcrWord
from tests.data.test_readers import error_of, no_caches, opened, written  # noqa: F401 - a fixture
from tests.support.formats import dump, dump_lines, image_bytes, write_image
from tests.support.tiny import random_image

ROW = {"image": "a.png", "question": "q", "task": "vqa", "answers": ["a"]}
TURNS = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]


def said_of(dataset: RecordDataset, index: int = 0) -> str:
    """The one line about a row that is refused."""
    said = str(error_of(dataset, index))
    assert "\n" not in said and said.isprintable(), said
    return said


# --- cells of tables ------------------------------------------------------------------------------


def table(folder: Path, content: str, name: str = "t.csv", **changes) -> RecordDataset:
    (folder / name).write_text(content, encoding="utf-8")
    write_image(folder / "a.png")
    return opened("table", folder, path=name, **{"columns": None, "images": ".", **changes})


@pytest.mark.parametrize("cell", ["007", "1.50", "3.0", "None", "NA", "n/a", "null", "nan", "True", "1e5",
                                  "2020-01-01", "-", "é", "a\u2028b", '"a, ""b""\nc"'])  # fmt: skip
def test_a_cell_of_a_csv_is_read_as_it_is_written(cell, tmp_path):
    rows = table(tmp_path, f"id,image,question,answers\n001,a.png,q,{cell}\n002,a.png,q,\n")
    written = 'a, "b"\nc' if cell.startswith('"') else cell
    assert [(rows[i].id, rows[i].answers) for i in (0, 1)] == [("001", (written,)), ("002", ())]


def test_a_csv_of_windows_is_read_with_its_boxes_and_their_frame(tmp_path):
    rows = table(
        tmp_path,
        "\ufeffimage,question,task,boxes,frame\r\n\r\n"
        'a.png,q,grounding,"[[1, 2, 3, 4.5]]",\r\na.png,q,grounding,"[[0, 0, 0.5, 1]]","[1, 1]"\r\n',
    )
    assert [rows[i].boxes for i in (0, 1)] == [((1, 2, 3, 4.5),), ((0, 0, 20, 30),)]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "t.csv: holds no header line"),
        ("a,b,a\n1,2,3\n", "t.csv: has the column 'a' twice"),
        ("image,question\n", "holds no rows"),
        ("image\rquestion\n", "t.csv:1: not CSV: new-line character"),
    ],
)
def test_a_csv_that_is_no_table_is_named(content, complaint, tmp_path):
    with pytest.raises(ValueError, match=r"data\.sources\.mine: .*") as error:
        table(tmp_path, content)
    assert complaint in str(error.value)


@pytest.mark.parametrize("name", ["Image", "img", "image_path", "File_Name", "filepath", " image"])
def test_a_column_of_images_that_nothing_reads_is_refused(name, tmp_path):
    rows = f"id,{name},question,answers\n1,a.png,q,red\n"
    with pytest.raises(ValueError, match=r"columns: .*" + name.strip()):
        table(tmp_path, rows)
    columns = {"image": name, "question": "question"}
    assert table(tmp_path, rows, columns=columns)[0].image is not None


def test_a_column_image_beside_named_columns_that_leave_it_out_is_refused(tmp_path):
    rows, columns = ("image,query,answers\na.png,q,red\n", {"question": "query", "answers": "answers"})
    with pytest.raises(ValueError, match=r"name it as columns\.image=image"):
        table(tmp_path, rows, columns=columns)
    named = table(tmp_path, rows, columns=columns | {"image": "image"})
    assert named[0].image is not None


@pytest.mark.parametrize("name", ["Answers", "answers ", "QUESTION"])
def test_a_column_that_is_a_field_but_for_its_case_or_blanks_is_named(name, tmp_path):
    with pytest.raises(ValueError, match=r"columns: .*rename it, or name the columns"):
        table(tmp_path, f"image,{name}\na.png,q\n")


def test_a_table_of_text_alone_is_read_and_an_ending_may_be_in_capitals(tmp_path):
    rows = table(tmp_path, "question,answers,source\nq,007,web\n", name="t.CSV")
    assert (rows[0].image, rows[0].answers) == (None, ("007",))


@pytest.mark.parametrize(
    "cell", ['["red", "blue"]', "['red', 'blue']", '[{"answer": "red", "id": 1}]', "{'answer': 'red'}"]
)
@pytest.mark.parametrize("name", ["t.csv", "t.json"])
def test_a_list_of_answers_written_as_text_is_refused(cell, name, tmp_path):
    quoted = cell.replace('"', '""')
    rows = f'image,question,answers\na.png,q,"{quoted}"\n'
    if name == "t.json":
        rows = json.dumps([{"image": "a.png", "question": "q", "answers": cell}])
    said = said_of(table(tmp_path, rows, name=name))
    assert "'answers'" in said and "a list or an object written as text" in said


@pytest.mark.parametrize("cell", ["[0.1, 0.2]", "[]", "[1] red", '{"total": 3}', "{", "[red", "[" * 100_000])
def test_other_answers_with_brackets_are_learned_as_written(cell, tmp_path):
    rows = json.dumps([{"image": "a.png", "question": "q", "answers": cell}])
    assert table(tmp_path, rows, name="t.json")[0].answers == (cell,)


def test_an_image_name_that_the_system_refuses_is_a_bad_sample(tmp_path):
    rows = table(tmp_path, f"image,question,answers\n{'a' * 5000},q,red\na.png,q,red\n")
    assert "missing image" in said_of(rows)
    assert rows[1].image is not None


def test_a_broken_row_of_a_csv_leaves_the_others(tmp_path):
    write_image(tmp_path / "a.png")
    lines = [b"image,question,answers", b"a.png,q,good", b"a.png,caf\xe9,x", b"a.png,q",
             b'a.png,q,"5" inch', b"a.png,q,good", b'a.png,q,"open']  # fmt: skip
    (tmp_path / "t.csv").write_bytes(b"\n".join(lines))
    rows = opened("table", tmp_path, path="t.csv", columns=None, images=".")
    assert rows[0].answers == rows[4].answers == ("good",)
    assert "t.csv: row 2: unreadable row: not UTF-8" in said_of(rows, 1)
    assert "row 3: unreadable row: has 2 cells, and the header 3" in said_of(rows, 2)
    assert "row 4: unreadable row: not CSV" in said_of(rows, 3)
    assert "row 6: unreadable row: not CSV: unexpected end" in said_of(rows, 5)


OBJECTS = {
    "objects": ([{"answer": "red", "answer_confidence": "yes"}, {"answer": "blue"}], ("red", "blue")),
    "one object": ({"text": ["red"], "answer_start": [3]}, ("red",)),
    "numbers": ([7, "red"], ("7", "red")),
    "a long number": (12345678901234567890123, ("12345678901234567890123",)),
    "nothing": (None, ()),
    "two texts": ([{"answer": "red", "text": "blue"}], "object with answer, text; exactly one of"),
    "no text": ({"colour": "red"}, "object with colour; exactly one of answer, text"),
    "a float": ([1.0], "'answers' holds 1.0 (float); only texts and whole numbers are read"),
    "a truth value": (True, "'answers' holds True (bool)"),
    "nothing in a list": (["red", None], "'answers' holds None (NoneType)"),
    "lists in lists": ([["red"]], "'answers' holds ['red'] (list)"),
    "an object of an object": ([{"answer": {"text": "red"}}], "(dict)"),
}


# a column of Arrow has one type
CELLS = [(name, suffix) for name in OBJECTS for suffix in ("parquet", "jsonl", "json")
         if suffix != "parquet" or name not in ("numbers", "a long number")]  # fmt: skip


@pytest.mark.parametrize(("name", "suffix"), CELLS)
def test_a_cell_is_text_or_is_refused_by_its_column_and_type(name, suffix, tmp_path):
    cell, right = OBJECTS[name]
    row, file = {"image": "a.png", "question": "q", "answers": cell}, f"t.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / file)
    else:
        (tmp_path / file).write_text(json.dumps([row] if suffix == "json" else row))
    write_image(tmp_path / "a.png")
    rows = opened("table", tmp_path, path=file, columns=None, images=".")
    if isinstance(right, tuple):
        assert rows[0].answers == right
    else:
        assert right in said_of(rows) and "unreadable row" in said_of(rows)


@pytest.mark.slow
def test_a_date_in_a_json_table_stays_text_and_a_column_may_appear_later(tmp_path):
    first = {"image": "a.png", "question": "2020-01-01", "answers": "2020-01-01T00:00:00"}
    dump(tmp_path / "t.json", [first, {**first, "id": "007", "boxes": [[1, 2, 3, 4]]}])
    write_image(tmp_path / "a.png")
    rows = opened("table", tmp_path, path="t.json", columns=None, images=".")
    assert (rows[0].question, rows[0].answers) == ("2020-01-01", ("2020-01-01T00:00:00",))
    assert (rows[1].id, rows[1].boxes) == ("007", ((1, 2, 3, 4),))


@pytest.mark.parametrize("wrong", [{"question": {"a": 1}}, {"question": ["q"]}, {"task": ["vqa"]},
                                   {"id": 1.5}, {"boxes": 3}, {"boxes": "[[1, 2"}, {"frame": [1]}])  # fmt: skip
def test_every_other_cell_of_a_table_is_checked_too(wrong, tmp_path):
    dump(tmp_path / "t.json", [{**ROW, **wrong}])
    write_image(tmp_path / "a.png")
    rows = opened("table", tmp_path, path="t.json", columns=None, images=".")
    assert next(iter(wrong)) in said_of(rows) and "t.json: [0]: unreadable row" in said_of(rows)


def test_class_labels_in_a_list_become_names_and_images_in_a_list_stay_as_they_are_stored(tmp_path):
    import datasets

    labels = datasets.List(datasets.ClassLabel(names=["cat", "dog"]))
    images = datasets.List(datasets.Image())
    messages = [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}]
    values = {"question": ["q"], "answers": [[1, 0]], "messages": [messages],
              "images": [[{"bytes": image_bytes(), "path": None}]]}  # fmt: skip
    found = datasets.Dataset.from_dict(values)
    found.cast_column("answers", labels).cast_column("images", images).to_parquet(tmp_path / "t.parquet")
    assert opened("table", tmp_path, path="t.parquet", columns={"question": "question", "answers": "answers"})[
        0
    ].answers == ("dog", "cat")
    assert opened("messages", tmp_path, path="t.parquet", images=None)[0].size == (40, 30)


@pytest.mark.parametrize("images", [None, "images"])
def test_a_path_in_a_cell_of_a_table_follows_the_rule_of_every_format(images, tmp_path):
    write_image(tmp_path / "secret.png")
    write_image(tmp_path / "images/a.png")
    cells = [str(tmp_path / "secret.png"), "../secret.png", "a.png", str(tmp_path / "images/a.png")]
    rows = [{"image": {"bytes": None, "path": cell}, "question": "q"} for cell in cells]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = opened("table", tmp_path, path="t.parquet", columns=None, images=images)
    if images is None:
        assert "set the source's `images`" in said_of(found)
        return
    assert "image outside folder" in said_of(found, 0) and "`images: /`" in said_of(found, 0)
    assert "image outside folder" in said_of(found, 1)
    assert found[2].size == found[3].size == (40, 30)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:99], lambda b: b"PAR1" + b[4:-20]])
def test_a_table_that_datasets_cannot_read_is_one_line(damage, tmp_path):
    folder = written("table", tmp_path / "data")
    file = folder / "rows.parquet"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"rows\.parquet: no data set that can be read: ") as error:
        opened("table", folder)
    assert "\n" not in str(error.value)


def test_a_folder_of_csv_files_is_refused_with_a_way_out(tmp_path):
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone/train.csv").write_text("question,answers\nq,007\n")
    with pytest.raises(ValueError, match="clone: holds CSV files, .*; give the path of one"):
        opened("table", tmp_path, path="clone", split="train", columns=None)


# --- conversations --------------------------------------------------------------------------------


def conversation(folder: Path, row: dict[str, Any], name: str = "llava") -> RecordDataset:
    dump(folder / "c.json", [{"image": "a.png", **row}])
    write_image(folder / "images/a.png")
    return opened(name, folder, path="c.json", images="images")


def test_a_system_text_beside_the_conversation_is_read(tmp_path):
    row = {"conversations": TURNS, "system": "Answer in French."}
    assert conversation(tmp_path, row)[0].system == "Answer in French."
    first = {"from": "system", "value": "Answer in French."}
    row["conversations"] = [first, *TURNS]
    assert conversation(tmp_path, row)[0].system == "Answer in French."


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"system": "x", "conversations": [{"from": "system", "value": "y"}, *TURNS]}, "or two"),
        ({"conversations": [*TURNS, {"from": "system", "value": "y"}]}, "in the row's `system`"),
        ({"system": 3}, "'system' must be text, got 3"),
        ({"tools": '[{"name": "f"}]'}, "has 'tools'"),
        ({"label": False}, "has 'label': False"),
        ({"videos": ["v.mp4"]}, "has 'videos'"),
        ({"rejected_response": "b"}, "has 'rejected_response': 'b', which is not read and changes"),
        ({"rejected": {"from": "gpt", "value": "b"}}, "has 'rejected'"),
        ({"history": [["q", "a"]]}, "has 'history'"),
        ({"System": "Answer in French."}, "has 'System': 'Answer in French.', which is not read"),
        ({"Tools": [1]}, "has 'Tools'"),
        ({"conversations": [TURNS[0], {**TURNS[1], "loss": False}]}, "has 'loss': False"),
        ({"conversations": [TURNS[0], {**TURNS[1], "weight": 0}]}, "has 'weight': 0"),
        ({"conversations": [TURNS[0], {**TURNS[1], "tool_calls": [1]}]}, "has 'tool_calls'"),
        ({"image": "http://x.org/a.png"}, "names an image by its URL"),
        ({"image": "/a.png"}, "`images: /` accepts every absolute name"),
    ],
)
def test_what_changes_the_meaning_of_a_conversation_is_named(row, complaint, tmp_path):
    assert complaint in said_of(conversation(tmp_path, {"conversations": TURNS, **row}))


def test_keys_that_change_nothing_are_left_out(tmp_path):
    extra = {"model": "gpt-4", "source": "coco", "tools": "", "videos": [], "rejected": None}
    turns = [TURNS[0], {**TURNS[1], "loss": True, "weight": 1}]
    assert conversation(tmp_path, {"conversations": turns, **extra})[0].answers == ("a",)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image", "image": "file://{}/images/a.png"},
        {"type": "image", "image": "{}/images/a.png"},
    ],
)
def test_an_image_that_a_message_names_itself_is_read(part, tmp_path):
    part = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in part.items()}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "q"}]},
                {"role": "assistant", "content": "a"}]  # fmt: skip
    sample = conversation(tmp_path, {"image": None, "messages": messages}, "messages")[0]
    assert (sample.size, sample.question) == ((40, 30), "q")
    twice = said_of(conversation(tmp_path, {"messages": messages}, "messages"))
    assert "names images in the row and in its messages" in twice


@pytest.mark.parametrize("content", [json.dumps([ROW]), json.dumps(ROW, indent=1)])
def test_a_jsonl_that_is_a_list_or_printed_prettily_is_told_its_form(content, tmp_path):
    (tmp_path / "x.jsonl").write_text(content)
    said = said_of(opened("jsonl", tmp_path, path="x.jsonl"))
    assert "x.jsonl:1: unreadable row" in said and "one object a line" in said


# --- files and folders ----------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_only_a_line_feed_ends_a_line(mark, tmp_path):
    write_image(tmp_path / "a.jpg")
    for file, bom in (("f.token", ""), ("g.token", "\ufeff")):
        text = f"{bom}a.jpg#0\tA dog{mark}runs .\r\na.jpg#1\tA cat .\n"
        (tmp_path / file).write_bytes(text.encode())
        rows = opened("flickr30k", tmp_path, path=file, images=".")
        assert len(rows) == 1 and rows[0].answers == (f"A dog{mark}runs .", "A cat .")
    folder = written("flickr30k_entities", tmp_path / "entities")
    sentences = folder / "Sentences/1000092795.txt"
    sentences.write_text(f"\ufeffA{mark} b [/EN#1/people Two{mark}guys] .\n", encoding="utf-8")
    rows = opened("flickr30k_entities", folder)
    assert len(rows) == 1 and f"Two{mark}guys" in rows[0].question
    for rows in (dump_of(tmp_path, f"q{mark}q"), table(tmp_path, f"image,question\na.png,q{mark}q\n")):
        assert len(rows) == 1 and rows[0].question == f"q{mark}q"


def dump_of(folder: Path, question: str) -> RecordDataset:
    write_image(folder / "a.png")
    row = json.dumps({**ROW, "question": question}, ensure_ascii=False)
    (folder / "x.jsonl").write_text(f"\ufeff{row}\r\n", encoding="utf-8")
    return opened("jsonl", folder, path="x.jsonl")


def test_hidden_files_and_folders_are_left_out(tmp_path):
    names = ["cat/1.png", "dog/1.png", ".ipynb_checkpoints/1.png", "__MACOSX/1.png", "cat/._1.png"]
    for name in names:
        write_image(tmp_path / ".data" / name)  # a folder above may be hidden
    assert opened("image_folder", tmp_path, path=".data")[0].choices == ("cat", "dog")
    assert len(opened("image_folder", tmp_path, path=".data")) == 2
    assert [f.parent.name for f in folder_images(tmp_path / ".data").items] == ["cat", "dog"]
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name in ("./1.png", "._1.png", "__MACOSX/._1.png", ".DS_Store"):
            archive.add(tmp_path / ".data/cat/1.png", name)
        (tmp_path / "1.txt").write_text("a cat")
        archive.add(tmp_path / "1.txt", "./1.txt")
    shards = opened("webdataset", tmp_path, path="0.tar")
    assert len(shards) == 1 and shards[0].answers == ("a cat",)


def test_a_file_with_holes_in_a_shard_is_a_bad_sample(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name in ("0.png", "1.png", "1.txt", "2.png"):
            member = tarfile.TarInfo(name)
            if name == "1.png":
                member.type = tarfile.GNUTYPE_SPARSE
            archive.addfile(member)
    content = bytearray((tmp_path / "0.tar").read_bytes())
    at = content.index(b"1.png")
    content[at + 483 : at + 495] = b"\x80" + (5 * 10**12).to_bytes(11, "big")  # its size, expanded
    header = bytes(content[at : at + 148]) + b" " * 8 + bytes(content[at + 156 : at + 512])
    content[at + 148 : at + 156] = f"{sum(header):06o}\0 ".encode()
    (tmp_path / "0.tar").write_bytes(content)
    said = said_of(opened("webdataset", tmp_path, path="0.tar"), 1)
    assert "0.tar: 1: unreadable row: 1.png is sparse" in said


# --- what no text or number may be ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["id", "image_id", "image", "question", "answers", "task", "tags"])
def test_half_a_character_is_refused_in_every_text_of_a_row(name, tmp_path):
    value = ["\ud800"] if name in ("answers", "tags") else "\ud800"
    dump_lines(tmp_path / "x.jsonl", [{**ROW, name: value}, ROW])
    write_image(tmp_path / "a.png")
    rows = opened("jsonl", tmp_path, path="x.jsonl")
    assert "x.jsonl:1: unreadable row" in said_of(rows) and name in said_of(rows)
    assert rows[1].question == "q"


WRONG_WORDS = [{"box": [float("nan"), 0, 5, 5]}, {"box": [0, 0, float("inf"), 5]}, {"confidence": 1e39},
               {"confidence": float("nan")}, {"confidence": -0.1}, {"confidence": 97}]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_WORDS)
def test_an_ocr_word_that_is_not_finite_is_a_bad_sample(wrong, tmp_path):
    word = {"text": "hi", "box": [0, 0, 5, 5], "confidence": 0.5}
    dump_lines(tmp_path / "x.jsonl", [{**ROW, "ocr": [word]}, {**ROW, "ocr": [word | wrong]}])
    write_image(tmp_path / "a.png")
    rows = opened("jsonl", tmp_path, path="x.jsonl")
    assert rows[0].ocr and error_of(rows, 1).rule == "broken OCR word"
    assert f"x.jsonl:2: broken OCR word: 'hi': {next(iter(wrong))} must" in said_of(rows, 1)


@pytest.mark.parametrize("wrong", WRONG_WORDS)
def test_a_word_of_a_cache_that_is_not_finite_is_a_bad_sample(wrong, tmp_path):
    write_image(tmp_path / "a.png")
    dump_lines(tmp_path / "x.jsonl", [ROW])
    word = {"text": "hi", "box": (0.0, 0.0, 5.0, 5.0), "confidence": 0.5}
    key = content_hash(random_image(0, 40, 30))
    write_table(tmp_path / "o.parquet", {key: (OcrWord(**word),)}, {"engine": "x"})
    source = SourceConfig(name="mine", format="jsonl", path=str(tmp_path / "x.jsonl"))
    assert open_records(source, None, OcrCache(tmp_path / "o.parquet"))[0].ocr
    found = pq.read_table(tmp_path / "o.parquet")
    row = found.to_pylist()[0] | {f"{k}s" if k == "confidence" else "boxes": [v] for k, v in wrong.items()}
    damaged = pa.Table.from_pylist([row]).replace_schema_metadata(found.schema.metadata)
    pq.write_table(damaged, tmp_path / "o.parquet")
    said = said_of(open_records(source, None, OcrCache(tmp_path / "o.parquet")))
    assert "x.jsonl:1: broken OCR word: 'hi'" in said


@pytest.mark.parametrize("cells", [{"words": [None]}, {"boxes": [[1.0, 2.0, 3.0]]}, {"boxes": [None]},
                                   {"confidences": [None]}, {"words": ["a", "b"]}])  # fmt: skip
def test_a_cache_whose_words_are_damaged_is_named_with_its_row(cells, tmp_path):
    write_table(tmp_path / "o.parquet", {}, {"engine": "x"})
    row = {"hash": "k", "words": ["a"], "boxes": [[1.0, 2.0, 3.0, 4.0]], "confidences": [0.5]} | cells
    metadata = pq.read_table(tmp_path / "o.parquet").schema.metadata
    damaged = pa.Table.from_pylist([row]).replace_schema_metadata(metadata)
    pq.write_table(damaged, tmp_path / "o.parquet")
    with pytest.raises(ValueError, match=r"o\.parquet: row 1: not the words of an image"):
        OcrCache(tmp_path / "o.parquet")


def test_a_box_that_is_cut_is_finite():
    nan, inf = float("nan"), float("inf")
    assert clipped((nan, -inf, inf, nan), (40, 30)) == (0, 0, 40, 0)


@pytest.mark.parametrize("boxes", [[[0.1, 0.2, 0.5, 0.6]], [[0, 0, 1, 1], [0.5, 0.5, 1, 1]]])
@pytest.mark.parametrize("key", ["boxes", "ocr"])
def test_boxes_as_shares_are_refused_unless_the_row_says_so(boxes, key, tmp_path):
    value = boxes if key == "boxes" else [{"text": "hi", "box": box} for box in boxes]
    rows = [{**ROW, key: value}, {**ROW, key: value, "frame": [1, 1]}]
    dump_lines(tmp_path / "x.jsonl", rows)
    write_image(tmp_path / "a.png")
    data = opened("jsonl", tmp_path, path="x.jsonl")
    assert "boxes are read in pixels" in said_of(data) and "`frame`: [1, 1]" in said_of(data)
    found = data[1].boxes if key == "boxes" else tuple(word.box for word in data[1].ocr)
    right = [tuple(edge * side for edge, side in zip(box, (40, 30, 40, 30), strict=True)) for box in boxes]
    assert found == tuple(pytest.approx(box) for box in right)


@pytest.mark.parametrize("number", [10**400, -(10**400)])
def test_a_number_of_400_digits_is_a_bad_sample(number, tmp_path):
    dump_lines(tmp_path / "x.jsonl", [{**ROW, "boxes": [[0, 0, number, 5]]}, ROW])
    write_image(tmp_path / "a.png")
    assert "a box is four numbers" in said_of(opened("jsonl", tmp_path, path="x.jsonl"))


@pytest.mark.parametrize("side", [0, -5, 10**400])
def test_an_image_of_coco_without_a_size_is_a_bad_sample(side, tmp_path):
    folder = written("refcoco", tmp_path / "data")
    value = json.loads((folder / "instances.json").read_text())
    value["images"][0]["width"] = side
    dump(folder / "instances.json", value)
    assert "refs(unc).p: [1].sentences[0]: unreadable row" in said_of(opened("refcoco", folder))


def test_json_of_endless_brackets_in_a_shard_is_a_bad_sample(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        (tmp_path / "1.json").write_text("[" * 200_000)
        write_image(tmp_path / "1.png")
        archive.add(tmp_path / "1.png", "1.png")
        archive.add(tmp_path / "1.json", "1.json")
    said = said_of(opened("webdataset", tmp_path, path="0.tar"))
    assert "0.tar: 1: unreadable row" in said and len(said) < 400
