"""Rows by byte offset: equal to what json reads, kept between runs, and never the whole file in memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.checks import BadSampleError
from data.readers import index, rows
from data.readers.rows import JsonLines, JsonRows, json_rows
from tests import ROOT

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
REUSED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """A window of a few bytes, so that every value crosses one, and a cache of the test's own."""
    monkeypatch.setattr(index, "WINDOW", 5)
    monkeypatch.setenv("MOA_CACHE", str(tmp_path / "index"))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def all_values(found) -> list:
    return [found[i].value for i in range(len(found))]


@pytest.mark.slow
@REUSED
@given(st.lists(VALUES), st.booleans(), st.sampled_from([None, 1]))
def test_a_lists_elements_are_those_that_json_reads(tmp_path, values, escaped, indent):
    path = write(tmp_path / "x.json", json.dumps(values, ensure_ascii=escaped, indent=indent))
    assert all_values(JsonRows(path)) == values


@REUSED
@given(st.dictionaries(NAMES, VALUES), st.dictionaries(NAMES, VALUES, max_size=2))
def test_an_objects_members_are_found_by_key_wherever_it_stands(tmp_path, values, around):
    outer = {f"_{key}": value for key, value in around.items()} | {"data": values} | {"z": [1]}
    path = write(tmp_path / "x.json", json.dumps(outer, ensure_ascii=False))
    found = JsonRows(path, at="data")
    assert {found[i].key: found[i].value for i in range(len(found))} == values
    assert all(found.one(key) == value for key, value in values.items())


def test_rows_are_looked_up_by_a_field_as_number_or_text(tmp_path):
    data = [{"id": 7, "n": 0}, {"id": "é", "n": 1}, {"n": 2}, {"id": 7, "n": 3}, 5]
    found = JsonRows(write(tmp_path / "x.json", json.dumps(data, ensure_ascii=False)), key="id")
    assert [row.value["n"] for row in found.all("7")] == [0, 3]
    assert found.one(7)["n"] == 0 and found.one("é")["n"] == 1
    assert found.all(7)[1].where == f"{tmp_path / 'x.json'}: [3]"
    with pytest.raises(ValueError, match=r"x\.json has no id 8"):
        found.one(8)


def test_a_row_may_hold_several_samples_or_none(tmp_path):
    data = [{"q": ["a", "b"]}, {"q": []}, {"broken": 1}, {"q": ["c"]}]
    path = write(tmp_path / "x.json", json.dumps(data))
    found = JsonRows(path, count=lambda row: len(row["q"]))
    assert [(found[i].value, found[i].part) for i in range(len(found))] == [
        (data[0], 0), (data[0], 1), (data[2], 0), (data[3], 0)
    ]  # fmt: skip


def test_lines_are_numbered_from_one_and_blank_ones_do_not_count(tmp_path):
    found = JsonLines(write(tmp_path / "x.jsonl", '{"a": 1}\n\n  \n{"a": "é"}\nno\n'))
    assert [(found[i].value, found[i].where[-8:]) for i in (0, 1)] == [
        ({"a": 1}, ".jsonl:1"), ({"a": "é"}, ".jsonl:4")
    ]  # fmt: skip
    with pytest.raises(BadSampleError, match=r"x\.jsonl:5: unreadable row: not JSON"):
        found[2]


def test_a_list_and_lines_are_told_apart_and_a_byte_order_mark_is_passed_over(tmp_path):
    text = '\ufeff [{"a": 1}]'
    assert all_values(json_rows(write(tmp_path / "x.json", text))) == [{"a": 1}]
    assert all_values(json_rows(write(tmp_path / "y.json", '{"a": 1}\n'))) == [{"a": 1}]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[{"a": 1}, {"a": 2', 'byte 18'),
        ('[{"a": 1}, {\'a\': 2}]', "byte 12"),
        ('[{"a": 1} {"a": 2}]', "byte 10"),
        ('[{"a": "never ends}]', "byte 7"),
        ("", "byte 0"),
        ("[1, 2", "byte 5"),
        ('{"b": [1]}', r"x.json: lacks 'data'; it has b"),
        ("[1]", "byte 0: expected one of {"),
        ("[" * 100_000, "byte 1: maximum recursion depth"),
        (f"[{'9' * 5000}]", "byte 1: Exceeds the limit"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_json_is_named_with_the_byte(tmp_path, text, place):
    at = "data" if text.startswith('{"b') or text == "[1]" else None
    with pytest.raises(ValueError) as error:
        JsonRows(write(tmp_path / "x.json", text), at=at)
    assert "x.json" in str(error.value) and place in str(error.value)


def test_an_index_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "x.json", "[1, 2]")
    monkeypatch.setattr(index, "WORTH_CACHING", 0)
    assert all_values(JsonRows(path)) == [1, 2]
    scans, scan = [], rows.scan_json
    monkeypatch.setattr(rows, "scan_json", lambda *a, **k: scans.append(a) or scan(*a, **k))
    assert all_values(JsonRows(path)) == [1, 2] and not scans
    assert all_values(JsonRows(path, count=lambda row: 2, about="twice")) == [1, 1, 2, 2]
    assert len(scans) == 1  # another count is another index
    write(path, "[33, 4444]")
    assert all_values(JsonRows(path)) == [33, 4444] and len(scans) == 2
    (kept,) = [f for f in (tmp_path / "index").iterdir() if f.stat().st_mtime_ns == max(
        f.stat().st_mtime_ns for f in (tmp_path / "index").iterdir())]  # fmt: skip
    kept.write_bytes(kept.read_bytes()[:50])
    assert all_values(JsonRows(path)) == [33, 4444] and len(scans) == 3


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch):
    path = write(tmp_path / "x.json", "[1, 2]")
    monkeypatch.setattr(index, "WORTH_CACHING", 0)
    monkeypatch.setenv("MOA_CACHE", str(path / "below a file"))
    with pytest.warns(UserWarning, match="set MOA_CACHE"):
        assert all_values(JsonRows(path)) == [1, 2]


MEASURE = """
import json, resource, sys, time
from data.readers.conversations import read_conversations
from data.config import SourceConfig
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
start = time.perf_counter()
records = read_conversations(SourceConfig(name="mix", format="llava", path=sys.argv[1], images="/"))
opened = time.perf_counter() - start
ids = [records.read(i)[0].id for i in range(0, len(records), len(records) // 2000)]
print(json.dumps({"rows": len(records), "grown": peak() - before, "opened": opened, "ids": ids[:3]}))
"""


def measured(path: Path, cache: Path) -> dict:
    code = [sys.executable, "-c", MEASURE, str(path)]
    environment = {"PATH": "", "MOA_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(code, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_large_list_of_conversations_leaves_the_memory_flat(tmp_path):
    answer = "It is a small café beside the river. " * 12
    with (tmp_path / "mix.json").open("w", encoding="utf-8") as file:
        for i in range(200_000):
            turns = [{"from": "human", "value": f"<image>\\nQuestion {i}"},
                     {"from": "gpt", "value": answer}]  # fmt: skip
            row = {"id": f"{i:012d}", "image": f"coco/{i:012d}.jpg", "conversations": turns}
            file.write(("[" if i == 0 else ",\n") + json.dumps(row, ensure_ascii=False))
        file.write("]")
    size = (tmp_path / "mix.json").stat().st_size / 2**20
    first = measured(tmp_path / "mix.json", tmp_path / "cache")
    again = measured(tmp_path / "mix.json", tmp_path / "cache")
    assert first["rows"] == again["rows"] == 200_000
    assert first["ids"] == again["ids"] == ["000000000000", "000000000100", "000000000200"]
    assert size > 100 and first["grown"] < 48 and again["grown"] < 16  # MiB
    assert again["opened"] < first["opened"] / 5
