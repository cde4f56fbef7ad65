"""eval.py and the evaluation behind it, on the tiny random LLaVA and a toy world on disk."""

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file

import eval as eval_script
from data.config import SourceConfig, is_file_name
from data.sources import open_sources
from moa.benchmarks.table import BENCHMARKS
from moa.build import build_model, settled
from moa.checkpoint import (
    TrainState,
    load_model,
    save_checkpoint,
    step_folder,
    write_run_header,
)
from moa.cli.settings import load
from moa.config import load_config
from moa.evaluation.gates_file import read_routing, routing_file
from moa.evaluation.models import models_of
from moa.evaluation.predict import choose_gates, prompt_collator
from moa.evaluation.report import routing_record
from moa.evaluation.result import comparison, paired_difference
from moa.evaluation.run import evaluate
from moa.evaluation.settings import (
    EvalCommand,
    chosen_sources,
    read_command,
    variant_of,
    with_eval,
)
from moa.evaluation.sources import score_sources
from moa.sections import EvalConfig
from scripts.summary import gains, names_of_rows, score_all
from tests.support.tiny import random_image
from tests.support.toy import toy_world, write_rows


def make_run(folder: Path, **changes) -> Path:
    """A run folder with one checkpoint whose experts are random, not fresh."""
    world = toy_world(folder, count=8)
    world.update(changes)
    (folder / "run.yaml").write_text(yaml.safe_dump(world, sort_keys=False))
    config = settled(load_config(folder / "run.yaml"))
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
    return model, with_eval(config, max_new_tokens=6, batch_size=5)


def refused(capsys, *arguments):
    """What eval.py prints where it refuses: one line on stderr, exit status 2."""
    with pytest.raises(SystemExit) as stop:
        eval_script.main(list(arguments))
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def texts(results):
    return [p.text for result in results for p in result.responses]


def test_eval_writes_scores_answers_routing_and_pictures_into_the_run_folder(run, capsys):
    (run / "log.jsonl").write_text(
        "".join(json.dumps({"step": i, "stage": "experts", "loss/vqa": 2 - i / 9}) + "\n" for i in range(9))
    )
    overrides = ["progress=false", "eval.max_new_tokens=6", "eval.num_images=4"]
    eval_script.main([f"run={run}", *overrides])
    record = json.loads((run / "eval" / "vqa.json").read_text())
    assert record["n"] == 4 and record["num_images"] == 4
    assert record["tasks"]["vqa"]["primary"] == "vqa_accuracy"
    assert set(record["score"]) == {"value", "se"}
    assert record["settings"]["prompt"]["task_in_prompt"] is True
    assert torch.__version__.startswith(record["versions"]["torch"])
    rows = [json.loads(line) for line in (run / "eval" / "vqa.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and sum(rows[0]["gates"]) == pytest.approx(1, abs=1e-3)
    routing = json.loads((run / "eval" / "routing.json").read_text())
    assert routing["experts"] == ["vqa", "grounding"] and len(routing["mean_gates"]) == 2
    assert set(routing["per_task"]) == {"vqa", "grounding"}
    assert "<h2>Who answers what</h2>" in (run / "report.html").read_text()
    for name in ("samples", "gates", "losses"):
        assert (run / "pictures" / f"{name}.png").stat().st_size > 10_000
    assert "Acc@0.5" in capsys.readouterr().out


def answers_of(folder: Path) -> list[str]:
    return [json.loads(line)["prediction"] for line in (folder / "vqa.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_an_adapter_and_a_plain_checkpoint_are_scored_into_one_table(run, capsys):
    options = [
        "progress=false",
        "eval.max_new_tokens=6",
        "eval.num_images=0",
        "eval.num_samples=3",
        "eval.only=[vqa]",
    ]
    adapter = next((run / "checkpoints").glob("step-*/experts/grounding"))
    base = run.parent / "base"
    eval_script.main([f"run={run}", f"models=[{adapter}, {base}]", *options])
    shown = capsys.readouterr().out.split("Scores")[1]
    assert [row in shown for row in ("run", "grounding", "base")] == [True] * 3
    others = run / "others"
    eval_script.main([f"run={run}", "eval.gates=off", *options])
    assert answers_of(others / "base" / "eval") == answers_of(run / "eval" / "off")
    eval_script.main([f"run={run}", "eval.gates=grounding", *options])
    assert answers_of(others / "grounding" / "eval") == answers_of(run / "eval" / "grounding")
    record = json.loads((others / "base" / "eval" / "vqa.json").read_text())
    assert record["checkpoint"] == str(base) and "routing.json" not in {
        file.name for file in (others / "base" / "eval").iterdir()
    }


@pytest.mark.slow
def test_a_plain_checkpoint_is_drawn_without_gates(run):
    options = ["progress=false", "eval.max_new_tokens=3", "eval.num_samples=1", "eval.num_images=1"]
    eval_script.main([f"models=[{run.parent / 'base'}]", f"like={run}", *options])
    assert (run / "others" / "base" / "pictures" / "samples.png").exists()


@pytest.mark.slow
def test_a_checkpoint_may_be_asked_as_a_yaml_file_says(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = run.parent / "run.yaml"
    options = ["progress=false", "eval.max_new_tokens=3", "eval.num_samples=1", "eval.num_images=0"]
    eval_script.main([f"models=[{run.parent / 'base'}]", f"like={file}", *options])
    assert Path("runs/others/base/eval/vqa.json").exists()
    assert not (run.parent / "others").exists()  # nothing beside the file


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["{base}"], "add like=RUN or like=FILE.yaml"),
        (["{base}", "{base}/."], "is given twice"),
        (["{base}/tokenizer.json"], "choices too: an adapter with adapter_config.json"),
        (["no/such/folder"], "neither a run with checkpoints/last"),
    ],
)
def test_a_model_that_cannot_be_opened_is_one_error_that_says_what_can(run, models, message, capsys):
    paths = [path.format(base=run.parent / "base") for path in models]
    assert message in refused(capsys, f"models={json.dumps(paths)}")


def test_every_setting_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        eval_script.main(["--help"])
    shown = capsys.readouterr().out
    keys = [key for key in EvalCommand.__dataclass_fields__ if key != "eval"]
    keys += [f"eval.{key}" for key in EvalConfig.__dataclass_fields__]
    assert all(f"\n{key}=" in shown for key in keys)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("eval.gates=vaq", "choices: router, oracle, uniform, ensemble, off, vqa, grounding, without:vqa"),
        ("eval.only=[nothing]", "no data set 'nothing'; choices: vqa, grounding"),
        ("eval.batchsize=3", "batch_size"),
    ],
)
def test_a_wrong_setting_is_one_error_with_the_choices(run, argument, message, capsys):
    assert message in refused(capsys, f"run={run}", argument)


def test_a_folder_without_a_checkpoint_is_named(tmp_path, capsys):
    assert str(tmp_path) in refused(capsys, f"run={tmp_path}")


@pytest.mark.slow
def test_results_that_cannot_be_written_are_one_error_naming_the_folder(tmp_path, capsys):
    run = make_run(tmp_path)
    (run / "eval").write_text("a file in the way")
    options = ["progress=false", "eval.num_samples=1", "eval.max_new_tokens=1"]
    assert str(run / "eval") in refused(capsys, f"run={run}", *options)


@pytest.mark.slow
def test_only_the_predictions_that_are_drawn_keep_their_pictures(loaded):
    model, config = loaded
    (result, *_) = score_sources(model, with_eval(config, num_images=2))
    kept = [prediction.sample.image is not None for prediction in result.responses]
    assert kept == [True, True] + [False] * (len(kept) - 2) and len(kept) > 2


def test_batch_size_and_order_change_no_answer(loaded):
    model, config = loaded
    one = score_sources(model, with_eval(config, batch_size=1))
    many = score_sources(model, config)
    assert texts(one) == texts(many) and any(texts(many))


def test_answers_are_those_of_generating_one_sample_alone_with_its_gates(loaded):
    model, config = loaded
    collator = prompt_collator(model, config, withhold_task=False)
    (result, *_) = score_sources(model, config)
    for prediction in result.responses[:2]:
        batch = collator([prediction.sample])
        gates = torch.tensor(prediction.gates)[None]
        ids = model.generate(batch, gates=gates, max_new_tokens=6, do_sample=False)
        text = collator.processor.tokenizer.decode(ids[0], skip_special_tokens=True)
        assert text.strip() == prediction.text


def test_gates_off_answers_as_the_base_and_one_expert_alone_does_not(loaded):
    model, config = loaded
    off = score_sources(model, with_eval(config, gates="off"))
    alone = score_sources(model, with_eval(config, gates="grounding"))
    collator = prompt_collator(model, config, withhold_task=False)
    batch = collator([p.sample for p in off[0].responses])
    with torch.no_grad(), model.bank.context.disabled():
        ids = model.generate(batch, max_new_tokens=6, do_sample=False)
    base = collator.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert [t.strip() for t in base] == texts(off)[: len(base)]
    assert texts(alone) != texts(off)


def test_each_rule_for_gates_gives_the_gates_it_names(loaded):
    model, config = loaded
    collator = prompt_collator(model, config, withhold_task=False)
    sources = open_sources(chosen_sources(config), config.data, None)
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
    sample = open_sources(chosen_sources(config), config.data, None)["vqa"][0]
    assert told.prompt(sample).startswith("[vqa] ")
    assert untold.prompt(sample).startswith(sample.question)
    assert told([sample]).task_ids.tolist() == [0] and untold([sample]).task_ids.tolist() == [-1]


def test_held_out_tasks_are_scored_and_get_no_task_id(loaded, tmp_path):
    model, config = loaded
    source = config.data.validation["vqa"]
    rows = [json.loads(line) for line in Path(source.path).read_text().splitlines()]
    rows = [{**r, "task": "count", "answers": ["two"], "image": str(Path(source.path).parent / r["image"])}
            for r in rows]  # fmt: skip
    path = write_rows(tmp_path / "count.jsonl", rows)
    counted = replace(source, name="count", path=str(path), expert=None)
    results = score_sources(model, with_eval(config, sources={"count": counted}))
    assert results[0].tasks["count"][1].primary == "exact_match"
    routing = routing_record(model, config, results)
    assert routing["routing_accuracy"] is None and set(routing["per_task"]) == {"count"}


def test_samples_that_cannot_be_scored_stop_it_or_are_counted_by_rule(loaded, tmp_path):
    model, config = loaded
    source = config.data.validation["vqa"]
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
        score_sources(model, with_eval(config, sources={"bad": bad}))
    skipping = with_eval(config, sources={"bad": bad}, on_bad_sample="skip")
    record = score_sources(model, skipping)[0].record()
    assert record["n"] == 1 and record["num_skipped"] == 4
    assert record["skipped"] == {"empty answer": 2, "unknown task": 1, "missing image": 1}
    assert any("'dance' is neither" in text for text in record["skipped_samples"])


def test_a_set_in_which_nothing_can_be_scored_is_an_error(loaded, tmp_path):
    model, config = loaded
    row = {"image": "gone.png", "question": "what?", "task": "vqa", "answers": ["red"]}
    path = write_rows(tmp_path / "none.jsonl", [row])
    gone = replace(config.data.validation["vqa"], name="none", path=str(path))
    with pytest.raises(ValueError, match="none of 1 samples can be scored"):
        score_sources(model, with_eval(config, sources={"none": gone}, on_bad_sample="skip"))


@pytest.mark.slow
def test_token_routed_runs_are_scored_without_a_routing_record(tmp_path, capsys):
    run = make_run(tmp_path, router={"kind": "top_k", "top_k": 2, "granularity": "token"})
    eval_script.main([f"run={run}", "progress=false", "eval.max_new_tokens=3"])
    assert not (run / "eval" / "routing.json").exists()
    assert (run / "pictures" / "samples.png").exists()
    message = refused(capsys, f"run={run}", "eval.gates=without:vqa")
    assert "routed by itself" in message


@pytest.mark.slow
def test_gates_per_site_are_drawn_by_layer(tmp_path):
    run = make_run(tmp_path, router={"hidden": 8, "per_site": True})
    eval_script.main([f"run={run}", "progress=false", "eval.max_new_tokens=3"])
    routing = json.loads((run / "eval" / "routing.json").read_text())
    assert len(routing["per_site"]["vqa"]) == 4  # two layers with two sites each
    assert (run / "pictures" / "gates_by_layer.png").exists()


@pytest.mark.slow
def test_every_variant_of_an_evaluation_has_its_own_folder(run):
    assert variant_of(EvalConfig()) == ""
    changed = EvalConfig(gates="without:vqa", withhold_task=True)
    assert variant_of(changed) == "without-vqa_no_task"
    overrides = ["progress=false", "eval.gates=oracle", "eval.num_samples=1", "eval.num_images=0"]
    eval_script.main([f"run={run}", *overrides])
    assert (run / "eval" / "oracle" / "vqa.json").exists()


def test_beams_keep_their_samples_gates(loaded):
    model, config = loaded
    collator = prompt_collator(model, config, withhold_task=False)
    sources = open_sources(chosen_sources(config), config.data, None)
    whole, alone = (
        evaluate(
            model,
            sources["vqa"],
            collator,
            EvalConfig(batch_size=size, max_new_tokens=4, num_beams=3),
            name="vqa",
        )
        for size in (4, 1)
    )
    assert texts([whole]) == texts([alone])


def test_every_task_of_the_demo_has_a_benchmark():
    from data.world.questions import TASKS

    assert set(TASKS) <= set(BENCHMARKS)


FAST = ["progress=false", "eval.max_new_tokens=2", "eval.num_images=0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", ["eval.only=[vqa]", "eval.num_samples=2", "eval.score=false", "eval.sources={sources}"]
)
def test_a_part_of_an_evaluation_leaves_the_gates_of_the_whole_one_alone(run, part):
    eval_script.main([f"run={run}", *FAST])
    file, partial = run / "eval" / "routing.json", run / "eval" / "partial" / "routing.json"
    whole = json.loads(file.read_text())
    assert whole["samples_per_task"] == {"vqa": 4, "grounding": 4}
    assert whole["missing_tasks"] == [] and len(whole["sites"]) == 4
    partial.unlink(missing_ok=True)
    world = json.dumps(toy_world(run.parent)["data"]["sources"])
    eval_script.main([f"run={run}", *FAST, part.format(sources=world)])
    assert json.loads(file.read_text()) == whole
    assert json.loads(partial.read_text())["samples_per_task"] != whole["samples_per_task"] or (
        part == "eval.score=false"
    )


@pytest.mark.slow
def test_gates_without_a_trained_task_are_not_those_of_the_run(tmp_path, capsys):
    sources = toy_world(tmp_path)["data"]["sources"]
    data = {"sources": {task: {**source, "task": task} for task, source in sources.items()},
            "validation": {}, "tasks": ["vqa", "grounding"]}  # fmt: skip
    run = make_run(tmp_path, data=data, eval={"sources": {"vqa": {**sources["vqa"], "num_samples": 2}}})
    eval_script.main([f"run={run}", *FAST])
    assert not (run / "eval" / "routing.json").exists()
    report = json.loads((run / "eval" / "partial" / "routing.json").read_text())
    assert report["missing_tasks"] == ["grounding"]
    assert "not of all trained tasks" in capsys.readouterr().out


@pytest.mark.slow
def test_results_are_refused_for_other_weights_data_or_settings(tmp_path, capsys):
    run = make_run(tmp_path)
    eval_script.main([f"run={run}", *FAST])
    with pytest.raises(ValueError, match=r"vqa.json: was measured with other settings; run"):
        score_all(run, [])  # of answers of 2 tokens
    eval_script.main([f"run={run}", "progress=false", "eval.num_images=0"])
    record, answers = score_all(run, [])
    assert record["rows"]["routed experts"]["vqa"] == json.loads((run / "eval/vqa.json").read_text())["score"]
    assert record["trained"] == ["vqa", "grounding"] and [*answers] == ["base", "routed experts"]
    (run / "eval" / "vqa.jsonl").write_text("")  # as a kill between the two files leaves it
    with pytest.raises(ValueError, match="not of one evaluation"):
        score_all(run, [])
    eval_script.main([f"run={run}", "progress=false", "eval.num_images=0"])
    picture = tmp_path / "2.png"
    random_image(99).save(picture)
    with pytest.raises(ValueError, match="other data"):
        score_all(run, [])
    random_image(2).save(picture)
    score_all(run, [])
    model, _, config = load_model(run)
    with torch.no_grad():
        next(iter(model.bank.parameters())).add_(1.0)
    save_checkpoint(run, 2, model, config, TrainState(progress={"step": 2}))
    with pytest.raises(ValueError, match="other weights"):
        score_all(run, [])
    with pytest.raises(ValueError, match="step-000001, whose weights were not those of .*step-000002"):
        read_routing(routing_file(step_folder(run)), step_folder(run))


def test_rows_of_models_of_one_name_have_their_labels():
    experts = {"lora": SimpleNamespace(rank=40)}
    models = [SimpleNamespace(kind="run", path=f"runs/{n}", label=n, config=SimpleNamespace(experts=experts))
              for n in ("a", "b")]  # fmt: skip
    merged = SimpleNamespace(kind="adapter", path="runs/demo/merged/mean", label="mean")
    labelled = ["one LoRA, rank 40 (a)", "one LoRA, rank 40 (b)"]
    assert names_of_rows([*models, merged]) == [*labelled, "merged, mean"]


def test_gains_are_in_words_with_the_error_of_paired_differences():
    def rows(*scores: float) -> list[dict]:
        about = {"task": "t", "question": "?", "answers": []}
        return [about | {"id": i, "image_id": i, "score": score} for i, score in enumerate(scores)]

    found = {
        "base": {"a": rows(0.0, 0.0, 0.0, 1.0), "count": rows(1.0, 1.0)},
        "one LoRA, rank 4": {"a": rows(1.0, 0.0, 1.0, 1.0), "count": rows(0.0, 1.0)},
        "routed experts": {"a": rows(1.0, 1.0, 1.0, 1.0), "count": rows(1.0, 1.0)},
    }
    first, second = gains(found, ["a"])
    beside = "one LoRA, rank 4 75, routed +25.0 ± 25.0 against it"
    assert first == f"trained on (a): routed 100, base 25; {beside}"
    assert second.startswith("not trained on, only the base was (count): routed 100, base 100; one LoRA, rank 4 50")


def oracle_world(folder: Path, *, expert: str | None, task: str) -> dict[str, dict]:
    """An eval source called apart from the training sources, whose rows may be of a task of theirs."""
    rows = [{"image": f"{i}.png", "task": task, "question": "what?", "answers": ["red"]} for i in range(3)]
    path = write_rows(folder / f"{task}_test.jsonl", rows)
    source = {"format": "jsonl", "path": str(path)}
    return {f"{task}_test": source | ({"expert": expert} if expert else {})}


def test_the_oracle_takes_the_expert_of_the_training_source_of_a_name_or_task(loaded, run):
    model, config = loaded
    found = {}
    for task in ("vqa", "grounding"):
        sources = load(EvalConfig, None, [("sources", oracle_world(run.parent, expert=None, task=task))]).sources
        if task == "grounding":
            (source,) = sources.values()
            sources = {"grounding": replace(source, name="grounding", benchmark="vqa")}
        (result,) = score_sources(model, with_eval(config, sources=sources, gates="oracle"))
        found[task] = [p.gates[0] for p in result.responses]
    assert found == {"vqa": [[1.0, 0.0]] * 3, "grounding": [[0.0, 1.0]] * 3}


def test_the_oracle_refuses_samples_that_no_expert_is_known_for(loaded, run):
    model, config = loaded
    sources = load(EvalConfig, None, [("sources", oracle_world(run.parent, expert=None, task="count"))]).sources
    with pytest.raises(ValueError, match="3 of 3 samples of count_test have no expert"):
        score_sources(model, with_eval(config, sources=sources, gates="oracle"))
    score_sources(model, with_eval(config, sources=sources))  # the router needs none


@pytest.mark.slow
def test_a_task_of_ones_own_is_scored_by_exact_match_and_named_so(tmp_path, capsys):
    rows = [{"image": "0.png", "task": "signs", "question": "what?", "answers": ["red"]}] * 2
    toy_world(tmp_path)
    path = write_rows(tmp_path / "signs.jsonl", rows)
    sources = {"signs": {"format": "jsonl", "path": str(path), "expert": "vqa"}}
    data = {"sources": sources, "validation": sources, "tasks": ["signs"]}
    run = make_run(tmp_path, data=data)
    eval_script.main([f"run={run}", *FAST])
    assert json.loads((run / "eval/signs.json").read_text())["tasks"]["signs"]["primary"] == "exact_match"
    assert "exact_match" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("place", ["logits", "lora", "alpha", "router"])
def test_a_model_that_computes_nan_is_an_error_that_names_model_and_sample(tmp_path, capsys, place):
    run = make_run(tmp_path)
    adapter = next((run / "checkpoints").glob("step-*/experts/vqa"))
    model, _, config = load_model(run)
    with torch.no_grad():
        parts = {
            "logits": [p for p in model.bank.parameters()],
            "router": [*model.router.parameters()],
        }
        for parameter in parts.get(place, []):
            parameter.fill_(1e36 if place == "logits" else float("nan"))
    save_checkpoint(run, 2, model, config, TrainState(progress={"step": 2}))
    paths, message = [f"run={run}"], ["run", "router", "is not finite"]
    if place == "logits":
        message = ["error: run: source 'vqa', sample", "the model's logits are not finite"]
    if place == "lora":
        file = adapter / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors[min(tensors)][0, 0] = float("inf")
        save_file(tensors, file)
    if place == "alpha":
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": float("nan")}))
    if place in ("lora", "alpha"):
        paths, message = [f"models=[{adapter}]", f"like={run}"], [str(adapter)]
    shown = refused(capsys, *paths, *FAST)
    assert all(part in shown for part in message), shown


@pytest.mark.slow
@pytest.mark.parametrize("name", ["../x", "/tmp/x", "routing", "Routing", ".hidden", "", "a/b", "a\\b", "x" * 300])
def test_names_of_data_sets_stay_inside_the_run(run, capsys, name):
    sources = {name: toy_world(run.parent)["data"]["sources"]["vqa"]}
    before = sorted(run.parent.rglob("*"))
    shown = refused(capsys, f"run={run}", *FAST, f"eval.sources={json.dumps(sources)}")
    assert repr(name) in shown or "name" in shown
    assert sorted(run.parent.rglob("*")) == before


@pytest.mark.slow
def test_two_names_that_one_file_would_have_are_refused(run, capsys):
    source = toy_world(run.parent)["data"]["sources"]["vqa"]
    sources = {"Vqa": source, "vqa": source}
    shown = refused(capsys, f"run={run}", *FAST, f"eval.sources={json.dumps(sources)}")
    assert "two data sets have the name" in shown


@pytest.mark.slow
def test_settings_are_checked_for_all_models_before_the_first_is_scored(run, tmp_path, capsys):
    vqa = toy_world(tmp_path)["data"]["sources"]["vqa"]
    other = make_run(tmp_path, eval={"sources": {"vqa": {**vqa, "num_samples": 1}}})
    for file in (run / "eval").glob("*.json"):
        file.unlink()
    models = [f"run={run}", f"models=[{other}]"]
    shown = refused(capsys, *models, *FAST, "eval.only=[grounding]")
    assert "no data set 'grounding'; choices: vqa" in shown and not [*(run / "eval").glob("*.json")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run={run}", "like={run}"], "like: has no effect on a run"),
        (["run={run}", "like=gone.yaml"], "like: gone.yaml: "),
        (["models=[{base}]", "like=gone.yaml"], "like: gone.yaml: "),
        (["models=[{base}]", "like={run}", "eval.compare=[off]"], "eval.compare: has no effect"),
        (["models=[{base}]", "like={run}", "eval.gates=uniform"], "eval.gates: has no effect on checkpoints"),
        (["run={base}"], "is not a run; name it by models=[...]"),
        ([], "run: missing"),
        (["run={run}", "eval.every=5"], "eval.every: has no effect here"),
        (["run={run}", "batch_size=5"], "batch_size"),
        (["run={run}", "eval.batch_size=0"], "eval.batch_size: must be 1 or more, got 0"),
        (["run={run}", "eval.only=[]"], "only: names no data set"),
        (["run={run}", "device=cuda:99"], "device: no 'cuda:99' on this machine"),
    ],
)
def test_an_argument_without_effect_or_meaning_is_refused(run, capsys, arguments, message):
    places = {"run": run, "base": run.parent / "base"}
    assert message in refused(capsys, *(argument.format(**places) for argument in arguments))


@pytest.mark.slow
def test_models_of_one_name_get_labels_that_differ_and_differences_by_question(run, tmp_path, capsys):
    """A path that is YAML text, too: `lr=0.1,rank=2` and `a: b` are names of folders."""
    adapter = next((run / "checkpoints").glob("step-*/experts/grounding"))
    names = ("a: {b}", "lr=0.1,rank=2 #3")
    for name in names:
        shutil.copytree(adapter, tmp_path / name / "soups")
    models = json.dumps([str(tmp_path / name / "soups") for name in names])
    eval_script.main([f"models={models}", f"like={run}", *FAST, "eval.only=[vqa]"])
    shown = capsys.readouterr().out
    labels = [f"{name}-soups" for name in names]
    assert all(f"{label}: scores" in shown for label in labels)
    assert f"Difference to {labels[0]} on the same questions" in shown and "+0±0" in shown
    assert "metrics: vqa vqa_accuracy" in shown
    assert {path.name for path in (run / "others").iterdir()} >= set(labels)


@pytest.mark.slow
def test_results_of_the_same_weights_data_and_settings_are_reused(tmp_path, capsys):
    run = make_run(tmp_path)
    models = [f"run={run}", "eval.compare=[off]", *FAST]
    eval_script.main(models)
    table = capsys.readouterr().out.split("Scores in per cent")[1]
    file = run / "eval" / "vqa.json"
    written = file.stat().st_mtime_ns
    eval_script.main([*models, "reuse=true"])
    shown = capsys.readouterr().out
    assert "results of vqa, grounding are those in" in shown and shown.endswith(table)
    assert file.stat().st_mtime_ns == written
    random_image(99).save(tmp_path / "2.png")
    (run / "eval" / "off" / "vqa.jsonl").write_text("")
    for change, reused in (
        ([], None),
        (["eval.max_new_tokens=3"], None),
        (["eval.max_new_tokens=3"], "vqa, gr"),
    ):
        eval_script.main([*models, "reuse=true", *change])
        assert (f"run: router: results of {reused}" in capsys.readouterr().out) is (reused is not None)


def test_a_question_is_paired_with_itself_whatever_the_order_and_the_number():
    """Gains by question +1, 0, +1, the last two about one image: 2/3, and clusters of 1/3 and -1/3."""

    def row(number, image, score):
        return {
            "task": "vqa",
            "id": number,
            "image_id": image,
            "question": "q",
            "answers": [],
            "score": score,
        }

    first = [row("1", "a", 0.0), row("2", "b", 0.5), row("3", "b", 0.0), row("4", "c", 1.0)]
    second = [row("3", "b", 1.0), row("1", "a", 1.0), row("2", "b", 0.5), row("9", "d", 1.0)]
    found = paired_difference(first, second)
    assert found["value"] == pytest.approx(2 / 3)
    assert found["se"] == pytest.approx((2 * 2 * (1 / 3) ** 2) ** 0.5 / 3)
    assert paired_difference(first, [{**r, "question": "another"} for r in first]) is None


def test_no_table_is_wider_than_a_terminal_or_cuts_a_name():
    names = [f"vision_tower_and_projector_{i}" for i in range(9)]
    rows = {f"model {i}": {n: {"value": 0.5, "se": 0.1} for n in names} for i in range(3)}
    console = Console(width=80, file=io.StringIO())
    console.print(comparison(rows))
    shown = console.file.getvalue()
    assert all(name in shown for name in names) and max(map(len, shown.splitlines())) <= 80


@settings(max_examples=200, deadline=None, derandomize=True)
@given(name=st.text(max_size=8) | st.text(st.sampled_from("./\\ab\0\n"), max_size=8))
def test_any_name_of_a_data_set_is_a_file_of_its_folder_or_refused(tmp_path_factory, name):
    folder = tmp_path_factory.getbasetemp()
    if is_file_name(name):
        file = folder / f"{name}.json"
        file.write_text("")
        assert file.parent.resolve() == folder.resolve() and file.name in os.listdir(folder)
        file.unlink()
    else:
        with pytest.raises(ValueError, match="must be a file's name"):
            SourceConfig(name=name, num_samples=1)


PLAIN = st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.text(max_size=4)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.sampled_from(sorted(EvalConfig.__dataclass_fields__)),
        PLAIN | st.lists(PLAIN | st.dictionaries(st.just("name"), PLAIN), max_size=2),
        max_size=3,
    )
)
def test_any_settings_are_taken_or_refused_in_one_line(given_settings):
    try:
        found = load(EvalConfig, None, list(given_settings.items()))
    except ValueError as error:
        assert "\n" not in str(error) and any(key in str(error) for key in (*given_settings, "data."))
    else:
        assert found.num_beams >= 1


@pytest.mark.slow
def test_a_run_whose_base_has_changed_is_scored_on_request_alone(tmp_path, capsys):
    run = make_run(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file({key: 1.05 * tensor for key, tensor in tensors.items()}, file, {"format": "pt"})
    assert "other_base=true" in refused(capsys, f"run={run}", *FAST)
    eval_script.main([f"run={run}", *FAST, "other_base=true"])
    assert (run / "eval" / "vqa.json").exists()


@pytest.mark.slow
def test_a_file_of_settings_lies_below_the_command_line_and_over_each_run(run, tmp_path):
    file = tmp_path / "eval.yaml"
    file.write_text("device: cpu\neval: {batch_size: 3, gates: off}\n")
    command, given = read_command([str(file)], [f"run={run}", "eval.batch_size=2"])
    (model,) = models_of(command, given)
    assert command.device == "cpu" and model.gate_rules == ["off"] and model.is_full
    assert model.config.eval.batch_size == 2
    assert model.config.eval.sources == load_config(run.parent / "run.yaml").eval.sources
