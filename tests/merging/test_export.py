"""An export loads with plain PEFT or transformers in a fresh process, and equals the live mixture."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from moa.experts.bank import ExpertBank
from moa.files.checkpoint_files import match_sites, read_base
from moa.merging.adapters import expert_from_folder, experts_of_bank
from moa.merging.export import verify as verifying
from moa.merging.export.export import export_adapter, export_checkpoint
from moa.merging.export.verify import fresh_outputs, make_verify, outputs_of, probe_inputs
from moa.merging.merge import merge
from moa.merging.site_plan import make_plan, sum_gates
from tests.support.tiny import random_image, save_tiny_llava, tiny_llava

TARGETS = r".*(language_model.*\.(q_proj|down_proj)|encoder.layers.0.*v_proj|projector.linear_1)"
WEIGHTS = {"one": 0.7, "two": 0.5}


def make_adapter(path, seed, **config):
    model, _ = tiny_llava()
    settings = LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", **config)
    wrapped = get_peft_model(model, settings)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base in the hub's old key layout, and two experts that differ in rank and scaling."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_llava(folder / "base")
    file = folder / "base" / "model.safetensors"
    hub = {k.replace("vision_tower.", "vision_tower.vision_model."): v
           for k, v in load_file(file).items()}  # fmt: skip
    save_file(hub, file, metadata={"format": "pt"})
    make_adapter(folder / "one", 1, r=2, lora_alpha=3)
    make_adapter(folder / "two", 2, r=3, lora_alpha=2, use_rslora=True)
    return folder


def load_base(world, dtype=torch.float32):
    return AutoModelForImageTextToText.from_pretrained(world / "base", dtype=dtype).eval()


def experts_of(world):
    return [expert_from_folder(world / name) for name in ("one", "two")]


def probe(world):
    processor = AutoProcessor.from_pretrained(world / "base")
    questions = ["what colour is the square?", "where is the dog"]
    return probe_inputs(processor, [random_image(0), random_image(1, 20, 60)], questions)


@pytest.fixture
def same_process(monkeypatch):
    """Reload here instead of in a fresh process, which costs seconds of imports."""

    def reload(inputs, *, model, adapter=None, new_tokens):
        loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
        consumed = None
        if adapter:
            loaded = PeftModel.from_pretrained(loaded, adapter).eval()
            consumed = len(get_peft_model_state_dict(loaded))
        return outputs_of(loaded, inputs, new_tokens), {"consumed": consumed}

    monkeypatch.setattr(verifying, "fresh_outputs", reload)


def stream_of(site):
    return "text" if "language_model" in site else "image"


def merge_and_verify(world, rank="sum", weights=WEIGHTS, exact=True):
    experts = experts_of(world)
    merged = merge(experts, weights=weights, rank=rank)
    verify = make_verify(
        load_base(world),
        probe(world),
        experts=experts,
        base=world / "base",
        gates=sum_gates(make_plan(experts, weights=weights)),
        exact=exact,
        stream_of=stream_of,
        new_tokens=4,
    )
    return experts, merged, verify


def test_an_exact_adapter_reloads_as_the_live_mixture(world, tmp_path):
    experts, merged, verify = merge_and_verify(world)
    base = str(world / "base")
    report = export_adapter(tmp_path / "out", merged, experts, base=base, verify=verify)
    found = report["comparisons"]
    assert found["live_mixture"]["max_abs_logit_diff"] < 1e-5
    assert found["live_mixture"]["greedy_token_agreement"] == 1.0
    assert found["base_to_live_mixture"]["max_abs_logit_diff"] > 0.05  # the probe feels the experts
    assert report["keys_consumed"] == len(load_file(tmp_path / "out/adapter_model.safetensors"))
    assert json.loads((tmp_path / "out/export_report.json").read_text()) == report
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 5 and not config["use_rslora"]
    assert config["base_model_name_or_path"] == base


def test_unequal_ranks_per_site_keep_a_scaling_of_one(world, tmp_path, same_process):
    experts, merged, verify = merge_and_verify(world, rank="energy:0.7", exact=False)
    ranks = {result.lora_a.shape[0] for result in merged.values()}
    assert len(ranks) > 1
    report = export_adapter(tmp_path / "out", merged, experts, verify=verify)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    comparisons = report["comparisons"]
    assert comparisons["written"]["max_abs_logit_diff"] < 1e-5
    assert comparisons["live_mixture"]["max_abs_logit_diff"] > 1e-3  # truncation, reported


def test_an_adapter_in_half_precision_is_checked_as_it_is_stored(world, tmp_path, same_process):
    experts, merged, verify = merge_and_verify(world)
    report = export_adapter(tmp_path / "out", merged, experts, dtype="bfloat16", verify=verify)
    comparisons = report["comparisons"]
    assert comparisons["written"]["max_abs_logit_diff"] < 1e-5
    assert 1e-5 < comparisons["live_mixture"]["max_abs_logit_diff"] < 0.05


@pytest.mark.slow
def test_a_checkpoint_has_the_keys_of_the_base_and_equals_the_live_mixture(world, tmp_path):
    experts, merged, verify = merge_and_verify(world)
    base = world / "base"
    report = export_checkpoint(tmp_path / "out", merged, experts, base=base, verify=verify)
    assert report["comparisons"]["live_mixture"]["max_abs_logit_diff"] < 1e-5
    theirs, ours = (load_file(base / "model.safetensors"), load_file(tmp_path / "out/model.safetensors"))
    assert set(theirs) == set(ours)
    changed = {key for key in theirs if not torch.equal(theirs[key], ours[key])}
    assert changed == set(report["keys_changed"]) and len(changed) == len(merged)
    AutoProcessor.from_pretrained(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_checkpoint_may_be_sharded_and_narrow(world, tmp_path, dtype, same_process):
    experts, merged, verify = merge_and_verify(world)
    out = tmp_path / "out"
    report = export_checkpoint(out, merged, experts, base=world / "base", dtype=dtype, max_shard_gb=1e-4, verify=verify)
    assert report["comparisons"]["written"]["max_abs_logit_diff"] < 1e-5
    assert len(list(out.glob("*.safetensors"))) > 1
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(read_base(world / "base").files)
    model = AutoModelForImageTextToText.from_pretrained(out, dtype="auto")
    assert model.dtype == getattr(torch, dtype)


def test_a_base_in_half_precision_keeps_its_dtype(world, tmp_path):
    load_base(world, torch.bfloat16).save_pretrained(tmp_path / "base")
    experts, merged, _ = merge_and_verify(world)
    report = export_checkpoint(tmp_path / "out", merged, experts, base=tmp_path / "base")
    assert not report["verified"]
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as file:
        assert {file.get_slice(key).get_dtype() for key in list(file.keys())} == {"BF16"}


@pytest.mark.slow
def test_a_trained_projector_goes_into_the_checkpoint(world, tmp_path, same_process):
    experts, merged, _ = merge_and_verify(world)
    model, names = load_base(world), ["linear_1.weight", "linear_2.weight", "linear_2.bias"]
    names = [f"model.multi_modal_projector.{name}" for name in names]
    trained = {name: model.get_parameter(name).data.mul_(1.5) for name in names}
    verify = verifying.make_verify(
        model,
        probe(world),
        experts=experts,
        base=world / "base",
        gates=sum_gates(make_plan(experts, weights=WEIGHTS)),
        exact=True,
        stream_of=stream_of,
    )
    report = export_checkpoint(tmp_path / "out", merged, experts, base=world / "base", replaced=trained, verify=verify)
    assert "multi_modal_projector.linear_2.bias" in report["keys_changed"]
    with pytest.raises(ValueError, match=r"projector.linear_9.bias: no weight fits"):
        name = "model.multi_modal_projector.linear_9.bias"
        export_checkpoint(tmp_path / "x", merged, experts, base=world / "base", replaced={name: torch.ones(32)})


def test_only_an_earlier_export_is_replaced(world, tmp_path):
    experts, merged, _ = merge_and_verify(world)
    for _ in range(2):
        export_adapter(tmp_path / "out", merged, experts)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="out: .*home holds other things"):
        export_adapter(tmp_path / "home", merged, experts)
    assert (tmp_path / "home" / "thesis.txt").exists()


def test_one_expert_alone_exports_to_itself(world, tmp_path, same_process):
    """The reference is plain PEFT on the folder that training wrote."""
    experts = experts_of(world)[1:]
    merged = merge(experts, weights={"two": 1})
    export_adapter(tmp_path / "out", merged, experts)
    inputs = probe(world)
    mine, _ = verifying.fresh_outputs(inputs, model=world / "base", adapter=tmp_path / "out", new_tokens=4)
    theirs, _ = verifying.fresh_outputs(inputs, model=world / "base", adapter=world / "two", new_tokens=4)
    torch.testing.assert_close(mine.logits, theirs.logits, rtol=0, atol=1e-5)
    assert torch.equal(mine.tokens, theirs.tokens)


def test_a_live_bank_exports_what_it_computes(world, tmp_path, same_process):
    model, inputs = load_base(world), probe(world)
    bank = ExpertBank.attach(model, [r".*language_model.*\.(q_proj|down_proj)"])
    for seed, name in enumerate(("vqa", "caption")):
        bank.add(name, rank=2 + seed, alpha=4.0, seed=seed)
        for parameter in bank.parameters(name):
            parameter.data = torch.randn(parameter.shape) * 0.2
    bank.set_gates(torch.tensor([0.8, 0.3]).expand(2, 1, 2))
    with torch.no_grad():
        live = model(**inputs).logits
    experts = experts_of_bank(bank)
    merged = merge(experts, weights={"vqa": 0.8, "caption": 0.3})
    export_adapter(tmp_path / "out", merged, experts)
    found, _ = verifying.fresh_outputs(inputs, model=world / "base", adapter=tmp_path / "out", new_tokens=1)
    torch.testing.assert_close(found.logits, live, rtol=0, atol=1e-5)


def test_a_wrong_export_is_caught_and_leaves_nothing(world, tmp_path, same_process):
    """A scaling other than one is what PEFT's own rsLoRA merge gets wrong."""
    experts, merged, verify = merge_and_verify(world)

    def spoil(folder, written):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
        return verify(folder, written)

    with pytest.raises(ValueError, match="written weights: reloaded logits differ"):
        export_adapter(tmp_path / "out", merged, experts, verify=spoil)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_key_that_peft_does_not_take_is_caught(world, tmp_path):
    experts, merged, verify = merge_and_verify(world)

    def spoil(folder, written):
        file = folder / "adapter_model.safetensors"
        save_file({k.replace("layers.1", "layers.7"): v for k, v in load_file(file).items()}, file)
        return verify(folder, written)

    with pytest.raises(ValueError, match="a fresh process reports .*adapter keys"):
        export_adapter(tmp_path / "out", merged, experts, verify=spoil)


def test_sites_find_their_keys_in_the_hubs_layout(world):
    base = read_base(world / "base")
    merged = merge(experts_of(world))
    keys = match_sites({s: (r.lora_b.shape[0], r.lora_a.shape[1]) for s, r in merged.items()}, base)
    language = "model.language_model.layers.1.self_attn.q_proj"
    assert keys[language] == "language_model.model.layers.1.self_attn.q_proj.weight"
    tower = "model.vision_tower.encoder.layers.0.self_attn.v_proj"
    assert keys[tower] == "vision_tower.vision_model.encoder.layers.0.self_attn.v_proj.weight"
    projector = "model.multi_modal_projector.linear_1"
    assert keys[projector] == "multi_modal_projector.linear_1.weight"


def test_every_linear_layer_of_the_base_is_found_with_its_own_weight(world):
    """The reference is transformers' own loading: equal values under both names."""
    model, base = load_base(world), read_base(world / "base")
    stored = load_file(world / "base/model.safetensors")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    keys = match_sites({n: tuple(m.weight.shape) for n, m in layers.items()}, base)
    assert len(set(keys.values())) == len(layers) > 20
    for name, layer in layers.items():
        assert torch.equal(stored[keys[name]], layer.weight)


def test_a_base_that_does_not_fit_is_refused(world, tmp_path):
    base = read_base(world / "base")
    with pytest.raises(ValueError, match="layers.9.q_proj.weight: no weight fits this name in the base"):
        match_sites({"model.language_model.layers.9.q_proj": (32, 32)}, base)
    site = "model.language_model.layers.0.self_attn.q_proj"
    with pytest.raises(ValueError, match=r"another base: it is \[64, 48\], and \[32, 32\] at"):
        match_sites({site: (64, 48)}, base)
    with pytest.raises(ValueError, match="base: .*nowhere has no config.json"):
        read_base(tmp_path / "nowhere")


def test_a_tied_output_layer_and_a_quantised_base_are_refused(tmp_path):
    model, _ = tiny_llava(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="site lm_head: the base ties it to another weight"):
        match_sites({"lm_head": (100, 32)}, read_base(tmp_path))
    file = tmp_path / "config.json"
    config = {**json.loads(file.read_text()), "quantization_config": {"bits": 4}}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json: quantization_config says"):
        read_base(tmp_path)


@pytest.mark.slow
def test_the_fresh_process_cannot_see_this_project(world, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "peft.py").write_text("raise RuntimeError('the wrong peft')")
    outputs, info = fresh_outputs(probe(world), model=world / "base", adapter=world / "one", new_tokens=2)
    plain = outputs_of(load_base(world), probe(world), 2)
    assert not torch.allclose(outputs.logits, plain.logits, atol=1e-3)
    assert info["consumed"] == len(load_file(world / "one/adapter_model.safetensors"))
