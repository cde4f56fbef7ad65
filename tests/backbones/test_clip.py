"""CLIP, SigLIP and open_clip: the contracts of every backbone, the tokenizers, the split attention."""

import json
from dataclasses import replace

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from data.pairs import only_images, only_texts
from moa.backbones.attention import SplitAttention, pack_attention, split_attention
from moa.backbones.clip import load_clip
from moa.backbones.open_clip import load_open_clip
from moa.backbones.opening import open_backbone
from tests.support.tiny import random_image
from tests.support.tiny_clip import KINDS, NAMES, collator_of, mixture_of, pair, save_tiny

TEXTS = [f"a photo of a {name}" for name in NAMES]
PICTURES = [random_image(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {kind: save_tiny(kind, root / kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def plain_features(kind, folder):
    """Normalised features of PICTURES and TEXTS by the library alone, as its documentation says."""
    with torch.no_grad():
        if kind == "open_clip":
            model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
            pixels = torch.stack([transform(picture) for picture in PICTURES])
            ids = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
            return model.train()(pixels, ids)[:2]  # in training mode: without its fused attention
        padding = True if kind == "clip" else "max_length"
        batch = AutoProcessor.from_pretrained(folder)(
            images=PICTURES,
            text=TEXTS,
            padding=padding,
            max_length=None if kind == "clip" else 32,
            return_tensors="pt",
        )
        if kind == "siglip":  # its documentation passes ids alone
            batch = {name: batch[name] for name in ("input_ids", "pixel_values")}
        found = AutoModel.from_pretrained(folder)(**batch)
    return found.image_embeds, found.text_embeds


def features_of(model, texts=TEXTS, pictures=PICTURES, gates=None):
    """Features by the mixture, each side with its router's gates unless told otherwise."""
    collator = collator_of(model.backbone)
    samples = [pair(i, image=p, answers=(t,), question="{}", choices=(), task="name")
               for i, (p, t) in enumerate(zip(pictures, texts, strict=True))]  # fmt: skip
    batch = collator(samples)
    sides = only_images(batch), only_texts(batch)
    decided = [model.compute_gates(side, override=gates).gates for side in sides]
    return model.image_features(batch, decided[0]), model.text_features(batch, decided[1]), decided


@pytest.mark.slow
@torch.no_grad()
def test_fresh_experts_and_experts_off_are_the_library_bit_for_bit(kind, folders):
    expected = plain_features(kind, folders[kind])
    images, texts, _ = features_of(mixture_of(folders[kind], kind))
    assert torch.equal(images, expected[0]) and torch.equal(texts, expected[1])
    model = mixture_of(folders[kind], kind, std=0.5)
    images, texts, _ = features_of(model)
    assert not torch.allclose(images, expected[0], atol=1e-3)
    assert not torch.allclose(texts, expected[1], atol=1e-3)
    with model.bank.context.disabled():
        images, texts, _ = features_of(model)
    assert torch.equal(images, expected[0]) and torch.equal(texts, expected[1])


@torch.no_grad()
def test_splitting_permuting_and_padding_a_batch_change_no_gate_and_no_feature(kind, folders):
    model = mixture_of(folders[kind], kind, std=0.5)
    images, texts, gates = features_of(model)
    assert gates[0].std(0).max() > 1e-3 and gates[1].std(0).max() > 1e-3  # they do depend on the sample
    order = [2, 0, 3, 1]
    swapped = features_of(model, [TEXTS[i] for i in order], [PICTURES[i] for i in order])
    # the shortest text alone is not padded as it is beside the longest
    alone = features_of(model, TEXTS[:1], PICTURES[:1])
    for row, found in ((order, swapped), ([0], alone)):
        torch.testing.assert_close(found[0], images[row], atol=1e-4, rtol=0)
        torch.testing.assert_close(found[1], texts[row], atol=1e-4, rtol=0)
    for side in (0, 1):
        torch.testing.assert_close(swapped[2][side], gates[side][order])


@torch.no_grad()
def test_a_pictures_gates_know_no_text_and_a_texts_no_picture(kind, folders):
    model = mixture_of(folders[kind], kind, std=0.5)
    _, _, gates = features_of(model)
    _, _, other_texts = features_of(model, texts=TEXTS[::-1])
    _, _, other_pictures = features_of(model, pictures=PICTURES[::-1])
    assert torch.equal(gates[0], other_texts[0]) and torch.equal(gates[1], other_pictures[1])
    assert not torch.equal(gates[1], other_texts[1])
    assert not torch.equal(gates[0], other_pictures[0])


@torch.no_grad()
def test_texts_are_pooled_at_their_end_and_never_at_position_0(kind, folders):
    """Under a causal mask the state at position 0 is the same for every text."""
    backbone = open_backbone(str(folders[kind]))
    ids, mask = backbone.processor.texts(TEXTS)
    changed = ids.clone()
    last = mask.sum(1) - 1  # the end token; the last word is before it
    changed[torch.arange(4), last - 1] = ids[:, 1].roll(1) + 1
    features = backbone.text_features(ids, mask)
    assert (backbone.text_features(changed, mask) - features).abs().amax(1).min() > 1e-3


def test_the_end_of_text_is_checked_where_a_config_has_the_old_mistake(tmp_path):
    """eos_token_id 2 makes transformers pool at the largest id: right for OpenAI's vocabulary alone."""
    folder = save_tiny("clip", tmp_path / "two", end=2)
    with pytest.raises(ValueError, match="pools at the largest id, which is token 0"):
        load_clip(str(folder))
    folder = save_tiny("clip", tmp_path / "lost")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 200
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="pools at id 200, which is token 0"):
        load_clip(str(folder))


def test_an_end_token_in_a_caption_is_a_bad_sample_since_the_text_would_end_there(kind, folders):
    backbone = open_backbone(str(folders[kind]))
    end = "<end_of_text>" if kind == "open_clip" else backbone.processor.tokenizer.eos_token
    batch, rejected = collator_of(backbone).split([pair(0), pair(1, answers=(end,), choices=())])
    assert len(batch) == 1 and [error.rule for error in rejected] == ["special token in text"]


def test_tokens_are_the_librarys_and_too_long_texts_are_refused(kind, folders):
    processor = open_backbone(str(folders[kind])).processor
    ids, mask = processor.texts(TEXTS)
    if kind == "open_clip":
        expected = open_clip.get_tokenizer(f"local-dir:{folders[kind]}")(TEXTS)
        assert torch.equal(ids, expected)
        assert processor.tokens(["cat"]) == [[49406, 2368, 49407]]
    else:
        padding = "max_length" if kind == "siglip" else True
        found = AutoProcessor.from_pretrained(folders[kind]).tokenizer(
            TEXTS, padding=padding, max_length=None if kind == "clip" else 32, return_tensors="pt"
        )
        assert torch.equal(ids, found["input_ids"]) and torch.equal(mask, found["attention_mask"])
    with pytest.raises(ValueError, match=f"reads {processor.context_length} tokens"):
        processor.texts(["cat " * 40])
    collator = collator_of(open_backbone(str(folders[kind])))
    batch, errors = collator.split([pair(0), pair(1, question="a {}" + " cat" * 40)])
    assert len(batch) == 1 and [error.rule for error in errors] == ["too long"]


def test_split_attention_is_the_same_layer_and_packs_back_bit_for_bit():
    torch.manual_seed(0)
    packed = torch.nn.MultiheadAttention(24, 4, batch_first=True)
    holder = torch.nn.ModuleDict({"attn": packed})
    x, state = torch.randn(3, 7, 24), {k: v.clone() for k, v in holder.state_dict().items()}
    causal = torch.full((7, 7), -torch.inf).triu(1)
    expected = packed(x, x, x, need_weights=False, attn_mask=causal)[0]
    assert split_attention(holder) == ["attn"]
    assert isinstance(holder["attn"], SplitAttention)
    assert torch.equal(holder["attn"](x, x, x, attn_mask=causal)[0], expected)
    with torch.no_grad():  # where torch takes its fused path, sums come in another order
        fused = packed.eval()(x, x, x, need_weights=False, attn_mask=causal)[0]
        found = holder.eval()["attn"](x, x, x, attn_mask=causal)[0]
    torch.testing.assert_close(found, fused, atol=1e-6, rtol=1e-5)
    pack_attention(holder)
    assert list(holder.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in holder.state_dict().items())
    with pytest.raises(ValueError, match="gives no attention weights"):
        SplitAttention(packed)(x, x, x, need_weights=True)


def test_attention_over_other_keys_is_left_alone():
    """A pooling layer may read keys of another width, or have the sequence first."""
    for options in ({"kdim": 8, "batch_first": True}, {"batch_first": False}):
        model = torch.nn.ModuleDict({"pool": torch.nn.MultiheadAttention(24, 4, **options)})
        assert split_attention(model) == []


def test_open_clip_is_never_loaded_with_random_weights(tmp_path, folders):
    for name, message in (
        ("open_clip:ViT-B-32", "names no weights"),
        ("open_clip:ViT-B-32:no_such_tag", "not a known tag"),
        ("open_clip:No-Such-Model:x", "No-Such-Model"),
    ):
        with pytest.raises(ValueError, match=message):
            load_open_clip(name)
    empty = tmp_path / "empty"
    empty.mkdir()
    config = (folders["open_clip"] / "open_clip_config.json").read_text()
    (empty / "open_clip_config.json").write_text(config)
    with pytest.raises(ValueError, match="could not be loaded"):
        load_open_clip(str(empty))


def test_an_open_clip_architecture_loads_its_weights_from_a_file(tmp_path, folders):
    open_clip.add_model_config(folders["open_clip"].parent)
    (tmp_path / "tiny-moa.json").write_text(
        json.dumps(json.loads((folders["open_clip"] / "open_clip_config.json").read_text())["model_cfg"])
    )
    open_clip.add_model_config(tmp_path)
    file = folders["open_clip"] / "open_clip_model.safetensors"
    backbone = load_open_clip(f"open_clip:tiny-moa:{file}")
    weights = load_file(file)["visual.transformer.resblocks.0.attn.in_proj_weight"]
    attention = backbone.model.visual.transformer.resblocks[0].attn
    found = [getattr(attention, name).weight for name in ("q_proj", "k_proj", "v_proj")]
    assert torch.equal(torch.cat(found), weights)


def test_the_collator_names_bad_pairs(folders):
    collator = collator_of(open_backbone(str(folders["clip"])))
    bad = [pair(0, answers=("cow",)), pair(1, answers=()), replace(pair(2), task="other")]
    batch, errors = collator.split([*bad, pair(3)])
    assert len(batch) == 1
    assert [error.rule for error in errors] == ["unknown class", "empty answer", "unknown task"]
    assert "'cow' is not among the 4 names" in str(errors[0])
