"""Settings: merged in order, checked, described, and wrong ones refused by name."""

from pathlib import Path

import pytest

from moa.benchmarks.sources import EvalSettings
from moa.config import RunConfig, load_config
from moa.settings import describe, load, read_yaml, settings, to_yaml

EXPERTS = "experts={a: {rank: 2}, b: {rank: 3}}"
SOURCE = "data.sources=[{name: s, task: vqa, num_samples: 4, expert: a}]"


def error_of(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ValueError) as error:
        load_config(path, [EXPERTS, *overrides])
    return str(error.value)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("experts: {a: {rank: 2}}\ntrain: {batch_size: 8, clip_norm: 0.5}\n")
    config = load_config(file, ["train.batch_size=16"])
    assert (config.train.batch_size, config.train.clip_norm) == (16, 0.5)
    assert (
        config.train.keep_last
        == RunConfig.__dataclass_fields__["train"].default_factory().keep_last
    )


def test_an_override_replaces_what_stands_at_its_key(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("experts: {a: {rank: 2}, b: {rank: 3}}\n")
    assert list(load_config(file, ["experts={lora:{rank:8}}"]).experts) == ["lora"]
    assert load_config(file, ["experts.b.rank=5"]).experts["b"].rank == 5


def test_a_list_entry_is_named_by_its_number_or_its_name():
    config = load_config(
        None, [EXPERTS, SOURCE, "data.sources.s.weight=2", "data.sources.0.seed=7"]
    )
    assert (config.data.sources[0].weight, config.data.sources[0].seed) == (2.0, 7)
    assert "choices: [0, 's']" in error_of(SOURCE, "data.sources.t.weight=2")


def test_the_resolved_config_reads_back_as_itself(tmp_path):
    config = load_config(None, [EXPERTS, SOURCE, "stages=[{name: joint, steps: 3}]"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("router.topk=1", ["router.topk", "Did you mean: 'top_k'"]),
        ("stages=[{name: joint, step: 3}]", ["stages.0.step", "'steps'"]),
        ("experts.a.rnk=3", ["experts.a.rnk", "'rank'"]),
        ("routr.kind=softmax", ["routr", "'router'"]),
        ("router.kind=hard", ["router.kind", "'hard'", "softmax", "anchors"]),
        ("router.evidence=[image, sound]", ["router.evidence", "'sound'", "ocr"]),
        ("train.batch_size=many", ["train.batch_size", "'many'"]),
        ("stages={joint: {steps: 3}}", ["stages", "list"]),
        ("router=[1]", ["router", "mapping"]),
        ("stages=[{name: joint}]", ["stages[0].steps", "missing"]),
        ("train.batch_size", ["'train.batch_size'", "key.sub=value"]),
    ],
)
def test_a_wrong_key_type_or_choice_is_refused_by_name(override, expected):
    message = error_of(override)
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["router.kind=top_k", "router.top_k=3"], ["router.top_k", "2 experts"]),
        (["router.granularity=token", "router.kind=sigmoid"], ["router.granularity", "sigmoid"]),
        (["router.weights={a: 1}"], ["router.weights", "no effect", "softmax"]),
        (["router.kind=fixed", "router.weights={c: 1}"], ["router.weights.c", "['a', 'b']"]),
        (["router.evidence=[]"], ["router.evidence", "nothing"]),
        (["train.micro_batch_size=5"], ["train.micro_batch_size", "batch_size=32"]),
        ([SOURCE, "data.sources.s.expert=c"], ["data.sources.s.expert", "'c'", "['a', 'b']"]),
        ([SOURCE, "data.sources.s.task=cook"], ["data.sources.s.task", "'cook'", "caption"]),
        ([SOURCE, "data.sources.s.weight=0"], ["data.sources.s.weight", "above 0"]),
        ([SOURCE, "data.sources.s.path=x"], ["data.sources.s.path", "format=scenes"]),
        (["stages=[{name: router, steps: 2}]"], ["data.sources", "names none"]),
        ([SOURCE, "router.kind=one_hot", "stages=[{name: router, steps: 2}]"],
         ["stages.router", "one_hot learns nothing"]),
        ([SOURCE, "stages=[{name: joint, steps: 2, warmup_steps: 3}]"], ["warmup_steps", "0..2"]),
        ([SOURCE, "data.ocr_engine=true"], ["data.ocr_engine", "data.ocr_cache"]),
        (["experts={}"], ["experts", "names none"]),
        (["router.null_expert=true", "router.kind=sigmoid"], ["router.null_expert", "sigmoid"]),
        ([SOURCE, "data.sources.s.expert=none"], ["s.expert", "with router.null_expert=true"]),
        (["experts={none: {}}"], ["experts.none", "no expert"]),
    ],
)  # fmt: skip
def test_an_impossible_pair_is_refused_with_its_rule(overrides, expected):
    message = error_of(*overrides)
    assert all(part in message for part in expected), message


def test_a_config_file_that_is_missing_or_broken_is_named(tmp_path):
    assert "nowhere.yaml: no such config file" in error_of(path=tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    assert "broken.yaml: not valid YAML" in error_of(path=broken)


def test_help_lists_every_setting_with_a_line_of_doc():
    rows = settings(RunConfig, "")
    undocumented = [key for key, _, _, doc in rows if not doc]
    assert undocumented == []
    text = describe(RunConfig)
    for key in (
        "router.top_k=2",
        "stages.N.lr.experts=",
        "experts.NAME.rank=null",
        "train.precision=",
    ):
        assert key in text


RUNS = [file for file in sorted(Path("configs").glob("*.yaml")) if "stages" in read_yaml(file)]


@pytest.mark.parametrize("file", RUNS, ids=lambda f: f.name)
def test_every_shipped_run_config_loads(file):
    assert load_config(file).stages


def test_the_share_of_a_source_is_a_weight_or_a_number_of_draws():
    entry = "{{name: {}, task: vqa, num_samples: 4, expert: a, {}}}"
    both = entry.format("s", "weight: 2.0, count: 3")
    assert "data.sources.s: has weight and count; choose one" in error_of(f"data.sources=[{both}]")
    mixed = f"{entry.format('s', 'count: 3')}, {entry.format('t', 'weight: 2.0')}"
    message = "data.sources.t: count or epochs of s need count or epochs here too"
    assert message in error_of(f"data.sources=[{mixed}]")
    assert "data.sources.s.epochs: must be above 0" in error_of(
        f"data.sources=[{entry.format('s', 'epochs: 0')}]"
    )


def test_off_and_no_are_words_where_words_are_asked_for_and_false_where_booleans_are():
    found = load(EvalSettings, None, ["gates=off", "progress=off"])
    assert (found.gates, found.progress) == ("off", False)


def test_an_unknown_key_of_a_list_entry_is_named_there_and_not_where_its_name_stands_elsewhere():
    entry = "data.sources=[{name: s, task: vqa, num_samples: 4, kind: scenes}]"
    with pytest.raises(ValueError, match=r"data\.sources\.0\.kind: Key 'kind' not in"):
        load(RunConfig, None, ["router.kind=softmax", entry])
