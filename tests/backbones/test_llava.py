"""The backbone's pieces, put together, are the model that transformers runs."""

import copy
import dataclasses

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from moa.backbones.llava import Backbone, load_backbone, repeated
from moa.experts.bank import ExpertBank
from tests.support.tiny import tiny_batch, tiny_llava

CHANGES = {
    "as it is": {},
    "last layer": {"vision_feature_layer": -1},
    "first layer": {"vision_feature_layer": 1},
    "two layers": {"vision_feature_layer": [-2, 1]},
    "class token": {"vision_feature_select_strategy": "full"},
}


def changed(**settings) -> Backbone:
    """A tiny model with other vision settings, and a projector wide enough for them."""
    model, processor = tiny_llava()
    config = copy.deepcopy(model.config)
    for key, value in settings.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return Backbone(model=type(model)(config).eval(), processor=processor)


@pytest.mark.parametrize("name", CHANGES)
def test_the_pieces_in_a_row_equal_the_whole_model(name):
    backbone = changed(**CHANGES[name])
    batch = tiny_batch(backbone.processor)
    if name == "class token":  # one more token per picture
        image = torch.full((4, 1), backbone.model.config.image_token_id)
        ids = torch.cat([image, batch.input_ids], 1)
        mask = torch.cat([torch.ones_like(image), batch.attention_mask], 1)
        batch = dataclasses.replace(batch, input_ids=ids, attention_mask=mask)
    whole = backbone.model(**backbone.inputs_of(batch)).logits
    look = backbone.look(batch)
    assert look.tokens.shape[-1] == backbone.dims["image"]
    assert look.owner.tolist() == [0, 1, 2, 3]
    mask = batch.attention_mask.bool()
    for features in (look.features, backbone.features(batch, look.tower)):
        ours = backbone.logits(backbone.hidden_states(batch, features))
        torch.testing.assert_close(ours[mask], whole[mask], atol=1e-5, rtol=1e-4)


def test_generation_is_that_of_the_whole_model_and_the_model_is_left_as_it_was():
    backbone = changed()
    batch = tiny_batch(backbone.processor, answers=None, left=True)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    whole = backbone.model.generate(**backbone.inputs_of(batch), **options)
    before = dict(backbone.model.model.__dict__)
    new = backbone.generate(batch, backbone.features(batch), **options)
    assert new.equal(whole[:, batch.input_ids.shape[1] :])
    assert backbone.model.model.__dict__.keys() == before.keys()


@pytest.mark.parametrize("kind", ["list", "tensor"])
def test_features_are_repeated_with_their_prompts(kind):
    """What a transformers that repeats prompts ahead of the pictures asks for."""
    entries = torch.arange(4.0)[:, None, None].expand(4, 2, 1)  # four pictures of two tokens
    features = BaseModelOutputWithPooling(pooler_output=entries if kind == "tensor" else list(entries))
    counts = torch.tensor([4, 0, 2, 2])  # two of the first sample, none of the second
    found = repeated(features, 2, counts).pooler_output
    assert [int(entry[0, 0]) for entry in found] == [0, 1, 0, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("name", CHANGES)
def test_the_unused_sites_are_those_whose_weights_get_no_gradient(name):
    backbone = changed(**CHANGES[name])
    batch = tiny_batch(backbone.processor)
    sum(entry.sum() for entry in backbone.features(batch).pooler_output).backward()
    without = {
        site
        for site, module in backbone.model.named_modules()
        if isinstance(module, torch.nn.Linear) and backbone.stream_of(site) == "image" and module.weight.grad is None
    }
    assert set(backbone.unused_sites()) == without


def test_experts_past_the_layer_that_is_read_are_refused():
    backbone = changed()
    everything = r"model\.vision_tower\..*_proj"
    with pytest.raises(ValueError, match=r"past vision_feature_layer.*layers\.2"):
        ExpertBank.attach(backbone.model, [everything], unused=backbone.unused_sites())
    bank = ExpertBank.attach(
        backbone.model,
        [everything],
        exclude=[r".*\.layers\.2\..*"],
        unused=backbone.unused_sites(),
        stream_of=backbone.stream_of,
    )
    assert set(bank.streams.values()) == {"image"}


def test_a_folder_is_loaded_frozen_with_its_processor(tmp_path):
    model, processor = tiny_llava()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), torch.bfloat16)
    assert backbone.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not backbone.model.training
    loaded, first = backbone.model.state_dict(), model.state_dict()
    assert all(loaded[key].equal(first[key].bfloat16()) for key in first)
    assert tiny_batch(backbone.processor).input_ids.equal(tiny_batch(processor).input_ids)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing is not a folder"):
        load_backbone(str(tmp_path / "nothing"))
