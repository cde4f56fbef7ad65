"""Whole checkpoints: merged tensor by tensor, loaded by transformers, every key accounted for."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from moa.cli.settings import load
from moa.merging.checkpoints.full import merge_checkpoints
from moa.merging.settings import MergeModels, Rules
from scripts import merge as script
from tests.merging.test_merge_sparse import ties_merging
from tests.support.tiny import tiny_llava

NAMES = ("one", "two")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base in two shards, and two models trained from it, each in one."""
    folder = tmp_path_factory.mktemp("models")
    model, _ = tiny_llava()
    model.save_pretrained(folder / "base", max_shard_size="60KB")
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        other, _ = tiny_llava()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        other.save_pretrained(folder / name)
    return folder


def tensors_of(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def models(world):
    return {name: world / name for name in NAMES}


@pytest.mark.slow
def test_the_weighted_sum_of_differences_is_added_to_the_base(world, tmp_path):
    chosen = {"one": 0.75, "two": -0.5}
    manifest = merge_checkpoints(tmp_path / "out", models(world), world / "base", weights=chosen)
    base, one, two = (tensors_of(world / name) for name in ("base", *NAMES))
    found = tensors_of(tmp_path / "out")
    assert found.keys() == base.keys() == manifest.keys()
    for key, own in base.items():
        expected = own + 0.75 * (one[key] - own) - 0.5 * (two[key] - own)
        torch.testing.assert_close(found[key], expected, rtol=0, atol=1e-6)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1


@pytest.mark.slow
def test_transformers_loads_the_result_from_its_shards(world, tmp_path):
    merge_checkpoints(tmp_path / "out", models(world), world / "base", method="slerp", max_shard_gb=6e-5)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    found = tensors_of(tmp_path / "out")
    weight = loaded.get_input_embeddings().weight
    assert any(t.shape == weight.shape and torch.equal(t, weight) for t in found.values())


@pytest.mark.slow
def test_ties_over_the_model_is_the_released_procedure_on_flattened_models(world, tmp_path):
    options = {"scope": "model", "density": 0.2}
    merge_checkpoints(tmp_path / "out", models(world), world / "base", method="ties", options=options)
    base, one, two = (tensors_of(world / name) for name in ("base", *NAMES))
    keys = list(base)
    rows = torch.stack([torch.cat([(m[k] - base[k]).flatten() for k in keys]) for m in (one, two)])
    expected = torch.cat([base[k].flatten() for k in keys]) + ties_merging(rows, 0.2)
    found = torch.cat([tensors_of(tmp_path / "out")[k].flatten() for k in keys])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dare_linear", "breadcrumbs", "model_stock", "tsv_m", "iso_c"])
def test_the_size_of_a_block_changes_nothing(world, tmp_path, monkeypatch, method):
    merge_checkpoints(tmp_path / "whole", models(world), world / "base", method=method)
    monkeypatch.setattr("moa.merging.methods.stack.BLOCK_VALUES", 100)
    merge_checkpoints(tmp_path / "blocks", models(world), world / "base", method=method)
    whole, blocks = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "blocks")
    for key, value in whole.items():
        torch.testing.assert_close(blocks[key], value, rtol=1e-5, atol=1e-6)


def save_model(folder, **tensors):
    folder.mkdir()
    save_file({key.replace("__", "."): tensor for key, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def small(tmp_path):
    """Three layers and a head that the models move by 1 and by 3, a counter, and a vector of another length."""

    def make(name, value, steps, size):
        layers = {f"layers__{i}__w": torch.full((2, 3), float(value)) for i in range(3)}
        more = {"steps": torch.tensor([steps, 7]), "odd": torch.full((size,), 0.1)}
        return save_model(tmp_path / name, head=torch.full((2,), float(value)), **layers, **more)

    base = make("base", 0, 1, 2)
    return {"one": make("one", 1, 5, 2), "two": make("two", 3, 9, 3)}, base


def merged_small(small, tmp_path, **settings):
    rules = Rules(shape="base")
    manifest = merge_checkpoints(tmp_path / "out", *small, rules=rules, **settings)
    return tensors_of(tmp_path / "out"), manifest


def test_a_method_that_goes_by_depth_finds_it_in_the_names_of_the_layers(small, tmp_path):
    found, _ = merged_small(small, tmp_path, method="lines", options={"first": 0.1, "last": 1.0})
    depths = {"layers.0.w": 0.1, "layers.1.w": 0.55, "layers.2.w": 1.0, "head": 0.1}
    for key, scale in depths.items():
        torch.testing.assert_close(found[key], torch.full_like(found[key], scale * 4))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_whole_numbers_and_what_a_rule_keeps_are_the_bases_in_the_dtype_asked_for(small, tmp_path, dtype):
    found, manifest = merged_small(small, tmp_path, dtype=dtype)
    stored = torch.float32 if dtype == "auto" else torch.bfloat16
    assert found["steps"].tolist() == [1, 7] and found["steps"].dtype == torch.int64
    assert found["odd"].equal(torch.full((2,), 0.1).to(stored))
    assert found["head"].equal(torch.full((2,), 2.0).to(stored))
    assert manifest["steps"]["rule"] == "not floating: the base's"


def test_a_merge_that_its_dtype_cannot_hold_is_refused_and_leaves_nothing(tmp_path):
    made = {n: save_model(tmp_path / n, w=torch.full((2, 2), v).half()) for n, v in
            (("base", 3e4), ("one", 6e4), ("two", 6e4))}  # fmt: skip
    base = made.pop("base")
    with pytest.raises(ValueError, match="w: the merge has values that .* do not fit in torch.float16"):
        merge_checkpoints(tmp_path / "out", made, base, method="task_arithmetic")
    assert not (tmp_path / "out").exists()
    merge_checkpoints(tmp_path / "out", made, base, method="task_arithmetic", dtype="float32")
    assert tensors_of(tmp_path / "out")["w"].eq(9e4).all()


def test_another_dtype_is_stored_and_named(world, tmp_path):
    merge_checkpoints(tmp_path / "out", models(world), world / "base", dtype="bfloat16")
    found = tensors_of(tmp_path / "out")
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.fixture
def odd(world, tmp_path):
    """A model that lacks one key, has one more, and one in another shape."""
    tensors = tensors_of(world / "one")
    missing, changed = list(tensors)[:2]
    del tensors[missing]
    tensors[changed] = torch.zeros(3, 3)
    tensors["extra.weight"] = torch.zeros(2)
    (tmp_path / "odd").mkdir()
    save_file(tensors, tmp_path / "odd" / "model.safetensors")
    (tmp_path / "odd" / "config.json").write_text("{}")
    return tmp_path / "odd", missing, changed


def test_every_key_needs_a_rule_and_gets_a_line(world, odd, tmp_path):
    folder, missing, changed = odd
    given = {"one": world / "one", "odd": folder}
    rules: dict[str, str] = {}
    for key, rule in (("missing", "base"), ("shape", "base"), ("extra", "drop")):
        with pytest.raises(ValueError, match=rf"models\.odd: .*rules\.{key}={rule}"):
            merge_checkpoints(tmp_path / "out", given, world / "base", rules=Rules(**rules))
        assert not (tmp_path / "out").exists()
        rules[key] = rule
    manifest = merge_checkpoints(tmp_path / "out", given, world / "base", rules=Rules(**rules))
    assert manifest[missing] == {"rule": "linear", "models": ["one"], "output": missing}
    assert manifest[changed]["rule"] == "shape differs in odd: the base's"
    assert manifest["extra.weight"] == {"rule": "extra: dropped", "models": ["odd"], "output": None}
    written = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert written == manifest
    base, one = tensors_of(world / "base"), tensors_of(world / "one")
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found[changed], base[changed])
    half = base[missing] + 0.5 * (one[missing] - base[missing])  # the odd one changed nothing there
    torch.testing.assert_close(found[missing], half, rtol=0, atol=1e-6)


def respelled(key: str) -> str:
    """As transformers before 4.52 stored what is now `model.language_model.layers`, or the reverse."""
    if key.startswith("language_model.model."):
        return key.replace("language_model.model.", "model.language_model.")
    if key.startswith("model.language_model."):
        return key.replace("model.language_model.", "language_model.model.")
    return key.removeprefix("model.") if key.startswith("model.") else f"model.{key}"


def changed_copy(world, folder, change) -> None:
    """The model `one` with its tensors as `change` makes them of {key: tensor}."""
    folder.mkdir()
    save_file(change(tensors_of(world / "one")), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


@pytest.mark.slow
def test_a_model_in_another_spelling_is_merged_as_the_same_model(world, tmp_path):
    """Over a model of both: each in its own spelling, and half of the keys in each."""
    spellings = {
        "all": lambda tensors: {respelled(k): t for k, t in tensors.items()},
        "some": lambda tensors: {respelled(k) if i % 2 else k: t for i, (k, t) in enumerate(tensors.items())},
    }
    merge_checkpoints(tmp_path / "plain", models(world), world / "base")
    for name, change in spellings.items():
        changed_copy(world, tmp_path / name, change)
        given = {"one": tmp_path / name, "two": world / "two"}
        manifest = merge_checkpoints(tmp_path / f"out-{name}", given, world / "base")
        assert {line["rule"] for line in manifest.values()} == {"linear"}
        expected, found = (tensors_of(tmp_path / n) for n in ("plain", f"out-{name}"))
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert any(line.get("spelled") for line in manifest.values())


def test_a_model_that_shares_few_keys_is_refused_whatever_the_rules(world, tmp_path):
    changed_copy(world, tmp_path / "other", lambda t: {f"net.{i}.w": v for i, v in enumerate(t.values())})
    given = {"one": world / "one", "other": tmp_path / "other"}
    rules = Rules(missing="base", extra="drop", shape="base")
    with pytest.raises(ValueError, match=r"models\.other: .* shares 0 of the \d+ keys of the base"):
        merge_checkpoints(tmp_path / "out", given, world / "base", rules=rules)


def test_a_tensor_that_only_the_base_has_is_called_the_bases(world, tmp_path):
    lost = next(iter(tensors_of(world / "base")))
    changed_copy(world, tmp_path / "one", lambda t: {k: v for k, v in t.items() if k != lost})
    rules = Rules(missing="base")
    manifest = merge_checkpoints(tmp_path / "out", {"one": tmp_path / "one"}, world / "base", rules=rules)
    assert manifest[lost]["rule"] == "missing in every model: the base's"
    assert torch.equal(tensors_of(tmp_path / "out")[lost], tensors_of(world / "base")[lost])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named_by_model_file_and_key(world, tmp_path, value):
    key = "language_model.lm_head.weight"

    def broken(tensors):
        tensors[key][1, 1] = value
        return tensors

    changed_copy(world, tmp_path / "broken", broken)
    given = {"one": world / "one", "broken": tmp_path / "broken"}
    message = rf"models\.broken: .*broken/model\.safetensors: {key} has NaN or infinite values"
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(tmp_path / "out", given, world / "base")


def test_a_pickle_is_named_as_the_models_not_the_bases(world, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"models\.old: .*pytorch_model\.bin is a pickle"):
        merge_checkpoints(tmp_path / "out", {"old": tmp_path / "old"}, world / "base")
    (tmp_path / "old" / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"models\.old: .*old has neither model\.safetensors nor"):
        merge_checkpoints(tmp_path / "out", {"old": tmp_path / "old"}, world / "base")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "robustmerge"}, "robustmerge works on LoRA factors"),
        ({"weights": {"one": 1.0}}, "weights.two: missing"),
        ({"models": {}}, "models: names none"),
    ],
)
def test_what_has_no_meaning_here_is_refused(world, tmp_path, arguments, message):
    settings = {"models": models(world), "base": world / "base", **arguments}
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_packed_weights_are_not_merged_as_if_they_were_values(dtype, tmp_path):
    save_model(tmp_path / "base", w=torch.ones(2, 2))
    save_model(tmp_path / "one", w=torch.ones(2, 2).to(dtype))
    with pytest.raises(ValueError, match=r"models\.one: w is not stored as F64, F32, F16, BF16"):
        merge_checkpoints(tmp_path / "out", {"one": tmp_path / "one"}, tmp_path / "base")
    with pytest.raises(ValueError, match="no weight would be merged: not floating: the base's"):
        merge_checkpoints(tmp_path / "out", {"one": tmp_path / "one"}, tmp_path / "one")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llava"}, "has model_type 'llava', and that of the base .* 'tiny'"),
        ({"model_type": "tiny", "quantization_config": "gptq"}, "are packed by some method"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "are packed by awq"),
    ],
)
def test_a_model_whose_config_is_of_another_kind_is_refused(config, message, tmp_path):
    for name, found in (("base", {"model_type": "tiny"}), ("one", config)):
        save_model(tmp_path / name, w=torch.ones(2, 2))
        (tmp_path / name / "config.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=rf"models\.one: .*{message}"):
        merge_checkpoints(tmp_path / "out", {"one": tmp_path / "one"}, tmp_path / "base")


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match=r"rules.extra: .*'keep'.*error.*drop"):
        load(MergeModels, None, ["rules.extra=keep"])


def test_a_config_that_computes_otherwise_is_named_and_taken_only_on_demand(tmp_path):
    for name, theta in (("base", 10000.0), ("one", 500000.0)):
        save_model(tmp_path / name, w=torch.ones(2, 2))
        config = {"text_config": {"rope_theta": theta, "dtype": name}, "_name_or_path": name}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    inputs = tmp_path / "out", {"one": tmp_path / "one"}, tmp_path / "base"
    with pytest.raises(ValueError, match=r"models.one: .* text_config.rope_theta=500000.0, .*10000.0"):
        merge_checkpoints(*inputs)
    merge_checkpoints(*inputs, rules=Rules(config="base"))
    assert "10000.0" in (tmp_path / "out" / "config.json").read_text()


def test_keys_of_a_model_that_ran_distributed_are_the_bases(tmp_path):
    """DistributedDataParallel calls every key module.KEY; no rule may lose them."""
    save_model(tmp_path / "base", w=torch.ones(2, 2), v=torch.ones(2, 2))
    save_model(tmp_path / "one", **{"module.w": torch.full((2, 2), 3.0), "v": torch.ones(2, 2)})
    rules = Rules(missing="base", extra="drop")
    manifest = merge_checkpoints(tmp_path / "out", {"one": tmp_path / "one"}, tmp_path / "base", rules=rules)
    assert manifest["w"]["spelled"] == {"one": "module.w"} and len(manifest) == 2
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].eq(3).all()
    save_model(tmp_path / "both", **{"module.w": torch.zeros(2, 2), "w": torch.full((2, 2), 5.0)})
    inputs = tmp_path / "out2", {"one": tmp_path / "both"}, tmp_path / "base"
    with pytest.raises(ValueError, match="models.one: module.w is not in the base"):
        merge_checkpoints(*inputs, rules=Rules(missing="base"))
    assert merge_checkpoints(*inputs, rules=rules)["module.w"]["rule"] == "extra: dropped"
    assert load_file(tmp_path / "out2" / "model.safetensors")["w"].eq(5).all()


def test_a_model_that_is_cut_off_leaves_nothing_behind(world, tmp_path, capsys):
    (tmp_path / "cut").mkdir()
    data = (world / "one" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(data[:-100])
    (tmp_path / "cut" / "config.json").write_text("{}")
    with pytest.raises(SystemExit):
        script.main(
            [f"models=[{world / 'two'},{tmp_path / 'cut'}]", f"base={world / 'base'}", f"out={tmp_path / 'out'}"]
        )
    assert "cut/model.safetensors is not readable" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_script_merges_models_and_counts_the_rules(world, tmp_path, capsys):
    script.main(
        [f"models=[{world / 'one'},{world / 'two'}]", f"base={world / 'base'}", f"out={tmp_path / 'out'}",
         "weights=[0.5,0.5]"]
    )  # fmt: skip
    assert f"{len(tensors_of(world / 'base'))} tensors: linear" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script.main([f"models=[{world / 'one'}]", f"out={tmp_path / 'other'}"])
    assert "base: names no folder" in capsys.readouterr().err
