"""The base's processor as the config changes it, and the box convention that `auto` finds."""

from dataclasses import replace

import pytest
import transformers

from data.boxes import CODECS
from data.checks import BadSampleError
from data.geometry import seen_by
from data.sources import make_collator
from moa.backbones.families import FAMILIES
from moa.backbones.llava import Backbone, load_backbone, open_intake
from moa.backbones.opening import open_backbone
from moa.backbones.processors import adjusted, box_convention
from moa.config import load_config
from tests.backbones.test_backbones import samples_for
from tests.support.families import tiny_family, tokenizer_with
from tests.support.tiny import random_image, tiny_tokenizer

SIZES = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}


def saved_llava(folder) -> Backbone:
    """A LLaVA-1.5 as the hub has it: CLIP's image processor, shortest edge and centre crop."""
    backbone = tiny_family("llava")
    backbone.processor.image_processor = transformers.CLIPImageProcessor(**SIZES)
    backbone.model.save_pretrained(folder)
    backbone.processor.save_pretrained(folder)
    return backbone


def test_do_pad_brings_back_the_square_that_llava_was_trained_with(tmp_path):
    saved_llava(tmp_path)
    wide = random_image(3, 80, 40)
    cropped = load_backbone(str(tmp_path)).processor.image_processor
    padded = load_backbone(str(tmp_path), image_processor={"do_pad": True}).processor.image_processor
    assert seen_by(cropped, 80, 40).seen == pytest.approx((20.0, 0.0, 60.0, 40.0))
    geometry = seen_by(padded, 80, 40)
    assert geometry.seen == (0.0, 0.0, 80.0, 40.0)
    assert geometry.to_frame((0.0, 0.0, 80.0, 40.0)) == (0.0, 7.0, 28.0, 21.0)
    own = transformers.LlavaImageProcessor(do_pad=True, **SIZES)
    found = [p(images=[wide], return_tensors="pt")["pixel_values"] for p in (padded, own)]
    assert found[0].equal(found[1])
    band = found[0][0, :, :5]  # above the picture: the mean colour, zero but for rounding
    assert band.abs().max() < 0.05 < found[0][0, :, 7:21].abs().mean()


def test_the_twin_without_torchvision_pads_too():
    kind = transformers.CLIPImageProcessorPil(**SIZES)
    assert type(adjusted(kind, {"do_pad": True})) is transformers.LlavaImageProcessorPil


def test_any_setting_of_the_image_processor_may_be_another_and_the_rest_stays(tmp_path):
    saved_llava(tmp_path)
    sizes = {"crop_size": {"height": 14, "width": 14}, "do_center_crop": False}
    found = open_intake(str(tmp_path), sizes).processor.image_processor
    assert (dict(found.crop_size)["height"], found.do_center_crop) == (14, False)
    assert dict(found.size)["shortest_edge"] == 28


def test_a_setting_that_is_none_is_named_with_the_nearest(tmp_path):
    saved_llava(tmp_path)
    with pytest.raises(ValueError, match=r"model\.image_processor\.do_padd: .*mean 'do_pad'.*size"):
        open_intake(str(tmp_path), {"do_padd": True})
    with pytest.raises(ValueError, match=r"model\.image_processor: has no effect on a CLIP"):
        open_backbone("assets/clip_base", image_processor={"do_pad": True})


def test_padding_that_no_geometry_knows_is_refused():
    kind = transformers.SiglipImageProcessor(size={"height": 28, "width": 28}, do_pad=True)
    with pytest.raises(ValueError, match="do_pad of SiglipImageProcessor.*boxes have no frame"):
        seen_by(kind, 80, 40)


@pytest.mark.parametrize("name", FAMILIES)
def test_auto_writes_boxes_as_the_family_was_trained(name):
    plain = tokenizer_without_locations()
    assert box_convention(FAMILIES[name], plain) == FAMILIES[name].box_codec


def tokenizer_without_locations():
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=transformers.AutoTokenizer.from_pretrained("assets/clip_base").backend_tokenizer
    )


def test_auto_prefers_location_tokens_where_the_vocabulary_has_them():
    assert box_convention(FAMILIES["llava"], tiny_tokenizer()) == "location_tokens"
    more = {f"place{i}": f"<loc{i:04d}>" for i in range(1024)}
    assert box_convention(FAMILIES["gemma3"], tokenizer_with(**more)) == "paligemma"


def test_the_embedded_base_writes_its_own_location_tokens_by_auto():
    config = load_config("configs/demo.yaml")
    assert config.prompt.box_codec == "auto"
    collator = make_collator(config, open_intake(config.model.name))
    assert collator.box_codec is CODECS["location_tokens"]


@pytest.mark.slow
def test_a_base_without_a_convention_needs_one_as_soon_as_there_is_a_box():
    config, intake = load_config("configs/demo.yaml"), tiny_family("gemma3").intake
    collator = make_collator(config, replace(intake, box_codec=None))
    collator([replace(samples_for("gemma3")[0], expert=None)])  # no box, no need
    boxed = replace(samples_for("gemma3")[0], answers=(), boxes=((1, 1, 9, 9),))
    with pytest.raises(ValueError, match=r"prompt\.box_codec: auto, .*choices: location_tokens"):
        collator([boxed])


def test_a_base_that_wants_a_picture_names_the_sample_without_one():
    collator = make_collator(load_config("configs/demo.yaml"), tiny_family("paligemma").intake)
    text = replace(samples_for("llava")[3], id="17")
    with pytest.raises(BadSampleError, match="source 'toy', sample 17: missing image: this base"):
        collator([text])
