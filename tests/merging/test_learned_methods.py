"""ZipLoRA, AdapterFusion, class entropy, re-merging from the cache, and the files that carry learned weights."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel

from moa.experts.bank import ExpertBank
from moa.merging.adapters import experts_of_bank
from moa.merging.learn import ziplora
from moa.merging.learn.fusion import AdapterFusion, learn_fusion
from moa.merging.learn.gradient import descend_weights, mean_entropy
from moa.merging.learn.search import prefix_soup
from moa.merging.merge import cached_merge, merge
from moa.merging.weights import read_weights
from tests.test_model import LANGUAGE, batch_of, make_model

NAMES = ("vqa", "caption", "grounding")


@pytest.fixture(scope="module")
def model():
    return make_model("fixed", targets=(LANGUAGE,))


@pytest.fixture(scope="module")
def batches(model):
    return {name: [batch_of(model)] for name in NAMES}


def gates_of(batch, values):
    return torch.tensor(values).expand(len(batch), -1)


def updates(merged):
    return {site: result.lora_b @ result.lora_a for site, result in merged.items()}


# ZipLoRA ----------------------------------------------------------------------------------------


def test_mergers_of_one_are_the_plain_sum(model):
    experts = experts_of_bank(model.bank)
    zipped = ziplora.apply_mergers(experts, ziplora.unit_mergers(model))
    found = updates(merge(zipped, method="task_arithmetic"))
    expected = updates(merge(experts, method="task_arithmetic"))
    for site, update in found.items():
        torch.testing.assert_close(update, expected[site])


def test_mergers_scale_the_columns_of_the_update(model):
    experts = experts_of_bank(model.bank)
    mergers = ziplora.unit_mergers(model)
    generator = torch.Generator().manual_seed(0)
    for own in mergers.values():
        for merger in own.values():
            merger.copy_(torch.randn(merger.shape, generator=generator))
    found = updates(merge(ziplora.apply_mergers(experts, mergers), method="task_arithmetic"))
    site = next(iter(found))
    dense = {e.name: b @ a for e in experts for a, b in [e.factors(site, torch.float64)]}
    expected = sum(update * mergers[site][name].double() for name, update in dense.items())
    torch.testing.assert_close(found[site], expected)


def test_the_zip_loss_is_the_distance_to_each_experts_own_logits(model, batches):
    chosen = {name: own[0] for name, own in ziplora.expert_outputs(model, batches).items()}
    batch = batches["vqa"][0]
    with torch.no_grad():
        together = model(batch, gates_of(batch, [1.0, 1.0, 1.0]))
        expected = torch.zeros(())
        for index in range(3):
            alone = model(batch, torch.eye(3)[index].expand(len(batch), -1)).logits
            answer = together.labels != -100
            expected = expected + F.mse_loss(together.logits[answer], alone[answer])
        found = ziplora.zip_loss(model, ziplora.unit_mergers(model), chosen)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_a_merger_is_the_finite_difference(model, batches):
    chosen = {name: own[0] for name, own in ziplora.expert_outputs(model, batches).items()}
    mergers = ziplora.unit_mergers(model)
    merger = mergers["model.language_model.layers.1.mlp.down_proj"]["caption"].requires_grad_()
    ziplora.zip_loss(model, mergers, chosen).backward()
    direction = merger.grad / merger.grad.norm()
    with torch.no_grad():
        losses = []
        for step in (1e-2, -1e-2):
            merger += step * direction
            losses.append(float(ziplora.zip_loss(model, mergers, chosen)))
            merger -= step * direction
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(float(merger.grad.norm()), rel=2e-2)


def test_one_expert_alone_is_zipped_to_itself():
    model = make_model("fixed", targets=(LANGUAGE,))
    for name in ("caption", "grounding"):
        model.bank.remove(name)
    losses = []
    mergers = ziplora.learn_mergers(
        model, {"vqa": [batch_of(model)]}, steps=2, on_step=lambda step, loss: losses.append(loss)
    )
    assert losses == pytest.approx([0.0, 0.0], abs=1e-10)
    for own in mergers.values():
        torch.testing.assert_close(own["vqa"], torch.ones_like(own["vqa"]), rtol=0, atol=1e-3)


@pytest.mark.slow
def test_learned_mergers_bring_the_merge_nearer_to_every_expert(model, batches):
    losses = []
    ziplora.learn_mergers(model, batches, steps=4, lr=0.05, on_step=lambda step, loss: losses.append(loss))
    assert losses[-1] < 0.9 * losses[0]
    with pytest.raises(ValueError, match=r"batches.caption: none with answers"):
        ziplora.learn_mergers(model, {**batches, "caption": []}, steps=1)


def test_the_overlap_of_mergers_is_their_mean_absolute_cosine():
    a, b, c = torch.tensor([1.0, 0.0]), torch.tensor([0.0, -2.0]), torch.tensor([-3.0, 0.0])
    assert float(ziplora.overlap({"site": {"a": a, "b": b}})) == 0
    assert float(ziplora.overlap({"site": {"a": a, "b": b, "c": c}})) == pytest.approx(1 / 3)
    assert float(ziplora.overlap({"site": {"a": a}})) == 0


# AdapterFusion ----------------------------------------------------------------------------------


def test_a_fusion_of_one_expert_is_that_expert():
    model = make_model("fixed", targets=(LANGUAGE,))
    for name in ("caption", "grounding"):
        model.bank.remove(name)
    batch = batch_of(model)
    with torch.no_grad():
        expected = model(batch, gates_of(batch, [1.0])).logits
        with AdapterFusion(model.bank).attached():
            found = model(batch, gates_of(batch, [0.0])).logits
        off = model(batch, gates_of(batch, [0.0])).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(off, expected, atol=1e-3)  # and nothing stays attached


def test_a_fusion_without_preference_is_the_mean_of_the_experts(model):
    batch, fusion = batch_of(model), AdapterFusion(model.bank)
    with torch.no_grad():
        for site in fusion.sites.values():
            site.query.weight.zero_()
        expected = model(batch, gates_of(batch, [1 / 3] * 3)).logits
        with fusion.attached():
            found = model(batch, gates_of(batch, [0.0] * 3)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_learning_a_fusion_lowers_the_answers_loss_and_leaves_the_experts(model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    learn_fusion(model, [batch_of(model)], steps=4, lr=0.003, on_step=lambda step, loss: losses.append(loss))
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# Entropy, searches ------------------------------------------------------------------------------


def test_entropy_is_that_of_a_known_distribution():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0]])
    assert float(mean_entropy(logits)) == pytest.approx(torch.tensor(4.0).log().item() / 2)


def test_class_entropy_of_a_zero_shot_clip_goes_down_through_its_experts():
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**text, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(
        text_config={**text, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 19},
        vision_config=vision,
        projection_dim=16,
    )
    clip = CLIPModel(config).eval().requires_grad_(False)
    bank = ExpertBank.attach(clip, [r"vision_model\..*(q|v|out)_proj"])
    for name in ("one", "two"):
        bank.add(name, rank=2, alpha=8)
        for site in bank.sites.values():
            site.lora_B[name].data.normal_(std=0.5)
    images, classes = torch.randn(4, 3, 16, 16), torch.randint(1, 19, (5, 6))

    def loss(step, weights):
        bank.set_gates(weights[None].expand(len(images), -1, -1))
        logits = clip(input_ids=classes, pixel_values=images).logits_per_image
        return mean_entropy(logits)

    losses = []
    weights = descend_weights(
        loss, (len(bank.sites), 2), simplex=False, steps=8, lr=0.1,
        on_step=lambda step, value: losses.append(value),
    )  # fmt: skip
    assert losses[-1] < losses[0]
    assert weights.min() >= 0 and weights.max() <= 1


def test_a_prefix_soup_takes_the_first_of_an_order_as_far_as_it_helps():
    scores = {1: 0.5, 2: 0.7, 3: 0.7}
    found = prefix_soup(lambda w: scores[sum(v > 0 for v in w.values())], ["b", "a", "c"])
    assert found == {"b": 0.5, "a": 0.5, "c": 0.0}


@pytest.mark.parametrize(
    ("method", "options", "rank"),
    [
        ("linear", {}, "sum"),
        ("tsv_m", {}, "energy:0.9"),
        pytest.param("ties", {"scope": "model"}, 5, marks=pytest.mark.slow),
        pytest.param("knots", {}, 4, marks=pytest.mark.slow),
    ],
)
def test_merging_from_the_cache_is_merging(model, method, options, rank):
    experts = experts_of_bank(model.bank)
    settings = {"method": method, "options": options, "rank": rank}
    cached = cached_merge(experts, **settings)
    site = next(iter(experts[0].ranks))
    per_site = {s: dict(zip(NAMES, (0.2, 0.5, -0.1), strict=True)) for s in experts[0].ranks}
    for weights in (None, per_site):
        found, expected = cached(weights), merge(experts, weights=weights, **settings)
        assert found.keys() == expected.keys()
        assert torch.equal(found[site].lora_a, expected[site].lora_a)
        assert torch.equal(found[site].lora_b, expected[site].lora_b)


# Files ------------------------------------------------------------------------------------------


def write(path, weights):
    path.write_text(json.dumps({"method": "lora_soups", "weights": weights}))
    return path


def test_a_weights_file_gives_back_what_was_learned(model, tmp_path):
    experts = experts_of_bank(model.bank)
    rows = {site: {name: 0.1 * i + j for j, name in enumerate(NAMES)} for i, site in enumerate(experts[0].ranks)}
    assert read_weights(write(tmp_path / "w.json", rows), experts) == rows
    flat = dict.fromkeys(NAMES, 0.5)
    assert read_weights(write(tmp_path / "w.json", flat), experts) == flat


def test_a_bad_weights_file_is_refused_by_name(model, tmp_path):
    experts = experts_of_bank(model.bank)
    file, site = tmp_path / "w.json", next(iter(experts[0].ranks))
    good = {s: dict.fromkeys(NAMES, 1.0) for s in experts[0].ranks}
    with pytest.raises(ValueError, match=r"w.json is missing"):
        read_weights(file, experts)
    bad = (
        ({**good, site: {**good[site], "ocr": 1.0}}, rf"weights.{site}.ocr: no such expert"),
        ({**good, site: {"vqa": 1.0}}, rf"weights.{site}.caption: missing"),
        ({**good, "model.head": good[site]}, r"weights.model.head: no expert has this site"),
        ({s: r for s, r in good.items() if s != site}, rf"weights.{site}: missing"),
        ({**good, site: {**good[site], "vqa": float("nan")}}, r"must be finite"),
        ({**good, site: {**good[site], "vqa": "1"}}, rf"{site}.vqa: must be a number, got '1'"),
        ({**good, site: 1.0}, rf"weights.{site}: must be a mapping by expert"),
    )
    for weights, message in bad:
        with pytest.raises(ValueError, match=rf"w.json: .*{message}"):
            read_weights(write(file, weights), experts)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"w.json is not JSON"):
        read_weights(file, experts)
    file.write_text('{"weights": 3}')
    with pytest.raises(ValueError, match=r"w.json has no key `weights`"):
        read_weights(file, experts)
