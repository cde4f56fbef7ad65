"""A text model's LoRA or difference inside a VLM: the VLM's text answers are those of the text model with it."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlavaForConditionalGeneration

from moa.backbones.families import FAMILIES
from moa.merging.transplant import place_of
from scripts import merge as merge_script
from scripts import transplant as script
from tests.support.families import tiny_family
from tests.support.tiny import tiny_batch, tiny_llava

LANGUAGE = "model.language_model"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A VLM with two more tokens than the text model that its language model is; a LoRA and a tuned copy of that."""
    folder = tmp_path_factory.mktemp("world")
    vlm, processor = tiny_llava()
    config = vlm.config.text_config
    rows = config.vocab_size - 2
    text = LlamaForCausalLM(type(config)(**{**config.to_dict(), "vocab_size": rows})).eval()
    own = {key: value[:rows] if key.endswith(("embed_tokens.weight", "lm_head.weight")) else value
           for key, value in vlm.model.language_model.state_dict(prefix="model.").items()}  # fmt: skip
    text.load_state_dict({**own, "lm_head.weight": vlm.lm_head.weight[:rows]})
    for name, model in (("vlm", vlm), ("text", text)):
        model.save_pretrained(folder / name)
        processor.tokenizer.save_pretrained(folder / name)
    processor.save_pretrained(folder / "vlm")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        lora = get_peft_model(text, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        lora.save_pretrained(folder / "lora")
        text = lora.unload()
        for parameter in text.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    text.save_pretrained(folder / "tuned")
    return folder


def logits(model, rows):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 9)[None]).logits[..., :rows]


def refused(capsys, *arguments):
    with pytest.raises(SystemExit):
        script.main(list(arguments))
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_text_lora_answers_in_the_vlm_as_in_the_text_model(world, tmp_path, capsys):
    out = tmp_path / "out"
    script.main([f"adapter={world}/lora", f"text={world}/text", f"vlm={world}/vlm", f"out={out}", "verify=false"])
    printed = capsys.readouterr().out
    assert f"4 layers, all in {LANGUAGE}" in printed and "tokens are in both, 333 with the same id" in printed
    vlm, _ = tiny_llava()
    text = LlamaForCausalLM.from_pretrained(world / "text")
    rows = text.config.vocab_size
    before = logits(text, rows)
    found = logits(PeftModel.from_pretrained(vlm, out).eval(), rows)
    expected = logits(PeftModel.from_pretrained(text, world / "lora").eval(), rows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected - before).abs().max() > 0.01
    keys = load_file(out / "adapter_model.safetensors")
    assert all(key.startswith(f"base_model.model.{LANGUAGE}.layers.") for key in keys)


@pytest.mark.slow
def test_a_text_models_difference_changes_the_language_model_alone_and_its_first_rows(world, tmp_path, capsys):
    out = tmp_path / "out"
    script.main([f"model={world}/tuned", f"text={world}/text", f"vlm={world}/vlm", "weight=0.5", f"out={out}"])
    assert "resized: model.language_model.embed_tokens.weight" in " ".join(capsys.readouterr().out.split())
    tuned, text = (load_file(world / name / "model.safetensors") for name in ("tuned", "text"))
    before, after = (load_file(folder / "model.safetensors") for folder in (world / "vlm", out))
    moved = {key: row["from"] for key, row in json.loads((out / "manifest.json").read_text()).items()}
    assert before.keys() == after.keys() == moved.keys() and sorted(filter(None, moved.values())) == sorted(tuned)
    for key, name in moved.items():
        assert (name is None) == ("vision" in key or "projector" in key)
        expected = before[key].clone()
        if name is not None:
            expected[: len(tuned[name])] += 0.5 * (tuned[name] - text[name])
        torch.testing.assert_close(after[key], expected, rtol=0, atol=1e-6)
    back = tmp_path / "back"
    script.main([f"model={world}/tuned", f"text={world}/text", f"vlm={out}", "weight=-0.5", f"out={back}"])
    for key, value in load_file(back / "model.safetensors").items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_text_lora_and_a_projectors_merge_into_one_adapter_that_does_what_both_do(world, tmp_path):
    script.main(
        [f"adapter={world}/lora", f"text={world}/text", f"vlm={world}/vlm", f"out={tmp_path}/text", "verify=false"]
    )
    vlm, processor = tiny_llava()
    lora = get_peft_model(vlm, LoraConfig(r=2, target_modules=r".*multi_modal_projector\.linear_\d"))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    lora.save_pretrained(tmp_path / "projector")
    adapters = f"adapters=[{tmp_path}/text,{tmp_path}/projector]"
    about = [f"base={world}/vlm", f"out={tmp_path}/both", "verify=false"]
    merge_script.main([adapters, "method=task_arithmetic", "weights=[1,1]", *about])
    expected, inputs = tiny_llava()[0], tiny_batch(processor)
    asked = {name: getattr(inputs, name) for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        before = expected(**asked).logits
        for name in ("text", "projector"):
            expected = PeftModel.from_pretrained(expected, tmp_path / name).merge_and_unload()
        wanted, real = expected(**asked).logits, inputs.attention_mask.bool()
        found = PeftModel.from_pretrained(tiny_llava()[0], tmp_path / "both").eval()(**asked).logits
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-5)
    assert (wanted - before)[real].abs().max() > 0.01


@pytest.mark.slow
def test_a_reward_model_judges_in_the_vlm_as_alone(world, tmp_path):
    reward, generator = LlamaForSequenceClassification.from_pretrained(world / "text", num_labels=1), torch.Generator()
    with torch.no_grad():
        for parameter in reward.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator.manual_seed(3))
    reward.save_pretrained(tmp_path / "reward")
    about = [f"model={tmp_path}/reward", f"text={world}/text", f"vlm={world}/vlm", f"out={tmp_path}/judge"]
    script.main([*about, "drop=[score]"])
    judge, ids = LlavaForConditionalGeneration.from_pretrained(tmp_path / "judge"), torch.arange(3, 9)[None]
    with torch.no_grad():
        hidden = judge.model.language_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(reward.score(hidden[:, -1]), reward(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_what_does_not_fit_is_refused_by_name(world, tmp_path, capsys):
    vlm, out = f"vlm={world}/vlm", f"out={tmp_path}/out"
    other = tmp_path / "other"
    shutil.copytree(world / "text", other)
    record = json.loads((other / "tokenizer.json").read_text())
    record["added_tokens"][0]["id"], record["added_tokens"][1]["id"] = 1, 0
    (other / "tokenizer.json").write_text(json.dumps(record))
    small, _ = tiny_llava(hidden=16)
    small.save_pretrained(tmp_path / "small")
    whole = [f"model={world}/tuned", f"text={world}/text"]
    cases = (
        ([vlm, out], "adapter, model: give one of the two"),
        ([f"vlm={world}/text", out, *whole], "is a llama; choices: llava,"),
        ([vlm, out, f"model={world}/tuned"], "text: names no folder"),
        ([vlm, out, *whole, "drop=[score]"], "drop: 'score' is in none of"),
        ([vlm, out, *whole, "weight=0"], "weight: 0 moves nothing"),
        ([vlm, out, f"adapter={world}/lora", f"text={other}"], "other_base=true moves the update"),
        ([f"vlm={tmp_path}/small", out, f"adapter={world}/lora"], "must be of the same family and size"),
        ([f"vlm={tmp_path}/small", out, *whole], "text: config.json has "),
        ([f"vlm={tmp_path}/small", out, *whole, "other_base=true"], "made for another base"),
    )
    for arguments, message in cases:
        assert message in refused(capsys, *arguments), message
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_names_where_its_language_model_is(family):
    """Its row holds a stack of layers there, none of them the tower's, and text layers have one place in it."""
    model, row = tiny_family(family).model, FAMILIES[family]
    names = [name for name, _ in model.get_submodule(row.language).named_modules() if name.startswith("layers.0.")]
    assert names and not row.language.startswith(row.tower)
    for name in names:
        assert place_of(f"model.{name}", row.language) == f"{row.language}.{name}"
        assert place_of(f"{row.language}.{name}", row.language) == f"{row.language}.{name}"
    assert place_of("lm_head.weight", row.language) == "lm_head.weight"
