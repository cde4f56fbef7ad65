"""The backbone's pieces, put together, are the model that transformers runs."""

import copy

import pytest
import torch

from moa.backbones.llava import Backbone, load_backbone
from moa.experts import ExpertBank
from tests.tiny import tiny_batch, tiny_llava

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
    ids, mask = batch.input_ids, batch.attention_mask
    if name == "class token":  # one more token per picture
        image = torch.full((4, 1), backbone.model.config.image_token_index)
        ids, mask = torch.cat([image, ids], 1), torch.cat([torch.ones_like(image), mask], 1)
    whole = backbone.model(input_ids=ids, attention_mask=mask, pixel_values=batch.pixel_values)
    tokens = backbone.image_tokens(batch.pixel_values)
    assert tokens.shape[-1] == backbone.dims["image"]
    embeds = backbone.inputs_embeds(ids, backbone.project(tokens))
    assert embeds.shape[-1] == backbone.dims["text"]
    ours = backbone.logits(backbone.hidden_states(embeds, mask))
    torch.testing.assert_close(ours[mask.bool()], whole.logits[mask.bool()], atol=1e-5, rtol=1e-4)


def test_generation_from_embeddings_equals_that_from_ids_and_pictures():
    backbone = changed()
    batch = tiny_batch(backbone.processor, answers=None, left=True)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    whole = backbone.model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        pixel_values=batch.pixel_values,
        **options,
    )
    features = backbone.project(backbone.image_tokens(batch.pixel_values))
    embeds = backbone.inputs_embeds(batch.input_ids, features)
    new = backbone.generate(embeds, batch.attention_mask, **options)
    assert new.equal(whole[:, batch.input_ids.shape[1] :])


@pytest.mark.parametrize("name", CHANGES)
def test_the_unused_sites_are_those_whose_weights_get_no_gradient(name):
    backbone = changed(**CHANGES[name])
    batch = tiny_batch(backbone.processor)
    backbone.project(backbone.image_tokens(batch.pixel_values)).sum().backward()
    without = {
        site
        for site, module in backbone.model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and backbone.stream_of(site) == "image"
        and module.weight.grad is None
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


def test_a_missing_folder_or_another_family_is_refused_with_the_choices(tmp_path):
    with pytest.raises(ValueError, match="nothing is no folder"):
        load_backbone(str(tmp_path / "nothing"))
    tiny_llava()[0].config.text_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a llama; choices: llava"):
        load_backbone(str(tmp_path))
