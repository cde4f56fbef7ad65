"""A PEFT folder is read and written without loss, and every way it can be wrong is named."""

import errno
import json
import time

import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from moa.files import peft as peft_io
from moa.files import peft_config
from moa.files.peft import (
    save_expert,
    site_keys,
    write_expert,
)  # fmt: skip
from moa.files.peft_config import site_rank, site_scaling
from tests.support.peft import read_expert
from tests.support.tiny import tiny_llava

SITES = ["model.language_model.layers.0.self_attn.q_proj", "model.multi_modal_projector.linear_1"]
LANGUAGE = r".*language_model.*\.(q_proj|v_proj|down_proj)"


def factors(sites=SITES, rank=2, size=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for site in sites:
        for key, shape in zip(site_keys(site), [(rank, size), (size, rank)], strict=True):
            tensors[key] = torch.randn(shape, generator=generator).to(dtype)
    return tensors


def config(**changes):
    return {"r": 2, "lora_alpha": 4, "target_modules": list(SITES), **changes}


@pytest.fixture
def folder(tmp_path):
    save_expert(tmp_path / "expert", factors(), config())
    return tmp_path / "expert"


def rewrite_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rewrite_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, dtype):
    tensors = factors(dtype=dtype)
    save_expert(tmp_path / "expert", tensors, config(use_rslora=True))
    read, settings = read_expert(tmp_path / "expert")
    assert set(read) == set(tensors) and settings["use_rslora"]
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)


def test_a_folder_written_by_peft_is_read_and_written_back_for_peft(tmp_path):
    model, _ = tiny_llava()
    settings = LoraConfig(r=3, lora_alpha=5, target_modules=LANGUAGE, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, settings)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(tmp_path / "theirs")
    tensors, read = read_expert(tmp_path / "theirs")
    save_expert(tmp_path / "ours", tensors, read)
    ids = torch.arange(5, 12)[None]
    again = PeftModel.from_pretrained(tiny_llava()[0], tmp_path / "ours").eval()
    with torch.no_grad():
        expected = wrapped.eval()(input_ids=ids).logits
        assert torch.equal(again(input_ids=ids).logits, expected)


def test_scaling_and_rank_follow_pefts_patterns(tmp_path):
    """The reference is what PEFT itself computes for each layer."""
    model, _ = tiny_llava()
    settings = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=LANGUAGE,
        use_rslora=True,
        rank_pattern={"layers.0.self_attn.q_proj": 2, "down_proj": 3},
        alpha_pattern={  # a part of a name is no match, and of two that match the first decides
            "q": 1,
            "layers.1": 2,
            "layers.1.self_attn.v_proj": 10,
            ".*layers.0.mlp.*": 7,
            "down_proj": 9,
        },
    )
    wrapped = get_peft_model(model, settings)
    wrapped.save_pretrained(tmp_path / "expert")
    _, read = read_expert(tmp_path / "expert")
    for name, module in wrapped.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            assert site_rank(read, name) == module.r["default"]
            assert site_scaling(read, name) == pytest.approx(module.scaling["default"])


def test_an_alpha_that_the_config_lacks_is_pefts_default():
    assert site_scaling({"r": 4}, "x") == LoraConfig(r=4).lora_alpha / 4
    assert site_scaling({"r": 4, "use_rslora": True}, "x") == LoraConfig(r=4).lora_alpha / 2


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": ["q"]}, True),
        ({"target_modules": ["layers.1.q", "v"]}, True),
        ({"target_modules": ["k", "yers.1.q"]}, False),
        ({"target_modules": r".*\.q"}, True),
        ({"target_modules": r".*\.1"}, False),
        ({"target_modules": "all-linear"}, False),
        ({"target_modules": ["q"], "exclude_modules": ["v"]}, False),
        ({"target_modules": ["q"], "layers_to_transform": 0}, False),
        ({"target_modules": ["q"], "layers_to_transform": None}, True),
    ],
)
def test_a_site_is_promised_where_the_targets_alone_decide(settings, expected):
    assert peft_config.is_target(settings, "m.layers.1.q") is expected


def test_values_are_finite_one_by_one_and_not_by_their_sum():
    assert peft_io.all_finite(torch.tensor([3e38, 3e38]))
    assert not peft_io.all_finite(torch.tensor([1.0, torch.inf]))
    assert not peft_io.all_finite(torch.tensor([torch.inf, -torch.inf, 3e38]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported: DoRA rescales"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*whole modules"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base"),
        ({"kasa_config": {"a": 1}}, "unknown settings may change what it computes.*kasa_config"),
        ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"r": 3}, "has rank 2, but its config says 3"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": [*SITES, "model.lm.layers.9.q_proj"]}, "lack tensors.*layers.9"),
        ({"target_modules": ["q_proj"]}, "sites are not in target_modules: .*linear_1"),
        ({"target_modules": ".*q_proj"}, "sites are not in target_modules: .*linear_1"),
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused_with_the_reason(folder, changes, message):
    rewrite_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as error:
        read_expert(folder)
    assert str(folder) in str(error.value)


def test_a_nan_is_named_with_its_key(folder):
    key = site_keys(SITES[0])[1]
    rewrite_tensors(folder, lambda tensors: tensors[key].fill_(float("nan")))
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.lora_B.weight has 8 NaN"):
        read_expert(folder)


def test_a_missing_partner_and_a_stray_key_are_named(folder):
    rewrite_tensors(folder, lambda tensors: tensors.pop(site_keys(SITES[0])[1]))
    with pytest.raises(ValueError, match=r"q_proj.lora_B.weight is missing"):
        read_expert(folder)
    rewrite_tensors(folder, lambda tensors: tensors.update({site_keys(SITES[0])[1]: torch.ones(4, 3)}))
    with pytest.raises(ValueError, match=r"q_proj lora_A \[2, 4\] and lora_B \[4, 3\] must be"):
        read_expert(folder)
    rewrite_tensors(folder, lambda tensors: tensors.update(x=torch.ones(1)))
    with pytest.raises(ValueError, match=r"1 keys are no factors of a linear layer, first x"):
        read_expert(folder)


@pytest.mark.parametrize("size", [0, 5, 100])
def test_a_truncated_file_is_named(folder, size):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: not readable as safetensors"):
        read_expert(folder)


def test_a_missing_file_is_named_and_a_pickle_is_not_opened(folder):
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"missing; adapter_model.bin is a pickle"):
        read_expert(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter_config.json: missing"):
        read_expert(folder)


def test_an_adapter_of_another_base_is_refused(folder):
    with pytest.raises(ValueError, match=r"another base: site .*q_proj is .*\[4, 4\].*\[8, 4\] th"):
        read_expert(folder, base_shapes={SITES[0]: (8, 4), SITES[1]: (4, 4)})
    with pytest.raises(ValueError, match="another base: site .*linear_1 .* is not there"):
        read_expert(folder, base_shapes={SITES[0]: (4, 4)})
    read_expert(folder, base_shapes=dict.fromkeys(SITES, (4, 4)))


def test_what_could_not_be_read_is_not_written(tmp_path):
    tensors = factors()
    tensors[site_keys(SITES[0])[0]][0, 0] = torch.inf
    with pytest.raises(ValueError, match="q_proj.lora_A.weight has NaN or infinite values; nothing was"):
        save_expert(tmp_path / "expert", tensors, config())
    with pytest.raises(ValueError, match="has rank 2, but its config says 5"):
        save_expert(tmp_path / "expert", factors(), config(r=5))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_folder_as_it_was(folder, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(peft_io, "save_file", full)
    with pytest.raises(OSError, match="expert: not written, nothing was changed.*No space left"):
        save_expert(folder, factors(), config(lora_alpha=99))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["expert"]


def test_a_second_write_replaces_the_folder_whole(folder):
    (folder / "stale.txt").write_text("old")
    save_expert(folder, factors(SITES[:1]), config(target_modules=SITES[:1]))
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert set(read_expert(folder)[0]) == set(site_keys(SITES[0]))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("r", [None, "2", [1], 2.0, True, -1, 10**400]),
        ("lora_alpha", [None, "16", [1], {}, True, float("nan"), float("inf"), 10**400]),
        ("target_modules", [5, True, {"a": 1}, [1], [None], "(", "a)(b"]),
        ("exclude_modules", [5, [1], "["]),
        ("rank_pattern", [[1], "x", 3, {"(": 8}, {"x": "8"}, {"x": 0}, {"x": None}]),
        ("alpha_pattern", [[1], {"(": 8}, {"x": "8"}, {"x": float("nan")}]),
        ("layers_to_transform", ["1", [None], 1.5]),
        ("layers_pattern", [3, [3]]),
        ("base_model_name_or_path", [5, ["x"], {}]),
        ("use_rslora", ["true", 1, [1]]),
        ("fan_in_fan_out", ["yes"]),
        ("bias", [5, ["all"]]),
        ("peft_type", [None, 5, ["LORA"]]),
        ("lora_dropout", ["0.1", [0]]),
    ],
)
def test_a_setting_of_the_wrong_type_is_named_in_one_line(folder, key, values):
    for value in values:
        rewrite_config(folder, **{key: value})
        with pytest.raises(ValueError, match=key) as error:
            read_expert(folder)
        message = str(error.value)
        assert str(folder / "adapter_config.json") in message
        assert "\n" not in message and len(message) < 500 + len(str(folder)), message


@pytest.mark.parametrize("text", ["[1]", "5", "{", "[" * 200_000, "\udcff", '{"a": 1', ""])
def test_a_config_that_is_no_json_object_is_named(folder, text):
    (folder / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"adapter_config.json: (not readable|must hold)") as error:
        read_expert(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pattern", [r"(([a-z_.0-9])+)+\$", r"(a*)*(\w+\.?)*!", r"((\w|\.)*)*@"])
def test_an_expression_without_end_ends_in_seconds(folder, pattern, monkeypatch):
    monkeypatch.setattr("moa.files.targets.SECONDS", 0.2)
    rewrite_config(folder, target_modules=pattern)
    start = time.monotonic()
    with pytest.raises(ValueError, match="target_modules"):
        read_expert(folder)
    assert time.monotonic() - start < 5


KEYS = {
    "an adapter's name": (lambda key: key.replace(".weight", ".default.weight"), "adapter's name"),
    "no prefix": (lambda key: key.removeprefix("base_model.model."), "does not begin with base_mo"),
    "DoRA": (lambda key: key.replace("lora_A.weight", "lora_magnitude_vector"), "use_dora"),
    "head": (lambda key: key.replace("lora_A.weight", "base_layer.weight"), "save_embedding_layers=False"),
    "a bias": (lambda key: key.replace("lora_A.weight", "lora_B.bias"), "lora_bias"),
    "a whole module": (lambda key: key.replace("lora_A.", ""), "modules_to_save"),
}


@pytest.mark.parametrize("kind", KEYS)
def test_keys_that_are_no_factors_are_named_with_their_reason(folder, kind):
    change, reason = KEYS[kind]

    def renamed(tensors):
        found = {change(key): tensor.clone() for key, tensor in tensors.items()}
        tensors.clear()
        tensors.update(found)

    rewrite_tensors(folder, renamed)
    with pytest.raises(ValueError, match=reason) as error:
        read_expert(folder)
    assert "adapter_model.safetensors" in str(error.value)


@pytest.mark.parametrize("shape", [(0,), (0, 4)])
def test_weights_that_zero_3_kept_say_so(folder, shape):
    rewrite_tensors(folder, lambda ts: ts.update({key: torch.zeros(shape) for key in ts}))
    with pytest.raises(ValueError, match=r"is empty; DeepSpeed ZeRO-3.*save it again"):
        read_expert(folder)
    rewrite_tensors(folder, dict.clear)
    with pytest.raises(ValueError, match=r"holds no tensors; DeepSpeed ZeRO-3.*save it again"):
        read_expert(folder)


OTHER_DTYPES = (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8)


@pytest.mark.parametrize("dtype", OTHER_DTYPES)
def test_weights_that_are_no_plain_floats_are_refused(folder, tmp_path, dtype):
    key = site_keys(SITES[0])[0]
    rewrite_tensors(folder, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight is stored as .*save it as"):
        read_expert(folder)
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight is stored as .*save it as"):
        save_expert(tmp_path / "x", {**factors(), key: factors()[key].to(dtype)}, config())


OLD = ["language_model.model.layers.0.self_attn.q_proj", "multi_modal_projector.linear_1"]


@pytest.mark.parametrize(("written", "known"), [(OLD, SITES), (SITES, OLD)])
def test_sites_in_another_spelling_are_renamed_with_their_scaling(tmp_path, written, known):
    patterns = {"alpha_pattern": {f"^{written[0]}": 7}, "rank_pattern": {}}
    save_expert(tmp_path / "e", factors(written), config(target_modules=written, **patterns))
    tensors, found = read_expert(tmp_path / "e", base_shapes=dict.fromkeys(known, (4, 4)))
    expected = factors(known)
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert [site_scaling(found, site) for site in known] == [3.5, 2.0]
    save_expert(tmp_path / "again", tensors, found)  # the config is whole


def test_a_site_that_no_spelling_finds_is_named_with_the_nearest_and_the_way_out(tmp_path):
    site = "my.tower.layers.0.self_attn.q_proj"
    save_expert(tmp_path / "e", factors([site]), config(target_modules=[site]))
    with pytest.raises(ValueError, match=r"nearest: model.language_model.layers.0.*rename") as error:
        read_expert(tmp_path / "e", base_shapes=dict.fromkeys(SITES, (4, 4)))
    assert "adapter_model.safetensors" in str(error.value) and site in str(error.value)


def test_equal_experts_are_equal_files(tmp_path):
    key_a, key_b = site_keys("m.q_proj")
    tensors = {key_a: torch.ones(2, 4), key_b: torch.ones(3, 2)}
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["m.q_proj"]}
    files = set()
    for number in range(8):  # safetensors itself would order the metadata by chance
        (folder := tmp_path / str(number)).mkdir()
        write_expert(folder, tensors, config, name="e", base_fingerprint="0" * 64)
        files.add((folder / "adapter_model.safetensors").read_bytes())
    assert len(files) == 1


def test_the_bases_fingerprint_is_stored_where_peft_does_not_mind_it(tmp_path):
    save_expert(tmp_path / "with", factors(), config(), base_fingerprint="abc")
    save_expert(tmp_path / "without", factors(), config())
    assert peft_io.read_header(tmp_path / "with").base_fingerprint == "abc"
    assert peft_io.read_header(tmp_path / "without").base_fingerprint is None
    assert load_file(tmp_path / "with" / "adapter_model.safetensors").keys() == factors().keys()


@pytest.mark.slow
@limits(max_examples=60, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.sampled_from([*peft_config.SETTINGS, "use_dora", "other"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
            max_leaves=4,
        ),
        max_size=4,
    )
)
def test_any_config_is_read_or_refused_in_one_line(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("fuzz") / "e"
    save_expert(folder, factors(), config())
    rewrite_config(folder, **changes)
    try:
        _, found = read_expert(folder)
    except ValueError as error:
        assert "adapter_config.json" in str(error) and "\n" not in str(error)
    else:
        assert all(0 < abs(site_scaling(found, site)) < 1e31 or not found["lora_alpha"] for site in SITES)


@pytest.mark.slow
@limits(max_examples=60, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.sampled_from([*factors(), "x"]) | st.text(alphabet="base_model.0AB", max_size=30),
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, *OTHER_DTYPES]), st.lists(st.integers(0, 4), max_size=3)
        ),
        max_size=5,
    )
)
def test_any_keys_are_read_or_refused_in_one_line(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("fuzz") / "e"
    save_expert(folder, factors(), config())
    further = {key: torch.zeros(shape).to(dtype) for key, (dtype, shape) in changes.items()}
    rewrite_tensors(folder, lambda tensors: tensors.update(further))
    try:
        tensors, _ = read_expert(folder)
    except ValueError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
    else:
        assert all(tensor.dtype in peft_io.FLOATS.values() for tensor in tensors.values())
