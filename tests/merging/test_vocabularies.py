"""An update between vocabularies: rows go to the same token, whatever its id, in the frame of the other base."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from moa.backbones.vocabulary import read_spellings
from moa.merging.align.carry import token_maps
from moa.merging.transplant import aligned_texts
from scripts import transplant as script
from tests.merging.test_carry import check, random, rotate, rotation
from tests.merging.test_transplant import refused
from tests.support import tiny

TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("frame", [torch.eye(8).double(), rotation(8), rotation(10)[:, :8]])
def test_rows_go_to_their_tokens_and_the_width_to_the_frame_of_the_other_base(frame):
    source, shared = random(60, 8), torch.stack([torch.arange(50), torch.randperm(70)[:50]], 1)
    target = random(70, len(frame), seed=1)
    target[shared[:, 1]] = source[:50] @ frame.T
    a, b = random(2, 8, seed=2), random(60, 2, seed=3)
    expected = torch.zeros(70, 2, dtype=b.dtype)
    expected[shared[:, 1]] = b[:50]
    maps = token_maps(source, target, shared)
    kept = torch.cat([b[:50], torch.zeros(10, 2, dtype=b.dtype)])
    check(maps, (a, kept), (a @ frame.T, expected))
    (_, rows), error = maps.carry((a, b))
    torch.testing.assert_close(rows, expected)
    assert error == pytest.approx(1 - float((kept @ a).square().sum() / (b @ a).square().sum()), abs=1e-9)
    assert token_maps(source, random(70, 8, seed=4), shared).error > 0.5
    if len(frame) == 8:
        plain = token_maps(source, target, shared, turn=False).error
        assert plain < 1e-9 if torch.equal(frame, torch.eye(8).double()) else plain > 0.5
    with pytest.raises(ValueError, match="the two vocabularies have 3 tokens in common"):
        token_maps(source, target, shared[:3])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A VLM, the same in a rotated frame, and a text model that is its language model with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("world")
    own = tiny.tiny_tokenizer()
    before = tiny.CORPUS
    try:
        tiny.CORPUS = ["which answer is a colour or a number? the red one", "number three, they read signs"]
        vlm, processor = tiny.tiny_llava()
    finally:
        tiny.CORPUS = before
    words, others = own.get_vocab(), processor.tokenizer.get_vocab()
    shared = torch.tensor([(number, others[word]) for word, number in words.items() if word in others])
    config = vlm.config.text_config
    text = LlamaForCausalLM(type(config)(**{**config.to_dict(), "vocab_size": len(own)})).eval()
    text.model.layers.load_state_dict(vlm.model.language_model.layers.state_dict())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part, whole in ((text.model.embed_tokens, vlm.get_input_embeddings()), (text.lm_head, vlm.lm_head)):
            part.weight[shared[:, 0]] = whole.weight[shared[:, 1]]
    for name, model, words_of in (("text", text, own), ("vlm", vlm, processor)):
        model.save_pretrained(folder / name)
        words_of.save_pretrained(folder / name)
    with torch.no_grad():
        lora = get_peft_model(text, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj", "lm_head"]))
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        lora.save_pretrained(folder / "lora", save_embedding_layers=False)
        text = lora.unload()
        for parameter in text.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    text.save_pretrained(folder / "tuned")
    rotate(vlm, rotation(32)).save_pretrained(folder / "turned")
    processor.save_pretrained(folder / "turned")
    signs = [*range(33, 58), *range(192, 256)]  # which neither tokenizer joins, so that both read the same tokens
    picked = torch.randint(len(signs), (24, 40), generator=generator).tolist()
    (folder / "texts.txt").write_text("\n".join("".join(chr(signs[i]) for i in row) for row in picked))
    return folder, shared


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids[None]).logits


@pytest.mark.slow
@pytest.mark.parametrize("carry", ["frames", "activations"])
def test_a_text_lora_answers_in_a_base_of_other_tokens_and_frame_as_in_its_own(world, tmp_path, capsys, carry):
    folder, shared = world
    texts = [f"texts={folder}/texts.txt"] if carry == "activations" else []
    arguments = [f"adapter={folder}/lora", f"text={folder}/text", f"vlm={folder}/turned", f"carry={carry}", *texts]
    script.main([*arguments, f"out={tmp_path}/out", "verify=false"])
    printed = capsys.readouterr().out
    assert f"{len(shared)} tokens are in both" in printed and "at lm_head" in printed
    errors = json.loads((tmp_path / "out" / "export_report.json").read_text())["transplant"]["errors"]
    assert 0.01 < errors.pop("lm_head") < 0.4 and max(errors.values()) < 1e-3
    vlm = tiny.LlavaForConditionalGeneration.from_pretrained(folder / "turned")
    text, (own, theirs) = LlamaForCausalLM.from_pretrained(folder / "text"), shared[20:60].T
    before = logits(text, own)[..., shared[:, 0]]
    expected = logits(PeftModel.from_pretrained(text, folder / "lora").eval(), own)[..., shared[:, 0]]
    found = logits(PeftModel.from_pretrained(vlm, tmp_path / "out").eval(), theirs)[..., shared[:, 1]]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (expected - before).abs().max() > 0.01


@pytest.mark.slow
def test_a_text_models_rows_go_to_their_tokens_and_alone_to_another_frame(world, tmp_path, capsys):
    folder, shared = world
    about = [f"model={folder}/tuned", f"text={folder}/text"]
    script.main([*about, f"vlm={folder}/vlm", f"out={tmp_path}/out"])
    assert f"rows of {len(shared)} tokens, error 0." in capsys.readouterr().out
    rest = "drop=[layers, norm]"
    script.main([*about, f"vlm={folder}/turned", rest, f"out={tmp_path}/turned"])
    tuned, text = (load_file(folder / name / "model.safetensors") for name in ("tuned", "text"))
    for name, turn in (("vlm", torch.eye(32)), ("turned", rotation(32).float())):
        before = load_file(folder / name / "model.safetensors")
        after = load_file(tmp_path / ("out" if name == "vlm" else name) / "model.safetensors")
        keys = {table: next(key for key in before if key.endswith(table.split("model.")[-1])) for table in TABLES}
        for table, key in keys.items():
            expected = before[key].clone()
            expected[shared[:, 1]] += (tuned[table] - text[table])[shared[:, 0]] @ turn.T
            torch.testing.assert_close(after[key], expected, rtol=0, atol=1e-5)
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        layers = {key for key in changed if ".layers." in key}
        assert changed >= {*keys.values()} and bool(layers) == (name == "vlm")
    line = refused(capsys, *about, f"vlm={folder}/turned", f"out={tmp_path}/none")
    assert "too little in common; drop=[layers, norm] moves the rows of tokens alone" in line
    shutil.copytree(folder / "vlm", tmp_path / "foreign")
    file = tmp_path / "foreign" / "tokenizer.json"
    record = json.loads(file.read_text())
    record["model"] |= {"vocab": {f"x{word}x": n for word, n in record["model"]["vocab"].items()}, "merges": []}
    record["added_tokens"] = record["added_tokens"][:2]
    file.write_text(json.dumps(record))
    line = refused(capsys, *about, rest, f"vlm={tmp_path}/foreign", f"out={tmp_path}/none")
    assert "vocabularies have 2 tokens in common" in line and not (tmp_path / "none").exists()


def test_texts_are_compared_where_tokens_of_both_end(world, tmp_path):
    folder, _ = world
    (tmp_path / "texts.txt").write_text("what colour is the number?\nthe red one\n")
    spelled = [{n: word for word, n in read_spellings(folder / name).items()} for name in ("text", "vlm")]
    found = aligned_texts(folder / "text", folder / "vlm", tmp_path / "texts.txt")
    for pair in found:
        prefixes = [
            [b"".join(table[n] for n in ids[0, : place + 1].tolist()) for place in places]
            for table, (ids, places) in zip(spelled, pair, strict=True)
        ]
        assert prefixes[0] == prefixes[1] and len(prefixes[0]) > 2
    assert [len(ids[0]) for ids, _ in found[0]] != [len(places) for _, places in found[0]]
