"""Settings: merged in order, checked, described, and wrong ones refused by name."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st

from moa.cli.settings import describe, load, settings, to_yaml
from moa.cli.strict_yaml import parse_yaml, read_yaml
from moa.config import RunConfig, load_config
from moa.evaluation.settings import EvalCommand
from moa.federated.config import FederatedConfig
from moa.merging.settings import MergeExperts, StackLayers
from moa.sections import LossConfig, RouterConfig
from scripts.align import AlignConfig
from scripts.average_checkpoints import AverageConfig
from scripts.data import Settings as DataSettings
from scripts.learn_weights import LearnConfig
from scripts.merge_parts import PartsConfig

EXPERTS = "experts={a: {rank: 2}, b: {rank: 3}}"
SOURCE = "data.sources={s: {task: vqa, num_samples: 4, expert: a}}"

COPIES = [SOURCE, "experts.b.rank=2", "stages={experts: {steps: 2, expert: a}, joint: {steps: 2, copy_of: a}}"]


def error_of(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ValueError) as error:
        load_config(path, [EXPERTS, *overrides])
    return str(error.value)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("experts: {a: {rank: 2}}\ntrain: {batch_size: 8, clip_norm: 0.5}\n")
    config = load_config(file, ["train.batch_size=16"])
    assert (config.train.batch_size, config.train.clip_norm) == (16, 0.5)
    assert config.train.keep_last == RunConfig.__dataclass_fields__["train"].default_factory().keep_last


def test_an_override_replaces_what_stands_at_its_key(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("experts: {a: {rank: 2}, b: {rank: 3}}\n")
    assert list(load_config(file, ["experts={lora:{rank:8}}"]).experts) == ["lora"]
    assert load_config(file, ["experts.b.rank=5"]).experts["b"].rank == 5


def test_an_entry_of_a_mapping_has_its_key_as_its_name_and_keeps_its_place():
    config = load_config(None, [EXPERTS, SOURCE, "data.sources.t={num_samples: 3}",
                                "data.sources.s.weight=2"])  # fmt: skip
    assert list(config.data.sources) == ["s", "t"] and config.data.sources["t"].name == "t"
    assert config.data.sources["s"].weight == 2.0
    stages = "stages={late: {trains: joint, steps: 3}, joint: {steps: 2}}"
    assert [s.kind for s in load_config(None, [*RUN, stages]).stages.values()] == ["joint"] * 2


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("stages=[{name: joint, steps: 3}]",
         "stages: is a mapping by name: write 'joint:' instead of '- name: joint'"),
        ("data.sources=[{name: a b}]",
         "data.sources: is a mapping by name: write 'a b:' instead of '- name: a b'"),
        ("data.sources.t={name: t, num_samples: 3}",
         "data.sources.t.name: leave it out: 't' is the name already"),
    ],
)  # fmt: skip
def test_a_list_of_an_older_file_is_refused_by_a_line_with_the_way_to_write_it(override, line):
    assert error_of(SOURCE, override) == line


def test_a_second_file_is_laid_over_the_first(tmp_path):
    first, second = tmp_path / "run.yaml", tmp_path / "preset.yaml"
    first.write_text(
        "experts: {a: {rank: 2, alpha: 4}, b: {}}\nrouter: {hidden: 8}\nseed: 1\n"
        "data: {tasks: [vqa, caption], sources: {s: {num_samples: 4, expert: a}}}\n"
    )
    second.write_text(
        "experts: {a: {rank: 3}}\nrouter: {kind: top_k}\nseed: 2\n"
        "data: {tasks: [vqa], sources: {t: {num_samples: 5}, s: {weight: 2}}}\n"
    )
    config = load_config([first, second], ["seed=3"])
    assert (config.experts["a"].rank, config.experts["a"].alpha) == (3, 4.0)
    assert (config.router.kind, config.router.hidden, config.seed) == ("top_k", 8, 3)
    assert config.data.tasks == ["vqa"] and list(config.data.sources) == ["s", "t"]
    assert config.data.sources["s"].expert == "a" and config.data.sources["s"].weight == 2.0
    second.write_text("data: {sources: {s: null, t: {num_samples: 5, expert: b}}}\nexperts: {a: null}\n")
    config = load_config([first, second], ["stages={joint: {steps: 3}, router: {steps: 1}}", "stages.router=null"])
    assert (list(config.data.sources), list(config.experts), list(config.stages)) == (["t"], ["b"], ["joint"])
    with pytest.raises(ValueError, match="data.sources.u: is null, which takes an entry out, and there is none"):
        load_config([first, second], ["data.sources.u=null"])
    second.write_text("routr: {kind: top_k}\n")
    with pytest.raises(ValueError, match=r"run.yaml, .*preset.yaml: routr: Key 'routr' not in"):
        load_config([first, second])


def test_the_resolved_config_reads_back_as_itself(tmp_path):
    config = load_config(None, [EXPERTS, SOURCE, "stages={joint: {steps: 3}}"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("router.topk=1", ["router.topk", "Did you mean one of: 'top_k', 'top_p'"]),
        ("stages={joint: {step: 3}}", ["stages.joint.step", "'steps'"]),
        ("experts.a.rnk=3", ["experts.a.rnk", "'rank'"]),
        ("routr.kind=softmax", ["routr", "'router'"]),
        ("router.kind=hard", ["router.kind", "'hard'", "softmax", "anchors"]),
        ("router.evidence=[image, sound]", ["router.evidence", "'sound'", "ocr"]),
        ("train.batch_size=many", ["train.batch_size", "'many'"]),
        ("data.tasks={a: 1}", ["data.tasks", "list"]),
        ("router=[1]", ["router", "mapping"]),
        ("stages={joint: {}}", ["stages.joint.steps", "missing"]),
        ("train.batch_size", ["'train.batch_size'", "key.sub=value"]),
    ],
)
def test_a_wrong_key_type_or_choice_is_refused_by_name(override, expected):
    message = error_of(override)
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["router.kind=top_k", "router.top_k=3"], ["router.top_k", "2 routed experts"]),
        (["router.granularity=token", "router.kind=anchors"], ["router.granularity", "anchors"]),
        (["router.granularity=token", "router.pool=vote", "losses.z=1"], ["losses.z", "logarithms"]),
        (["router.share=block"], ["router.share", "granularity=sample"]),
        (["router.pool=vote"], ["router.pool", "granularity=sample"]),
        (["router.granularity=token", "router.pool=vote", "router.kind=sigmoid"], ["router.pool", "softmax, top_k"]),
        (["router.granularity=token", "router.added_up=[x]"], ["router.added_up", "granularity sample"]),
        (["router.granularity=token", "router.unknown_task=mean"], ["router.unknown_task", "granularity sample"]),
        (["router.evidence=[image]", "router.unknown_task=none"], ["router.unknown_task", "sees the task"]),
        (["router.kind=fixed", "router.unknown_task=mean"], ["router.unknown_task", "fixed"]),
        (["router.kind=fixed", "router.root_gradient=true"], ["router.root_gradient", "fixed"]),
        (["experts.a.rank_gates=task", "router.root_gradient=true"], ["router.root_gradient", "experts.a.rank_gates"]),
        (["experts.a={kind: adapter, targets: [x]}", "router.root_gradient=true"],
         ["router.root_gradient", "experts.a"]),
        (["experts.a.dropout=0.1", "router.root_gradient=true"], ["router.root_gradient", "experts.a.dropout"]),
        (["router.renormalize=false"], ["router.renormalize", "top_k, top_p", "softmax"]),
        (["experts.b.gate=rest"], ["experts.b.gate", "would be 0", "softmax", "renormalize=false"]),
        (["experts.b.gate=rest", "router.kind=sigmoid"],
         ["experts.b.gate: rest would be below 0", "sigmoid may sum to more than 1", "renormalize=false"]),
        (["experts.b.gate=rest", "router.kind=fixed", "router.weights={a: 1.5}"], ["rest would be below 0", "fixed"]),
        (["experts.c.gate=confidence", "router.unknown_task=mean"], ["router.unknown_task: mean", "experts.c"]),
        (["data.tasks=[]"], ["data.tasks: names none", "router.evidence"]),
        (["data.tasks=[]", "router.evidence=[image]", "experts.a.rank_gates=task"],
         ["data.tasks: names none", "experts.a.rank_gates"]),
        (["losses.load=1"], ["losses.load", "router.kind=top_k", "gaussian"]),
        (["router.weights={a: 1}"], ["router.weights", "no effect", "softmax"]),
        (["router.threshold=0.1"], ["router.threshold", "no effect", "softmax"]),
        (["router.noise=logistic"], ["router.noise", "gaussian, learned, gumbel", "softmax"]),
        (["router.kind=fixed", "router.noise=gaussian"], ["router.noise", "none", "fixed"]),
        (["router.granularity=token", "router.noise=learned", "router.pool=vote"],
         ["router.noise", "no logits to vote"]),
        (["router.noise=learned", "router.noise_scale=2"], ["router.noise_scale", "no effect", "learned"]),
        (["router.kind=anchors", "router.score=cosine"], ["router.score", "no effect", "anchors"]),
        (["router.score=arrow"], ["router.score", "granularity token"]),
        ([SOURCE, "router.granularity=token", "router.score=arrow", "stages={router: {steps: 2}}"],
         ["stages.router", "score=arrow learns nothing"]),
        (["router.per_task=true"], ["router.per_task", "granularity token"]),
        (["router.granularity=token", "router.per_task=true", "router.noise=learned"], ["router.per_task", "learned"]),
        (["router.score=attention"], ["router.score", "granularity token"]),
        (["router.granularity=token", "router.score=arrow", "router.noise=learned"], ["router.noise", "another score"]),
        (["router.granularity=token", "router.score=attention", "router.share=input"], ["router.share", "site"]),
        (["router.granularity=token", "router.score=attention", "experts.a.rank_gates=token"],
         ["router.score", "experts.a has others"]),
        (["router.score=table"], ["router.evidence", "[task]", "'image'"]),
        (["router.score=table", "router.evidence=[task]", "router.kind=threshold"], ["router.threshold", "number"]),
        (["router.straight_through=true"], ["router.straight_through", "top_k, top_p", "softmax"]),
        (["router.kind=fixed", "router.weights={c: 1}"], ["router.weights.c", "['a', 'b']"]),
        (["router.evidence=[]"], ["router.evidence", "nothing"]),
        (["train.micro_batch_size=5"], ["train.micro_batch_size", "batch_size=32"]),
        ([SOURCE, "data.sources.s.expert=c"], ["data.sources.s.expert", "'c'", "['a', 'b']"]),
        ([SOURCE, "data.sources.s.task=cook"], ["data.sources.s.task", "'cook'", "caption"]),
        ([SOURCE, "data.sources.s.weight=0"], ["data.sources.s.weight", "above 0"]),
        ([SOURCE, "data.sources.s.path=x"], ["data.sources.s.path", "format=scenes"]),
        (["stages={router: {steps: 2}}"], ["data.sources", "names none"]),
        ([SOURCE, "router.kind=one_hot", "stages={router: {steps: 2}}"],
         ["stages.router", "one_hot learns nothing"]),
        ([SOURCE, "stages={joint: {steps: 2, warmup_steps: 3}}"], ["warmup_steps", "0..2"]),
        (["data.tasks=[vqa, vqa]"], ["data.tasks", "vqa twice"]),
        ([SOURCE, "data.ocr_engine=true"], ["data.ocr_engine", "data.ocr_cache"]),
        (["experts={}"], ["experts", "names none"]),
        (["router.null_expert=true", "router.kind=sigmoid"], ["router.null_expert", "sigmoid"]),
        ([SOURCE, "data.sources.s.expert=none"], ["s.expert", "with router.null_expert=true"]),
        (["experts={none: {}}"], ["experts.none", "no expert"]),
        ([SOURCE, "stages.experts={steps: 2, expert: a, only: [b]}"],
         ["stages.experts.only: ['b'] learns nothing", "['a']"]),
        ([SOURCE, "stages.experts={steps: 2, only: [b]}"], ["stages.experts.only: ['b'] learns nothing"]),
        (["router.kind=one_hot", "experts.c.gate=confidence"], ["experts.c.gate", "would be 0", "one_hot"]),
        (["router.kind=top_k", "router.top_k=1", "experts.c.gate=confidence"], ["experts.c.gate", "would be 0"]),
        (["experts.b.gate=confidence"], ["experts.b.gate", "would be 0", "softmax"]),
        (["router.kind=anchors", "experts.b.gate=joint"], ["experts.b.gate", "joint", "anchors"]),
        (["experts.b=null", "losses.crosstalk=0.1"], ["losses.crosstalk: ", "two routed"]),
        (["experts.b=null", "losses.crosstalk_end=0.1"], ["losses.crosstalk_end", "two routed"]),
        (["experts.a.factors=[B]", "experts.b.factors=[B]", "losses.orthogonality=1"],
         ["losses.orthogonality", "no routed expert trains"]),
        ([SOURCE, "router.kind=anchors", "stages.router={steps: 2, gates: {blend: 0.5}}"],
         ["stages.router.gates", "no effect", "anchors"]),
        ([*COPIES, "experts.a.gate=always"], ["stages.joint.copy_of: a has the gate always"]),
        ([*COPIES, "experts.a.gate=with:b"], ["stages.joint.copy_of: a has the gate with:b"]),
        ([*COPIES, "experts.c.gate=joint"], ["stages.joint.copy_of: c has a share"]),
        ([*COPIES, "experts.c.gate=confidence", "stages.experts.gates.leak=0.3"],
         ["stages.joint.copy_of: c has a share"]),
        ([*COPIES, *(f"experts.{n}={{rank: 2, init: null_space, factors: [B], init_statistics: [x]}}" for n in "ab")],
         ["stages.joint.copy_of: would overwrite"]),
        (["experts={off: {rank: 2}}"], ["experts.off: means other gates in eval.gates"]),
    ],
)  # fmt: skip
def test_an_impossible_pair_is_refused_with_its_rule(overrides, expected):
    message = error_of(*overrides)
    assert all(part in message for part in expected), message


def test_copies_need_gates_that_sum_to_one_where_the_router_decides():
    config = load_config(None, [EXPERTS, *COPIES])
    for cause, own in {
        "renormalize=false": {"kind": "top_k", "renormalize": False},
        "added_up": {"added_up": ["x"]},
        "kind=sigmoid": {"kind": "sigmoid", "threshold": 0.1},
        "threshold=0.1": {"kind": "sigmoid", "normalize": True, "threshold": 0.1},
        "threshold=0.5": {"kind": "threshold", "threshold": 0.5},
        "kind=likeness": {"kind": "likeness"},
        "weights of sum 0.7": {"kind": "fixed", "weights": {"a": 0.3, "b": 0.4}},
    }.items():
        router = RouterConfig(**own)
        with pytest.raises(ValueError, match=rf"stages.joint.copy_of: router.{cause}: gates may sum .* as a; choose"):
            replace(config, router=router)
        apart = {**config.stages, "joint": replace(config.stages["joint"], trains="experts")}
        replace(config, router=router, stages=apart)  # each sample has its own expert alone
    kinds = ("softmax", "top_k", "top_p", "threshold", "one_hot", "fixed", "anchors")
    allowed = [{"kind": kind} for kind in kinds] + [{"null_expert": True}, {"kind": "sigmoid", "normalize": True}]
    allowed += [{"kind": "threshold", "threshold": 0.4}, {"kind": "fixed", "weights": {"a": 0.25, "b": 0.75}}]
    for own in allowed:
        replace(config, router=RouterConfig(**own))


def test_a_config_file_that_is_missing_or_broken_is_named(tmp_path):
    assert "nowhere.yaml: no such config file" in error_of(path=tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    assert "broken.yaml: not valid YAML" in error_of(path=broken)


@pytest.mark.slow
def test_help_lists_every_setting_with_a_line_of_doc():
    rows = settings(RunConfig, "")
    undocumented = [key for key, _, _, doc in rows if not doc]
    assert undocumented == []
    text = describe(RunConfig)
    for key in (
        "router.top_k=2",
        "stages.NAME.lr.experts=",
        "experts.NAME.rank=null",
        "train.precision=",
    ):
        assert key in text


RUNS = [file for file in sorted(Path("configs").glob("*.yaml")) if "model" in read_yaml(file)]


@pytest.mark.parametrize("file", RUNS, ids=lambda f: f.name)
def test_every_shipped_run_config_loads(file):
    assert load_config(file).stages


@pytest.mark.parametrize("file", sorted(Path("configs/shapes").glob("*.yaml")), ids=lambda f: f.name)
def test_every_shipped_shape_lies_over_the_demo(file):
    demo, shape = load_config("configs/demo.yaml"), load_config(["configs/demo.yaml", file])
    assert shape.out != demo.out
    parts = [(c.experts, c.stages, c.data, c.router) for c in (shape, demo)]
    assert parts[0] != parts[1]


def test_the_share_of_a_source_is_a_weight_or_a_number_of_draws():
    entry = "{}: {{task: vqa, num_samples: 4, expert: a, {}}}"
    both = entry.format("s", "weight: 2.0, count: 3")
    assert "data.sources.s: has weight and count; choose one" in error_of(f"data.sources={{{both}}}")
    mixed = f"{entry.format('s', 'count: 3')}, {entry.format('t', 'weight: 2.0')}"
    message = "data.sources.t: count or epochs of s need count or epochs here too"
    assert message in error_of(f"data.sources={{{mixed}}}")
    assert "data.sources.s.epochs: must be above 0" in error_of(f"data.sources={{{entry.format('s', 'epochs: 0')}}}")


def test_off_and_no_are_words_where_words_are_asked_for_and_false_where_booleans_are():
    found = load(EvalCommand, None, ["eval.gates=off", "progress=off"])
    assert (found.eval.gates, found.progress) == ("off", False)


def test_an_unknown_key_of_a_list_entry_is_named_there_and_not_where_its_name_stands_elsewhere():
    entry = "data.sources={s: {task: vqa, num_samples: 4, kind: scenes}}"
    with pytest.raises(ValueError, match=r"data\.sources\.s\.kind: Key 'kind' not in"):
        load(RunConfig, None, ["router.kind=softmax", entry])


RUN = [EXPERTS, SOURCE, "stages={joint: {steps: 4}}"]
CLASSES = {RunConfig: RUN, EvalCommand: ["eval.sources={s: {num_samples: 4}}"], MergeExperts: [],
           AlignConfig: [], AverageConfig: [], DataSettings: [], LearnConfig: [], PartsConfig: [],
           FederatedConfig: []}  # fmt: skip
UNIFORM = "roles=[{name: all, match: [rest], weight: uniform}]"
# Parts of the keys that take each number; every other pair is an error.
ZERO = ("router.weights", "losses.", ".lr.", "lr_end", "seed", "warmup_steps", "modality_dropout",
        "ocr_min_confidence", "num_workers", "task_dropout", "max_ocr_words", "clip_norm", "weight_decay",
        "betas", "eval.every", "num_images", "steps.", "values.", "penalty", "similarity",
        "nondiagonal", "noise", "joint.gates.", "train.statistics", "router.threshold",
        "ridge", "iterations", "zipf", "partition.test", "prompt.border", "held_out", "missing", "single", "dropout",
        "num_questions")  # fmt: skip
NEEDS = {"router.weights": ["router.kind=fixed"], "router.top_p": ["router.kind=top_p"],
         "router.threshold": ["router.kind=threshold"], "router.noise_scale": ["router.noise=gaussian"],
         "losses.load": ["router.kind=top_k", "router.noise=gaussian"],
         "router.bias_rate": ["router.kind=top_k", "router.granularity=token"],
         "experts.a.active_ranks": ["experts.a.rank_gates=token"],
         "partition.alpha": ["partition.how=dirichlet_tasks"], "privacy.clip": ["privacy.noise=1", UNIFORM],
         "privacy.noise": ["privacy.clip=1", UNIFORM]}  # fmt: skip
BELOW_ZERO = ("router.weights", "losses.entropy", "values.")
HUGE = ("router.weights", "num_samples", "alpha", "temperature", "losses.", "lr.", "weight.", "count",
        "epochs", "max_length", "steps.", "pack_length", "clip_norm", "weight_decay", "save_every", "keep_",
        "max_non_finite_steps", "every", "seed", "max_ocr_words", "num_images", "num_probes", "new_tokens",
        "max_shard_gb", "last", "limit", "show", "similarity", "budget", "bound", "penalty", "values.", "runs",
        "noise", "train.statistics", "ridge", "iterations", "bias_rate", "zipf", "min_samples", "rounds",
        "num_questions", "screen", "clip")  # fmt: skip


def numbers() -> Iterator[tuple[type, str, str]]:
    """Every setting of every class that holds numbers: its class, its key, how it is written."""
    for cls in CLASSES:
        for key, kind, *_ in settings(cls, ""):
            key = key.replace("stages.NAME", "stages.joint").replace("sources.NAME", "sources.s")
            key = key.replace("NAME", "a")
            if kind.startswith(("int", "float")):
                yield cls, key, "{}"
            elif kind.startswith(("list of int", "list of float")):
                yield cls, key, "[{0}, {0}]"
            elif kind.startswith("dict of str, float"):
                yield cls, key, "{{a: {0}}}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "accepted"),
    [(".nan", ()), (".inf", ()), ("-.inf", ()), ("1.0e+400", ()), ("many", ()), ("0", ZERO),
     ("-1", BELOW_ZERO), ("1000000000", HUGE)],
)  # fmt: skip
def test_every_number_has_its_range_and_names_its_key(number, accepted):
    found = list(numbers())
    assert len(found) > 75
    for cls, key, form in found:
        extra = NEEDS.get(key, [])
        override = f"{key}={form.format(number)}"
        expected = any(part in f"{key}." for part in accepted)
        try:
            load(cls, None, [*CLASSES[cls], *extra, override])
        except ValueError as error:
            assert str(error).startswith(key) and "\n" not in str(error), error
            assert not expected or "must" in str(error), error
        else:
            assert expected, f"{cls.__name__}: {override}"


ALIASES = [f"b{i}: &b{i} [*b{i - 1}, *b{i - 1}]\n" for i in range(1, 30)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("b0: &b0 [x]\n" + "".join(ALIASES), "aliases make more than"),
        ("experts: &e {a: *e}", "an alias refers to itself"),
        ("out: " + "[" * 100_000, "nested deeper than"),
        ("b0: &b0 {x: 1}\n" + "".join(ALIASES).replace("[", "{<<: [").replace("]", "]}"),
         "aliases make more than"),
        ("out: !!python/object/apply:os.system [id]", "is not used here"),
        ("out: !!bool maybe", "is not used here"),
        ("out: a\nout: b", "key 'out' is given twice"),
        ("seed: " + "9" * 5000, "4300 digits"),
    ],
    ids=["bomb", "self", "deep", "merge keys", "object", "tag", "twice", "digits"],
)  # fmt: skip
def test_yaml_that_is_too_large_or_not_a_settings_file_ends_in_one_line(tmp_path, text, expected):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    message = error_of(path=file)
    assert message.startswith(f"{file}: not valid YAML: ") and expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-1", 0.1), ("[-2E3, .5]", [-2000.0, 0.5]), ("12:30", "12:30"), ("2024-01-01", "2024-01-01"),
     ("010", "010"), ("off", "off"), ("0x1F", 31), ("1_000", 1000), ("~", None), ("!!str 12", "12")],
)  # fmt: skip
def test_words_and_numbers_are_those_of_yaml_1_2(text, value):
    assert parse_yaml(text) == value


KEYS = ["out", "experts", "experts.a.rank", "stages", "stages.joint.init_from", "data.sources.s", "seed",
        "model.image_processor", "router.weights", "a.b", "prompt.task_template"]  # fmt: skip


@pytest.mark.slow
@trials(deadline=None, max_examples=40)
@given(st.text("{}[]:,&*!|>-?%@`'\"#~0aN.e\n \\u\0", max_size=12), st.sampled_from(KEYS))
def test_any_text_in_any_place_is_a_setting_or_one_line(text, key):
    try:
        load_config(None, [*RUN, f"{key}={text}"])
    except ValueError as error:
        assert "\n" not in str(error)


def test_a_text_is_taken_as_it_is_and_never_from_the_environment():
    assert "prompt.task_template: settings are not interpolated" in error_of("prompt.task_template='${oc.env:HOME}'")
    kept = load_config(None, [EXPERTS, "prompt.ocr_separator='{a:>5}, x:y'"])
    assert kept.prompt.ocr_separator == "{a:>5}, x:y"


def test_the_home_folder_of_a_path_is_written_out_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("out: ~/x\nexperts: {a: {init_from: ~/a}}\n")
    stage = "stages={joint: {steps: 4, init_from: {a: ~/b}}}"
    config = load_config("~/run.yaml", [SOURCE, stage])
    paths = (config.out, config.experts["a"].init_from, config.stages["joint"].init_from["a"])
    assert paths == tuple(str(tmp_path / name) for name in "xab")
    assert load(MergeExperts, None, ["adapters=[~/*]"]).adapters == [f"{tmp_path}/*"]
    assert "out: must name a file or folder, got ''" in error_of("out=''")


def test_an_error_names_the_entry_that_it_is_about():
    assert "eval.sources.s.path: format jsonl needs" in error_of("eval.sources.s.format=jsonl")
    assert "stages.routr: 'routr' is neither experts, router nor joint" in error_of("stages={routr: {steps: 2}}")
    assert "data.tasks: must be a list, [...], got 'vqa'" in error_of("data.tasks=vqa")


def test_help_holds_comments_of_several_lines_and_beside_parts_and_no_marks_of_tools():
    docs = {key: doc for cls in (StackLayers, MergeExperts, RunConfig) for key, _, _, doc in settings(cls, "")}
    assert docs["weights"].startswith("[1,1] as adapters") and docs["weights"].endswith("own")
    assert docs["stack"].startswith("path of these layers")
    assert docs["prompt.box_codec"].startswith("how boxes") and "fmt" not in docs["prompt.box_codec"]
    assert all(docs.values())
    assert r'prompt.ocr_template="\nReference OCR token: {words}"' in describe(RunConfig)


def test_a_frozen_expert_is_no_copy_and_blend_to_needs_a_blend():
    load_config("configs/demo.yaml", ["experts.line.rank=4", "experts.line.frozen=true"])
    with pytest.raises(ValueError, match=r"joint.copy_of: line has another rank"):
        load_config("configs/demo.yaml", ["experts.line.rank=4"])
    with pytest.raises(ValueError, match=r"joint.gates.blend_to: sum has no effect without stages.joint.gates.blend"):
        load_config("configs/demo.yaml", ["stages.joint.gates.blend_to=sum"])


def test_a_star_in_a_layer_is_every_entry_below_and_an_entry_of_its_own_goes_over_it(tmp_path):
    first, second = tmp_path / "run.yaml", tmp_path / "preset.yaml"
    first.write_text("experts: {a: {rank: 2, alpha: 4}, b: {rank: 3}, c: {}}\n")
    second.write_text('experts: {"*": {rank: 5}, b: {rank: 6}, c: null, d: {alpha: 1}}\n')
    experts = load_config([first, second]).experts
    assert {name: (e.rank, e.alpha) for name, e in experts.items()} == {"a": (5, 4.0), "b": (6, None), "d": (None, 1.0)}
    second.write_text('stages: {"*": {steps: 3}}\n')
    with pytest.raises(ValueError, match=r"stages\.\*: is every entry of the files below, and there is none"):
        load_config([first, second])


def test_default_at_a_star_starts_router_or_losses_anew_but_for_what_belongs_to_the_run(tmp_path):
    first, second = tmp_path / "run.yaml", tmp_path / "preset.yaml"
    first.write_text(
        "experts: {a: {}, b: {}}\nlosses: {z: 1, reduction: token}\n"
        "router: {kind: fixed, weights: {a: 0.3}, evidence: [text], hidden: 8}\n"
    )
    second.write_text('router: {"*": default, top_k: 1}\nlosses: {"*": default, entropy: 0.1}\n')
    config = load_config([first, second], ["router.temperature=2"])
    assert config.router == RouterConfig(top_k=1, evidence=["text"], hidden=8, temperature=2.0)
    assert config.losses == LossConfig(entropy=0.1, reduction="token")
    assert load_config([second, first]).losses == LossConfig(z=1.0, entropy=0.1, reduction="token")
    for wrong in ('train: {"*": default}', 'experts: {"*": default}', 'router: {"*": defaults}', 'router: {"*": null}'):
        second.write_text(wrong)
        with pytest.raises(ValueError, match=r"(train|experts|router)\.\*: "):
            load_config([first, second])
    with pytest.raises(ValueError, match=r"losses\.\*: "):
        load_config(first, ["losses.*=default"])
