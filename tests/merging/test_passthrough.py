"""Passthrough: stacked layers are the sources', the config says the new depth, transformers loads it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, Qwen2Config

from moa.merging.checkpoints.passthrough import plan_stack, write_stack
from moa.merging.settings import Slice, load_command
from scripts import merge as script
from tests.support.tiny import tiny_llava


def tiny_lm(seed, config_class=LlamaConfig, layers=4, hidden=32, **more):
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=64, hidden_size=hidden, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        tiny_lm(seed).save_pretrained(folder / name, max_shard_size="60KB")
    return folder


def stacked(out, slices, **more):
    settings = load_command(None, [("method", "passthrough"), ("slices", slices)])
    write_stack(out, plan_stack(settings.slices, **more), max_shard_gb=5e-5)
    return json.loads((out / "config.json").read_text())


def entry(folder, start, stop):
    return {"model": str(folder), "layers": [start, stop]}


def test_slices_of_two_models_become_one_deeper_model(world, tmp_path):
    config = stacked(tmp_path / "out", [entry(world / "a", 0, 3), entry(world / "b", 1, 4)])
    assert config["num_hidden_layers"] == 6
    a, b, deep = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (world / "a", world / "b", tmp_path / "out"))
    for number, (source, index) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        wanted, found = (source.model.layers[index].state_dict(), deep.model.layers[number].state_dict())
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    assert torch.equal(deep.lm_head.weight, a.lm_head.weight)
    ids = torch.arange(3, 10)[None]
    with torch.no_grad():
        states = [m(ids, output_hidden_states=True).hidden_states for m in (a, deep)]
    for own, other in zip(states[0][:4], states[1][:4], strict=True):
        torch.testing.assert_close(other, own)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    key = "model.layers.4.mlp.up_proj.weight"
    assert manifest[key] == {"model": str(world / "b"), "key": "model.layers.2.mlp.up_proj.weight"}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_all_layers_of_one_model_are_that_model(world, tmp_path):
    config = stacked(tmp_path / "out", [entry(world / "a", 0, 2), entry(world / "a", 2, 4)])
    assert config == json.loads((world / "a" / "config.json").read_text())
    files = [sorted(f.glob("*.safetensors")) for f in (world / "a", tmp_path / "out")]
    own, found = ({k: t for f in some for k, t in load_file(f).items()} for some in files)
    assert own.keys() == found.keys() and all(torch.equal(found[k], t) for k, t in own.items())


def test_the_script_stacks_the_language_model_of_a_llava(tmp_path):
    model, _ = tiny_llava(num_layers=2, num_vision_layers=2)
    model.save_pretrained(tmp_path / "llava")
    stack = next(k for k in load_file(tmp_path / "llava/model.safetensors") if ".layers.0." in k and "language" in k)
    path = stack.partition(".0.")[0]
    slices = f"[{{model: {tmp_path / 'llava'}, layers: [0, 2]}}, {{model: {tmp_path / 'llava'}, layers: [1, 2]}}]"
    script.main(["method=passthrough", f"slices={slices}", f"stack={path}", f"out={tmp_path / 'out'}"])
    deep, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert deep.config.text_config.num_hidden_layers == 3
    assert deep.config.vision_config.num_hidden_layers == 2
    layers = deep.model.language_model.layers
    assert torch.equal(layers[1].mlp.up_proj.weight, layers[2].mlp.up_proj.weight)


def test_a_layer_takes_its_kind_along(tmp_path):
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    tiny_lm(0, Qwen2Config, layer_types=kinds).save_pretrained(tmp_path / "q")
    config = stacked(tmp_path / "out", [entry(tmp_path / "q", 0, 2), entry(tmp_path / "q", 1, 4)])
    assert config["layer_types"] == [kinds[i] for i in (0, 1, 1, 2, 3)]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([], "slices: names none"),
        ([{"model": "a"}], r"slices.0.layers: "),
        ([{"model": "a", "layers": [3, 3]}], r"slices.layers: must be \[start, stop\]"),
        ([{"model": "a", "layers": [0, 9]}], r"has layers 0 to 3 at model.layers, not \[0, 9\]"),
        ([{"model": "a", "layers": [0, 2]}, {"model": "thin", "layers": [0, 1]}], "must be alike"),
    ],
)  # fmt: skip
def test_slices_that_do_not_stack_are_refused(world, tmp_path, slices, message):
    if not (world / "thin").exists():
        tiny_lm(0, hidden=16).save_pretrained(world / "thin")
    placed = [{**s, "model": str(world / s["model"])} if "model" in s else s for s in slices]
    with pytest.raises(ValueError, match=message):
        stacked(tmp_path / "out", placed)
    assert not (tmp_path / "out").exists()


def test_a_model_of_several_stacks_asks_for_one(tmp_path):
    model, _ = tiny_llava()
    model.save_pretrained(tmp_path / "llava")
    with pytest.raises(ValueError, match=r"stack: .* has \[.*language.*vision.*\]; name one"):
        plan_stack([Slice(model=str(tmp_path / "llava"), layers=[0, 2])])
