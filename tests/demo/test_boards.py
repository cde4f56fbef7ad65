"""Boards: rows that are data, what is made and scored only once, and claims with known intervals."""

import json
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from moa.cli.settings import load
from moa.config import load_config
from scripts.demo import boards
from scripts.demo.board import plan as planning
from scripts.demo.board.federated import views_of
from scripts.demo.board.kept import Kept, asked, read_kept
from scripts.demo.board.plan import PLACE, Cell, Plan, board_names, needed, read_board
from scripts.demo.board.scoring import score, score_files
from scripts.demo.board.table import write_board
from scripts.demo.board.training import Making, config_of, making, rates_of, shorter, training

TINY = """
title: Tiny
config: [configs/demo.yaml]
reference: lora
means: {trained: [vqa, caption]}
columns:
  caption: {split: train, task: caption, num_samples: 4}
  vqa: {split: train, task: vqa, num_samples: 4}
rows:
  base: {of: lora, gates: "off"}
  lora:
    settings: {experts: {lora: {rank: 2}}, data.expert: lora, router: {kind: fixed}, stages: {experts: {steps: 2}}}
  merged: {command: "scripts.merge run={run:lora} out={out}"}
claims:
  gain: {first: lora, second: base, over: trained}
  share: {kind: ratio, pairs: [[lora, base, vqa], [lora, base, caption]]}
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    (tmp_path / "boards").mkdir()
    (tmp_path / "boards/tiny.yaml").write_text(TINY)
    monkeypatch.setattr(planning, "BOARDS", tmp_path / "boards")
    read_board.cache_clear()
    config_of.cache_clear()
    yield Plan(out=tmp_path / "out", overrides=("train.batch_size=4", "data.validation={}"))
    read_board.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", board_names())
def test_every_row_of_a_board_is_a_run_that_can_be_trained_or_comes_from_one(name, tmp_path):
    board, parts = read_board(name), {row.partition("@")[2] for row in read_board(name).rows}
    script = "federate.py" if board.partitions else "train.py"
    for row in board.rows.values():
        cell = Cell(name, row.name, 0)
        if row.name in board.presets:
            continue  # tests/cli/test_presets.py
        if board.partitions and row.name.partition("@")[2] != min(parts) and not row.of:
            assert row.settings.keys() == board.rows[f"{row.name.partition('@')[0]}@{min(parts)}"].settings.keys()
        elif row.trains and not needed(cell):
            assert script in training(Plan(out=tmp_path), cell, tmp_path, [], share=0.5).command
        elif row.trains:
            load_config([*board.config, *row.config], [*row.settings.items()])
        else:
            assert needed(cell) or not row.scored, row.name
        assert not (row.trains and board.tune) or rates_of(cell), f"{row.name} has no rate to tune"


def test_no_two_boards_claim_under_one_name():
    names = [claim for board in board_names() for claim in read_board(board).claims]
    assert len(names) == len(set(names))


def test_a_row_is_trained_after_the_rows_that_it_starts_from(tiny):
    jobs = boards.jobs_of(tiny, ["tiny"], boards.BoardsSettings(seeds=[3, 1], only=["base", "merged"]))
    assert [str(job) for job in jobs] == [f"tiny/{row} seed {s}" for s in (3, 1) for row in ("lora", "base", "merged")]
    assert PLACE.sub("X", "a={run:lora} b={expert:together/lora:vqa}") == "a=X b=X"
    assert tiny.folder(Cell("tiny", "base", 3)) == tiny.folder(Cell("tiny", "lora", 3))


def test_a_claim_about_a_row_that_is_not_there_is_refused(tiny, tmp_path):
    (tmp_path / "boards/tiny.yaml").write_text(TINY.replace("first: lora", "first: lara"))
    with pytest.raises(ValueError, match=r"claims.gain: no row 'lara'; choices: \['base', 'lora', 'merged'\]"):
        read_board("tiny")


@pytest.mark.slow
def test_what_was_made_of_other_settings_is_neither_used_nor_overwritten(tmp_path):
    command = ["python", "-c", f"open({str(tmp_path / 'ran')!r}, 'a').write('x')"]
    run = partial(Making, out=tmp_path / "row", command=command)
    run(wanted="a").do()
    run(wanted="a").do()
    with pytest.raises(ValueError, match="row: was made with other settings"):
        run(wanted="b").do()
    assert (tmp_path / "ran").read_text() == "x"
    with pytest.raises(ValueError, match=r"other: failed; see .*log.txt: ZeroDivisionError"):
        Making(out=tmp_path / "other", command=["python", "-c", "1 / 0"], wanted="a").do()


@pytest.mark.slow
def test_a_dry_run_writes_no_published_results():
    for given in ("steps=0.5", "num_samples=4", "overrides=[train.batch_size=8]"):
        with pytest.raises(SystemExit):
            boards.main(["board=together", given, "dry=true"])


def test_a_job_is_asked_with_the_settings_of_a_dry_run(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(
        boards.subprocess, "run", lambda given, **_: commands.append(given) or SimpleNamespace(returncode=0)
    )
    settings = boards.BoardsSettings(steps=0.5, num_samples=4, overrides=["train.batch_size=2"], results=str(tmp_path))
    boards.run_job(boards.Job("row", Cell("together", "lora", 3)), settings)
    asked_again = load(boards.BoardsSettings, None, commands[0][3:])
    assert asked_again == replace(settings, cell=["row", "together", "lora", "3"])


def test_results_that_were_cut_off_are_named(tmp_path):
    (tmp_path / "board_tiny.json").write_text('{"rows": {}}')
    (tmp_path / "board_tiny.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match=r"board_tiny\.npz: not readable .* restore it"):
        read_kept(tmp_path, "tiny")


def test_a_share_of_the_steps_leaves_every_stage_one():
    config = load_config("configs/demo.yaml")
    steps = {key: value for key, value in shorter(config, 0.005) if key.endswith("experts.steps")}
    assert steps == {"stages.experts.steps": 1} and shorter(config, 1.0) == []


@pytest.fixture
def by_records(monkeypatch):
    """Scores that are written by hand belong to no weights."""
    monkeypatch.setattr("scripts.demo.board.table.is_scored", lambda plan, cell: plan.record(cell).is_file())


def write_scores(plan, row, seed, columns, **costs):
    cell, files = Cell("tiny", row, seed), {}
    for column, scores in columns.items():
        file = plan.out / "scores" / f"{row}-{seed}-{column}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"scores": scores, "num_tokens": 8, "cpu_seconds": 2.0}))
        files[column] = file.name
    record = {"files": files, "commit": "c0ffee", "experts": 100, "router": 0, **costs}
    plan.record(cell).parent.mkdir(parents=True, exist_ok=True)
    plan.record(cell).write_text(json.dumps(record))


@pytest.mark.slow
def test_claims_are_over_the_seeds_and_columns_of_both_rows(tiny, tmp_path, by_records):
    for seed in (0, 1):
        write_scores(tiny, "lora", seed, {"vqa": [1.0, 1.0], "caption": [0.5, 0.5]})
    write_scores(tiny, "base", 1, {"vqa": [0.5, 0.5], "caption": [0.5, 0.5]})
    table = write_board(tiny, "tiny", [0, 1], tmp_path / "results")
    written = json.loads((tmp_path / "results/boards.json").read_text())
    gain = {key: written["claims"]["gain"][key] for key in ("difference", "low", "high", "n_seeds", "n_questions")}
    assert gain == {"difference": 25.0, "low": 25.0, "high": 25.0, "n_seeds": 1, "n_questions": 4}
    assert written["claims"]["share"]["difference"] == 150.0
    assert written["rows"]["tiny"]["lora"] == {"vqa": 100.0, "caption": 50.0}
    assert "| `base` | 1 | 100 | **50.0** | -25.0 [-25.0, -25.0] |" in table
    with np.load(tmp_path / "results/board_tiny.npz") as arrays:
        assert arrays["lora|vqa"].tolist() == [[1.0, 1.0], [1.0, 1.0]] and arrays["base|seeds"].tolist() == [1]
    # another machine has the results alone: what was asked with the same settings is not made again
    shutil.rmtree(tiny.out)
    for seeds in ([0, 1], [0]):  # a command of fewer seeds takes no other away
        assert write_board(tiny, "tiny", seeds, tmp_path / "results") == table
    kept, cell = read_kept(tmp_path / "results", "tiny"), Cell("tiny", "lora", 0)
    other = replace(tiny, overrides=("train.batch_size=8",))
    assert kept.has(tiny, cell) and not kept.has(other, cell)
    jobs = [boards.Job("row", cell), boards.Job("row", Cell("tiny", "base", 0))]
    assert boards.to_do(jobs, set(), {jobs[0]}) == jobs  # base answers with the weights of the first, which are gone
    assert boards.to_do(jobs, set(), set(jobs)) == []


@pytest.mark.slow
def test_a_preset_is_a_row_with_its_merge_behind_it_and_its_costs_beside_it(tiny, tmp_path, by_records):
    (tmp_path / "boards/tiny.yaml").write_text(
        f"{TINY}presets: {{hydralora: approximate, xlora: exact, smora: refused}}\n"
    )
    rows = read_board("tiny").rows
    assert [*rows][3:] == ["hydralora", "hydralora@merged", "xlora", "xlora@merged", "smora"]
    assert rows["hydralora"].config == ["configs/presets/hydralora.yaml"]
    own = {row: command.split()[1:3] for row in rows if (command := rows[row].command) and row != "merged"}
    assert own == {
        "hydralora@merged": ["run={run:hydralora}", "approximate=True"],
        "xlora@merged": ["run={run:xlora}", "approximate=False"],
    }
    jobs = boards.jobs_of(tiny, ["tiny"], boards.BoardsSettings(seeds=[0, 1, 2, 3], only=["smora", "xlora"]))
    seeds = {row: [job.cell.seed for job in jobs if job.cell.row == row] for row in ("smora", "xlora", "xlora@merged")}
    assert seeds == {"smora": [0, 1, 2], "xlora": [0, 1, 2], "xlora@merged": [0]}
    scores = {"vqa": [1.0, 0.0], "caption": [0.5, 0.5]}
    write_scores(tiny, "lora", 0, scores, step_s=0.5, memory_gib=2.0)
    write_scores(tiny, "hydralora", 0, scores, step_s=0.8, memory_gib=2.5)
    write_scores(tiny, "hydralora@merged", 0, {"vqa": [0.0, 0.0], "caption": [0.5, 0.5]})
    table = write_board(tiny, "tiny", [0], tmp_path / "results").splitlines()
    assert "| trained - lora | merged | step | memory | tokens/s | caption |" in table[2]
    (line,) = [line for line in table if line.startswith("| `hydralora` ")]
    assert "| +0.0 [+0.0, +0.0] | 25.0 | 1.60 | 1.25 | 4 | 50.0 |" in line


@pytest.mark.slow
def test_two_rows_are_trained_and_scored_and_not_again(tiny, tmp_path, monkeypatch):
    tiny.ocr_file.parent.mkdir()
    tiny.ocr_file.write_bytes((planning.ROOT / "assets/demo_ocr.parquet").read_bytes())
    cells = [Cell("tiny", row, 0) for row in ("lora", "base")]
    weights = making(tiny, cells[0])
    weights.do()
    for cell in cells:
        score(tiny, cell)
    assert making(tiny, cells[0]).is_done() and making(tiny, cells[1]) is None
    assert all(boards.is_done(tiny, boards.Job("row", cell), Kept()) for cell in cells)
    table = write_board(tiny, "tiny", [0], tmp_path / "results")
    assert "| `lora` | 1 | 30,720 |" in table and (tmp_path / "results/board_tiny.png").stat().st_size > 5000
    monkeypatch.setattr("scripts.demo.board.scoring.score_column", lambda *_: pytest.fail("scored again"))
    score(tiny, cells[0])
    asked_anew = TINY.replace("task: vqa, num_samples: 4", "task: vqa, num_samples: 4, seed: 1")
    (tmp_path / "boards/tiny.yaml").write_text(asked_anew)  # other questions of the same number
    for cached in (read_board, score_files, asked):
        cached.cache_clear()
    assert not boards.is_done(tiny, boards.Job("row", cells[0]), Kept())
    assert write_board(tiny, "tiny", [0], tmp_path / "results") == "tiny: nothing is scored yet\n"


FEDERATED = """
title: Tiny
file: tiny
config: [configs/federated/demo.yaml]
settings: {federated.rounds: 2}
partitions: {even: {clients: 2, how: even}, apart: {clients: 5, how: by_source}}
reference: mean
means: {global: [vqa, caption]}
columns:
  vqa: {split: test, task: vqa, num_samples: 2}
  caption: {split: test, task: caption, num_samples: 2}
  count: {split: test, task: count, num_samples: 2}
rows:
  base: {of: mean, gates: "off"}
  mean: {settings: {train.batch_size: 4}}
  central: {pooled: true, settings: {federated.rounds: 1}}
claims:
  better: {first: mean, second: base, over: personal, at: apart}
"""


@pytest.fixture
def federated(tiny, tmp_path):
    (tmp_path / "boards/tiny.yaml").write_text(FEDERATED)
    return tiny


def test_a_board_with_partitions_has_each_row_once_for_each_and_pools_once(federated, tmp_path):
    board = read_board("tiny")
    assert [*board.rows] == [f"{row}@{part}" for part in ("even", "apart") for row in ("base", "mean", "central")]
    assert (board.rows["base@apart"].of, board.rows["central@apart"].of) == ("mean@apart", "central@even")
    settings = board.rows["mean@apart"].settings
    assert settings == {"federated.rounds": 2, "train.batch_size": 4, "federated.partition": board.partitions["apart"]}
    assert board.pairs(board.claims["better"])[0] == ("mean@apart", "base@apart", "personal/vqa")
    jobs = boards.jobs_of(federated, ["tiny"], boards.BoardsSettings(seeds=[0], only=["base@apart", "tiny/central"]))
    names = ["mean@apart", "base@apart", "central@even", "central@apart"]
    assert sorted(str(job) for job in jobs) == sorted(f"tiny/{row} seed 0" for row in names)
    (tmp_path / "boards/tiny.yaml").write_text(FEDERATED.replace("at: apart", "at: odd"))
    read_board.cache_clear()
    with pytest.raises(ValueError, match=r"claims.better.at: no partition 'odd'; choices: \['even', 'apart'\]"):
        read_board("tiny")


def test_views_are_means_over_clients_of_what_each_has_and_lacks():
    def row(scores, own, held_out=False):
        return {"scores": scores, "own": own, "held_out": held_out}

    rows = {
        "global": {"scores": {"a": [0, 0], "b": [0, 0], "c": [0, 0]}, "own": {}},
        "one": row({"a": [1, 1], "b": [0.2, 0.4], "c": [0, 0.4]}, {"a": 1.0}),
        "two": row({"a": [0, 1], "b": [0.6, 0.8], "c": [0.8, 0.8]}, {"a": 0.5, "b": 0.5}),
        "other": row({"a": [0.4, 0.2], "b": [0.1, 0.1], "c": [0, 0]}, {"b": 1.0}, held_out=True),
    }
    views = views_of(rows, ["a", "b", "c"], trained=["a", "b"])
    values = {view: float(np.mean([own.mean() for own in columns.values()])) for view, columns in views.items()}
    wanted = {"personal": (1 + 0.6) / 2, "worst_client": 0.6, "unseen_task": 0.3, "unseen_client": 0.1, "kept": 0.5}
    assert values == pytest.approx(wanted)
    assert views["personal"]["b"].tolist() == pytest.approx([3 * 0.5 * 0.6 / 2, 3 * 0.5 * 0.8 / 2])


@pytest.mark.slow
def test_a_federations_costs_are_what_it_sent_forgot_and_the_round_that_was_enough(federated, tmp_path, by_records):
    board, results = read_board("tiny"), tmp_path / "results"
    for row, kept, rounds in (("base", 1.0, [0.0]), ("mean", 0.7, [0.5, 0.96]), ("central", 0.9, [1.0])):
        columns = {name: [0.5, 0.5] for name in board.scored} | {"kept/count": [3 * kept, 3 * kept]}
        columns |= {name: [0.0, 0.0] for name in ("kept/vqa", "kept/caption")}
        columns |= {"facts/megabytes": [2.5], "facts/by_round": rounds}
        found = {name: {"scores": s, "num_tokens": 8, "cpu_seconds": 2.0} for name, s in columns.items()}
        file, record = federated.out / "scores" / f"{row}.json", federated.record(Cell("tiny", f"{row}@apart", 0))
        for parent in (file.parent, record.parent):
            parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"columns": found}))
        about = {"commit": "c0ffee", "experts": 100, "router": 0}
        record.write_text(json.dumps(about | {"files": {"all": file.name}}))
    table = write_board(federated, "tiny", [0], results)
    rows = json.loads((results / "tiny.json").read_text())["rows"]
    assert rows["mean@apart"]["rounds_to_central"] == [2] and rows["mean@apart"]["megabytes"] == 2.5
    assert rows["mean@apart"]["forgotten"]["difference"] == pytest.approx(30)
    assert "## apart" in table and "| +30.0 [+30.0, +30.0] | 2.5 | 2.0 |" in table
    assert json.loads((results / "boards.json").read_text())["rows"]["tiny"]["mean@apart"] == {
        "vqa": 50.0, "caption": 50.0, "count": 50.0,
    }  # fmt: skip
    assert read_kept(results, "tiny").has(federated, Cell("tiny", "mean@apart", 0))


SCALE = """
title: Tiny
file: tiny
config: [configs/demo.yaml]
reference: mixed
means: {}
scale: {bases: {one: assets/demo_base, two: "{made:other}"}, counts: [1, 2], steps: 3}
columns:
  vqa: {split: test, task: vqa, num_samples: 2}
  caption: {split: test, task: caption, num_samples: 2}
rows:
  other: {scored: false, command: "scripts.cut out={out}"}
  base: {each: base, about: the base, of: "mixed-1-{size}", gates: "off"}
  expert:
    each: skill
    scored: false
    settings: &settings
      model.name: "{base}"
      experts: {"{part}": {rank: 2}}
      router: {kind: fixed}
      data.sources: "{train}"
      data.validation: "{validation}"
      stages: {experts: {steps: "{steps}"}}
  mixed: {each: count, about: all, settings: {<<: *settings, experts: {lora: {rank: 2}}, data.expert: lora}}
  mean: {each: count, about: the mean, command: "scripts.merge adapters=[{adapters}] out={out}"}
"""


@pytest.mark.slow
def test_a_row_is_one_for_each_base_and_number_of_skills_and_a_share_of_one_lora(tiny, tmp_path, by_records):
    (tmp_path / "boards/tiny.yaml").write_text(SCALE)
    board, (one, two) = read_board("tiny"), (config_of("tiny", f"mixed-2-{size}") for size in ("one", "two"))
    assert [name for name in board.rows if name.endswith("two")] == [
        "base-two", "expert-vqa-two", "expert-caption-two", "mixed-1-two", "mixed-2-two", "mean-1-two", "mean-2-two",
    ]  # fmt: skip
    assert (one.model.name, two.model.name) == ("assets/demo_base", "{made:other}")
    assert one.stages["experts"].steps == 6 and [*one.data.sources] == ["vqa", "caption"]
    source = config_of("tiny", "expert-caption-two").data.sources["caption"]
    assert (source.split, source.expert, source.num_samples) == ("train", "caption", 400)
    experts = [Cell("tiny", f"expert-{skill}-two", 0) for skill in ("vqa", "caption")]
    assert needed(Cell("tiny", "mean-2-two", 0)) == experts and needed(experts[0]) == [Cell("tiny", "other", 0)]
    assert board.beside("mean-2-two") == "mixed-2-two" and board.means["first 2"] == ["vqa", "caption"]
    for row, vqa, caption in (("base", 0.2, 0.2), ("mixed-2", 0.9, 0.7), ("mean-2", 0.5, 0.5)):
        write_scores(tiny, f"{row}-one", 0, {"vqa": [vqa, vqa], "caption": [caption, caption]})
    table = write_board(tiny, "tiny", [0], tmp_path / "results")
    for cell in ("**62.5** [62.5, 62.5]", "**50.0** [50.0, 50.0]"):  # of 80, and of 80 - 20
        assert f"| one | `mean` the mean |  | {cell} |" in table
    assert "| one | `base` the base | **20.0** [20.0, 20.0] | **20.0** [20.0, 20.0] |" in table
    assert table.count("**") == 2 * (3 + 3 + 4) and (tmp_path / "results/tiny.png").stat().st_size > 5000
    (tmp_path / "boards/tiny.yaml").write_text(TINY.replace("  lora:", "  lora:\n    each: count"))
    read_board.cache_clear()
    with pytest.raises(ValueError, match="rows.lora.each: has no effect without scale"):
        read_board("tiny")


SEQUENCE = TINY.replace("reference:", "arrivals: [caption, vqa]\nreference:").replace(
    "  lora:\n", "  lora:\n    arrivals: [1, 2]\n"
)


@pytest.mark.slow
def test_what_is_forgotten_is_the_loss_of_a_skill_since_it_arrived(tiny, tmp_path, by_records):
    claim = "  lost: {kind: forgetting, first: lora}\n"
    (tmp_path / "boards/tiny.yaml").write_text(SEQUENCE + claim)
    row = read_board("tiny").rows["lora@caption"]
    assert (row.of, row.at) == ("lora", 1) and "lora@vqa" not in read_board("tiny").rows
    write_scores(tiny, "lora@caption", 0, {"caption": [1.0, 0.8], "vqa": [0.2, 0.2]})
    write_scores(tiny, "lora", 0, {"caption": [0.5, 0.3], "vqa": [1.0, 0.6]})
    table = write_board(tiny, "tiny", [0], tmp_path / "results")
    lost = json.loads((tmp_path / "results/boards.json").read_text())["claims"]["lost"]
    assert [lost[key] for key in ("difference", "low", "high")] == pytest.approx([50, 50, 50])
    assert "| caption | **90.0** | 20.0 |\n| vqa | 40.0 | **80.0** |" in table
