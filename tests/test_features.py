"""The tower's states of pictures, kept on the disk: the same losses, no second look at a picture."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torch import nn

from data.boxes import CODECS
from data.collate import Collator
from data.features import FeatureStore
from data.sources import open_sources
from moa.build import build_model
from moa.config import RunConfig
from moa.experts import ExpertBank
from moa.features import check_model, keep, open_features
from moa.model import MixtureModel
from scripts import features as script
from tests.families import tiny_family
from tests.test_backbones import samples_for
from tests.test_train import log_of, run_once
from tests.toy import toy_config, toy_world

FIXED = ("llava", "paligemma")
TOWER = r"model\.vision_tower\.\S*mlp\.fc1"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("world")


@pytest.fixture
def cached(world, tmp_path) -> RunConfig:
    return short(world, tmp_path / "run", data__feature_cache=str(tmp_path / "features"))


def short(world: Path, out: Path, **changes) -> RunConfig:
    stages = [{"name": "experts", "steps": 3}, {"name": "joint", "steps": 2}]
    return toy_config(world, out=str(out), stages=stages, data__validation=[], **changes)


def passes_of_tower(model: MixtureModel) -> list[int]:
    """Grows by one at each pass of the tower."""
    seen: list[int] = []
    model.model.get_submodule("model.vision_tower").encoder.register_forward_hook(
        lambda *_: seen.append(1)
    )
    return seen


def filled(config: RunConfig, world: Path, tmp_path: Path) -> FeatureStore:
    """The store of a config after the command has been over all its pictures."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(toy_world(world)))
    script.main(["--config", str(file), f"data.feature_cache={config.data.feature_cache}"])
    store = open_features(config, build_model(config))
    assert store is not None
    return store


def small_store(folder: Path) -> FeatureStore:
    store = FeatureStore(folder)
    store.add([("a", "pixels of a"), ("b", "pixels of b")], torch.arange(12.0).view(2, 3, 2))
    store.flush()
    return store


def test_a_run_that_keeps_and_one_that_only_reads_repeat_the_losses_bit_for_bit(
    world, cached, tmp_path, monkeypatch
):
    plain = short(world, tmp_path / "plain")
    run_once(plain)
    run_once(cached)  # the first batches meet unknown pictures, the later ones do not
    assert log_of(cached) == log_of(plain)
    again = replace(cached, out=str(tmp_path / "again"))

    def decode(self):
        raise AssertionError("a known picture was decoded")

    monkeypatch.setattr(PngImageFile, "load", decode)
    run_once(again)
    assert log_of(again) == log_of(plain)


def test_the_command_meets_every_picture_once_and_training_then_leaves_the_tower_alone(
    world, cached, tmp_path, capsys
):
    store = filled(cached, world, tmp_path)
    assert len(store) == 5  # of 24 samples in two sources
    before = store.num_bytes
    assert "5 (0.0 MiB" in capsys.readouterr().out
    filled(cached, world, tmp_path)
    assert store.num_bytes == before
    model = build_model(cached)
    seen = passes_of_tower(model)
    assert batch_of(cached, model, store).tower_states is not None
    model(batch_of(cached, model, store))
    assert not seen
    model(batch_of(cached, model, None))
    assert seen


def batch_of(config: RunConfig, model: MixtureModel, store: FeatureStore | None, **changes):
    source = open_sources(config.data.sources, config.data, None, store)["vqa"]
    collator = Collator(
        processor=model.backbone.processor,
        tasks=["vqa"],
        experts=["vqa"],
        codec=CODECS["location_tokens"],
        features=store,
        **changes,
    )
    return collator([source[i] for i in range(4)])


def test_a_projector_may_have_experts(world, cached, tmp_path):
    config = replace(
        cached, model=replace(cached.model, targets=[r"model\.multi_modal_projector\.linear_1"])
    )
    store, model = filled(config, world, tmp_path), build_model(config).eval()
    for b in model.bank.parameters():
        torch.nn.init.normal_(b, generator=torch.Generator().manual_seed(0))
    known, seen = (model(batch_of(config, model, s)) for s in (store, None))
    assert torch.equal(known.loss_per_sample, seen.loss_per_sample)


def test_generation_from_known_pictures_is_that_from_pixels(world, cached, tmp_path):
    store = filled(cached, world, tmp_path)
    model = build_model(cached).eval()
    known, seen = (batch_of(cached, model, s, for_generation=True) for s in (store, None))
    assert torch.equal(known.input_ids, seen.input_ids)
    assert torch.equal(
        model.generate(known, max_new_tokens=5, num_beams=2),
        model.generate(seen, max_new_tokens=5, num_beams=2),
    )


@pytest.mark.parametrize("name", FIXED)
def test_families_of_fixed_pictures_compute_the_same_from_kept_states(name, tmp_path):
    model = routed(name)
    check_model(model)
    store = FeatureStore(tmp_path)
    collator = Collator(
        processor=model.backbone.processor,
        tasks=["vqa"],
        experts=["e"],
        codec=CODECS["location_tokens"],
    )
    samples = [replace(s, task="vqa", expert="e") for s in samples_for(name) if s.image]
    plain, watched = collator(samples), replace(collator, features=store)
    keep(store, model, watched(samples), "fp32")
    known = watched(samples)
    assert known.tower_states is not None
    assert torch.equal(known.input_ids, plain.input_ids)
    one, other = model(known), model(plain)
    assert torch.equal(one.loss_per_sample, other.loss_per_sample)
    assert torch.equal(one.gates, other.gates)


def routed(name: str, targets: str = r"model\.\w+_model\.layers\.0\.mlp\.up_proj"):
    backbone = tiny_family(name)
    bank = ExpertBank.attach(backbone.model, [targets], stream_of=backbone.stream_of)
    bank.add("e", rank=2, alpha=2)
    return MixtureModel(backbone, bank, kind="fixed").eval()


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "qwen2_vl", "idefics3"])
def test_families_of_tiles_and_patches_are_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"feature_cache: {name} sees a picture as"):
        check_model(routed(name))


@pytest.mark.parametrize("name", ["internvl", "gemma3"])
def test_a_processor_that_may_cut_pictures_is_refused_by_name(name):
    processor = {"internvl": "GotOcr2", "gemma3": "Gemma3"}[name]
    with pytest.raises(ValueError, match=rf"feature_cache: {processor}ImageProcessor\w* may cut"):
        check_model(routed(name))


def test_a_tower_that_does_not_stay_as_it_is_is_refused():
    with pytest.raises(ValueError, match=r"experts at model\.vision_tower\S*fc1 change"):
        check_model(routed("llava", TOWER))
    learning = routed("llava")
    tower = learning.model.get_submodule("model.vision_tower")
    bias = next(p for name, p in tower.named_parameters() if name.endswith("bias"))
    bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"bias is trained"):
        check_model(learning)
    bias.requires_grad_(False)
    tower.encoder.layers[0].mlp.add_module("dropout", nn.Dropout(0.1))
    with pytest.raises(ValueError, match="has dropout"):
        check_model(learning)


def test_other_weights_processors_and_precisions_have_other_folders(world, cached):
    def folder(config: RunConfig, model: MixtureModel) -> Path:
        store = open_features(config, model)
        assert store is not None
        return store.folder

    model = build_model(cached)
    first = folder(cached, model)
    assert folder(cached, build_model(cached)) == first
    bf16 = replace(cached, data=replace(cached.data, feature_dtype="bf16"))
    mixed = replace(cached, train=replace(cached.train, precision="bf16"))
    others = {folder(config, model) for config in (bf16, mixed)}
    model.backbone.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    others.add(folder(cached, model))
    next(model.model.get_submodule("model.vision_tower").parameters()).data[0] += 1
    others.add(folder(cached, model))
    assert len(others | {first}) == 5
    assert json.loads((first / "about.json").read_text())["weights"] == "float32"


def test_bits_are_kept_as_they_come_or_rounded_where_asked(tmp_path):
    states = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    for name, dtype, expected in (
        ("exact", None, states),
        ("rounded", torch.bfloat16, states.bfloat16()),
    ):
        writer = FeatureStore(tmp_path / name, dtype=dtype)
        writer.add([("a", "x"), ("b", "y"), ("a", "x")], states[[0, 1, 0]])
        writer.flush()
        found = FeatureStore(tmp_path / name).find(["b", "a"])
        assert found is not None and torch.equal(found, expected[[1, 0]])


def test_a_torn_file_is_put_aside_and_its_pictures_are_written_anew(tmp_path):
    whole = small_store(tmp_path)
    whole.add([("c", "pixels of c")], torch.ones(1, 3, 2))
    whole.flush()
    torn = whole._shards["a"]
    torn.write_bytes(torn.read_bytes()[:-5])
    (tmp_path / ".killed.tmp").write_bytes(b"half")
    store = FeatureStore(tmp_path)
    assert store.torn == [torn.with_suffix(".torn")]
    assert store.find(["a"]) is None and store.find(["c"]) is not None
    store.add([("a", "pixels of a")], torch.zeros(1, 3, 2))
    store.flush()
    found = FeatureStore(tmp_path).find(["a", "c"])
    assert found is not None and torch.equal(found[1], torch.ones(3, 2))


def test_readers_learn_of_what_another_process_has_added(tmp_path):
    reader = FeatureStore(tmp_path)
    assert reader.find(["a"]) is None
    small_store(tmp_path)
    found = reader.find(["b"])
    assert found is not None and torch.equal(found[0], torch.arange(6.0, 12.0).view(3, 2))
    assert reader.pixels_of("b") == "pixels of b"


def test_what_was_not_flushed_is_unknown_to_others_but_not_to_its_writer(tmp_path):
    store = small_store(tmp_path)
    store.add([("c", "x")], torch.ones(1, 3, 2))
    assert store.find(["a", "c"]) is not None
    assert FeatureStore(tmp_path).find(["c"]) is None


def test_drawn_pictures_go_by_their_pixels(world, cached):
    model = build_model(cached)
    store = open_features(cached, model)
    assert store is not None
    red, blue = (Image.new("RGB", (30, 30), colour) for colour in ("red", "blue"))
    batch = batch_of(cached, model, store)
    collator = Collator(
        processor=model.backbone.processor, tasks=["vqa"], experts=["vqa"],
        codec=CODECS["location_tokens"], features=store,
    )  # fmt: skip
    drawn = [replace(batch.samples[0], image=image, picture_key=None) for image in (red, blue)]
    keep(store, model, collator(drawn[:1]), "fp32")
    assert collator(drawn[:1]).tower_states is not None
    assert collator(drawn).tower_states is None
