"""eval.py and the evaluation behind it, on the tiny random LLaVA and a toy world on disk."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import eval as eval_script
from data.sources import open_sources
from moa.benchmarks.catalogue import BENCHMARKS
from moa.benchmarks.report import routing_record
from moa.benchmarks.run import choose_gates, evaluate
from moa.benchmarks.sources import EvalSettings, chosen_sources, prompt_collator, score_sources
from moa.build import build_model
from moa.checkpoint import TrainState, load_model, save_checkpoint, write_run_header
from moa.config import load_config
from tests.toy import toy_world, write_rows

SETTINGS = EvalSettings(progress=False, max_new_tokens=6, batch_size=5)


def make_run(folder: Path, **changes) -> Path:
    """A run folder with one checkpoint whose experts are random, not fresh."""
    world = toy_world(folder, count=8)
    world.update(changes)
    (folder / "run.yaml").write_text(yaml.safe_dump(world, sort_keys=False))
    config = load_config(folder / "run.yaml")
    model = build_model(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.bank.parameters():
            parameter.normal_(std=0.1)
    write_run_header(Path(config.out), config)
    save_checkpoint(Path(config.out), 1, model, config, TrainState(progress={"step": 1}))
    return Path(config.out)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def loaded(run):
    model, _, config = load_model(run)
    return model, config


def texts(results):
    return [p.text for result in results for p in result.predictions]


def test_eval_writes_scores_answers_routing_and_pictures_into_the_run_folder(run, capsys):
    (run / "log.jsonl").write_text(
        "".join(
            json.dumps({"step": i, "stage": "experts", "loss/vqa": 2 - i / 9}) + "\n"
            for i in range(9)
        )
    )
    overrides = ["progress=false", "max_new_tokens=6", "num_samples=3", "num_pictures=4"]
    eval_script.main(["--checkpoint", str(run), *overrides])
    record = json.loads((run / "eval" / "vqa.json").read_text())
    assert record["n"] == 3 and record["num_images"] == 3
    assert record["tasks"]["vqa"]["primary"] == "vqa_accuracy"
    assert set(record["score"]) == {"value", "se"}
    assert record["settings"]["prompt"]["task_in_prompt"] is True
    assert torch.__version__.startswith(record["versions"]["torch"])
    rows = [json.loads(line) for line in (run / "eval" / "vqa.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and sum(rows[0]["gates"]) == pytest.approx(1, abs=1e-3)
    routing = json.loads((run / "eval" / "routing.json").read_text())
    assert routing["experts"] == ["vqa", "grounding"] and len(routing["mean_gates"]) == 2
    assert set(routing["per_task"]) == {"vqa", "grounding"}
    for name in ("samples", "gates", "losses"):
        assert (run / "pictures" / f"{name}.png").stat().st_size > 10_000
    assert "Acc@0.5" in capsys.readouterr().out


def answers_of(folder: Path) -> list[str]:
    return [
        json.loads(line)["prediction"] for line in (folder / "vqa.jsonl").read_text().splitlines()
    ]


def test_a_run_an_adapter_and_a_plain_checkpoint_are_scored_into_one_table(run, capsys):
    options = [
        "progress=false",
        "max_new_tokens=6",
        "num_pictures=0",
        "num_samples=3",
        "only=[vqa]",
    ]
    adapter = next((run / "checkpoints").glob("step-*/experts/grounding"))
    base = run.parent / "base"
    models = [f"--checkpoint={path}" for path in (run, adapter, base)]
    eval_script.main([*models, *options])
    shown = capsys.readouterr().out.split("Scores")[1]
    assert [row in shown for row in ("run", "grounding", "base")] == [True] * 3
    others = run / "others"
    eval_script.main([f"--checkpoint={run}", "gates=off", *options])
    assert answers_of(others / "base" / "eval") == answers_of(run / "eval" / "off")
    eval_script.main([f"--checkpoint={run}", "gates=grounding", *options])
    assert answers_of(others / "grounding" / "eval") == answers_of(run / "eval" / "grounding")
    record = json.loads((others / "base" / "eval" / "vqa.json").read_text())
    assert record["checkpoint"] == str(base) and "routing.json" not in {
        file.name for file in (others / "base" / "eval").iterdir()
    }


def test_a_plain_checkpoint_is_drawn_without_gates(run):
    options = ["progress=false", "max_new_tokens=3", "num_samples=1", "num_pictures=1"]
    eval_script.main([f"--checkpoint={run.parent / 'base'}", f"--like={run}", *options])
    assert (run / "others" / "base" / "pictures" / "samples.png").exists()


def test_a_checkpoint_may_be_asked_as_a_yaml_file_says(run, tmp_path):
    file = run.parent / "run.yaml"
    options = ["progress=false", "max_new_tokens=3", "num_samples=1", "num_pictures=0"]
    eval_script.main([f"--checkpoint={run.parent / 'base'}", f"--like={file}", *options])
    assert (run.parent / "others" / "base" / "eval" / "vqa.json").exists()


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["{base}"], "add --like RUN or --like FILE.yaml"),
        (["{base}", "{base}/."], "another model is called base too"),
        (["{base}/tokenizer.json"], "choices too: an adapter with adapter_config.json"),
        (["no/such/folder"], "neither a run with checkpoints/last"),
    ],
)
def test_a_model_that_cannot_be_opened_is_one_error_that_says_what_can(run, models, message):
    paths = [path.format(base=run.parent / "base") for path in models]
    with pytest.raises(SystemExit, match="error: ") as error:
        eval_script.main([f"--checkpoint={path}" for path in paths])
    assert message in str(error.value)


def test_every_setting_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        eval_script.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"\n{name}=" in shown for name in EvalSettings.__dataclass_fields__)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("gates=vaq", "choices: router, oracle, uniform, off, vqa, grounding, without:vqa"),
        ("only=[nothing]", "no data set 'nothing'; choices: vqa, grounding"),
        ("batchsize=3", "batch_size"),
    ],
)
def test_a_wrong_setting_is_one_error_with_the_choices(run, argument, message):
    with pytest.raises(SystemExit, match="error: ") as error:
        eval_script.main(["--checkpoint", str(run), argument])
    assert message in str(error.value)


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(SystemExit, match="error: ") as error:
        eval_script.main(["--checkpoint", str(tmp_path)])
    assert str(tmp_path) in str(error.value)


def test_results_that_cannot_be_written_are_one_error_naming_the_folder(tmp_path):
    run = make_run(tmp_path)
    (run / "eval").write_text("a file in the way")
    options = ["progress=false", "num_samples=1", "max_new_tokens=1"]
    with pytest.raises(SystemExit, match="error: .*eval"):
        eval_script.main(["--checkpoint", str(run), *options])


def test_only_the_predictions_that_are_drawn_keep_their_pictures(loaded):
    model, config = loaded
    (result, *_) = score_sources(model, config, replace(SETTINGS, num_pictures=2))
    kept = [prediction.sample.image is not None for prediction in result.predictions]
    assert kept == [True, True] + [False] * (len(kept) - 2) and len(kept) > 2


def test_batch_size_and_order_change_no_answer(loaded):
    model, config = loaded
    one = score_sources(model, config, replace(SETTINGS, batch_size=1))
    many = score_sources(model, config, SETTINGS)
    assert texts(one) == texts(many) and any(texts(many))


def test_answers_are_those_of_generating_one_sample_alone_with_its_gates(loaded):
    model, config = loaded
    collator = prompt_collator(model, config, withhold_task=False)
    (result, *_) = score_sources(model, config, SETTINGS)
    for prediction in result.predictions[:2]:
        batch = collator([prediction.sample])
        gates = torch.tensor(prediction.gates)[None]
        ids = model.generate(batch, gates=gates, max_new_tokens=6, do_sample=False)
        text = collator.processor.tokenizer.decode(ids[0], skip_special_tokens=True)
        assert text.strip() == prediction.text


def test_gates_off_answers_as_the_base_and_one_expert_alone_does_not(loaded):
    model, config = loaded
    off = score_sources(model, config, replace(SETTINGS, gates="off"))
    alone = score_sources(model, config, replace(SETTINGS, gates="grounding"))
    collator = prompt_collator(model, config, withhold_task=False)
    batch = collator([p.sample for p in off[0].predictions])
    with torch.no_grad(), model.bank.context.disabled():
        ids = model.generate(batch, max_new_tokens=6, do_sample=False)
    base = collator.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert [t.strip() for t in base] == texts(off)[: len(base)]
    assert texts(alone) != texts(off)


def test_each_rule_for_gates_gives_the_gates_it_names(loaded):
    model, config = loaded
    collator = prompt_collator(model, config, withhold_task=False)
    sources = open_sources(chosen_sources(config, SETTINGS), config.data, None)
    batch = collator([sources["vqa"][0], sources["grounding"][0]])
    rows = {
        spec: choose_gates(model, batch, spec).gates[:, 0].tolist()
        for spec in ("oracle", "uniform", "off", "grounding", "without:vqa")
    }
    assert rows["oracle"] == [[1.0, 0.0], [0.0, 1.0]]
    assert rows["uniform"] == [[0.5, 0.5]] * 2
    assert rows["off"] == [[0.0, 0.0]] * 2
    assert rows["grounding"] == rows["without:vqa"] == [[0.0, 1.0]] * 2


def test_a_withheld_task_reaches_neither_prompt_nor_router(loaded):
    model, config = loaded
    told = prompt_collator(model, config, withhold_task=False)
    untold = prompt_collator(model, config, withhold_task=True)
    sample = open_sources(chosen_sources(config, SETTINGS), config.data, None)["vqa"][0]
    assert told.prompt(sample).startswith("[vqa] ")
    assert untold.prompt(sample).startswith(sample.question)
    assert told([sample]).task_ids.tolist() == [0] and untold([sample]).task_ids.tolist() == [-1]


def test_held_out_tasks_are_scored_and_get_no_task_id(loaded, tmp_path):
    model, config = loaded
    source = config.data.validation[0]
    rows = [json.loads(line) for line in Path(source.path).read_text().splitlines()]
    rows = [{**r, "task": "count", "answers": ["two"], "image": str(Path(source.path).parent / r["image"])}
            for r in rows]  # fmt: skip
    path = write_rows(tmp_path / "count.jsonl", rows)
    counted = replace(source, name="count", path=str(path), expert=None)
    results = score_sources(model, config, replace(SETTINGS, sources=[counted]))
    assert results[0].tasks["count"][1].primary == "exact_match"
    routing = routing_record(model, config, results)
    assert routing["routing_accuracy"] is None and set(routing["per_task"]) == {"count"}


def test_samples_that_cannot_be_scored_stop_it_or_are_counted_by_rule(loaded, tmp_path):
    model, config = loaded
    source = config.data.validation[0]
    image = str(Path(source.path).parent / "0.png")
    row = {"image": image, "question": "what?", "task": "vqa", "answers": ["red"]}
    path = write_rows(
        tmp_path / "bad.jsonl",
        [
            row,
            {**row, "answers": [" "]},
            {**row, "task": "dance"},
            {**row, "image": "gone.png"},
            {**row, "task": "grounding"},
        ],
    )
    bad = replace(source, name="bad", path=str(path), num_samples=None)
    with pytest.raises(ValueError, match="empty answer: vqa needs a reference answer"):
        score_sources(model, config, replace(SETTINGS, sources=[bad]))
    skipping = replace(SETTINGS, sources=[bad], on_bad_sample="skip")
    record = score_sources(model, config, skipping)[0].record()
    assert record["n"] == 1 and record["num_skipped"] == 4
    assert record["skipped"] == {"empty answer": 2, "unknown task": 1, "missing image": 1}
    assert any("'dance' has no benchmark" in text for text in record["skipped_samples"])


def test_a_set_in_which_nothing_can_be_scored_is_an_error(loaded, tmp_path):
    model, config = loaded
    row = {"image": "gone.png", "question": "what?", "task": "vqa", "answers": ["red"]}
    path = write_rows(tmp_path / "none.jsonl", [row])
    gone = replace(config.data.validation[0], name="none", path=str(path))
    with pytest.raises(ValueError, match="none of 1 samples can be scored"):
        score_sources(model, config, replace(SETTINGS, sources=[gone], on_bad_sample="skip"))


def test_token_routed_runs_are_scored_without_a_routing_record(tmp_path):
    run = make_run(tmp_path, router={"kind": "top_k", "top_k": 2, "granularity": "token"})
    eval_script.main(["--checkpoint", str(run), "progress=false", "max_new_tokens=3"])
    assert not (run / "eval" / "routing.json").exists()
    assert (run / "pictures" / "samples.png").exists()
    with pytest.raises(SystemExit, match="routed by itself"):
        eval_script.main(["--checkpoint", str(run), "gates=without:vqa"])


def test_gates_per_site_are_drawn_by_layer(tmp_path):
    run = make_run(tmp_path, router={"hidden": 8, "per_site": True})
    eval_script.main(["--checkpoint", str(run), "progress=false", "max_new_tokens=3"])
    routing = json.loads((run / "eval" / "routing.json").read_text())
    assert len(routing["per_site"]["vqa"]) == 4  # two layers with two sites each
    assert (run / "pictures" / "gates_by_layer.png").exists()


def test_every_variant_of_an_evaluation_has_its_own_folder(run):
    assert EvalSettings().variant == ""
    assert EvalSettings(gates="without:vqa", withhold_task=True).variant == "without-vqa_no_task"
    overrides = ["progress=false", "gates=oracle", "num_samples=1", "num_pictures=0"]
    eval_script.main(["--checkpoint", str(run), *overrides])
    assert (run / "eval" / "oracle" / "vqa.json").exists()


def test_beams_keep_their_samples_gates(loaded):
    model, config = loaded
    collator = prompt_collator(model, config, withhold_task=False)
    sources = open_sources(chosen_sources(config, SETTINGS), config.data, None)
    options = {"name": "vqa", "max_new_tokens": 4, "num_beams": 3, "progress": False}
    whole = evaluate(model, sources["vqa"], collator, batch_size=4, **options)
    alone = evaluate(model, sources["vqa"], collator, batch_size=1, **options)
    assert texts([whole]) == texts([alone])


def test_every_task_of_the_demo_has_a_benchmark():
    from data.questions import TASKS

    assert set(TASKS) <= set(BENCHMARKS)
