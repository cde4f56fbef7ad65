"""The whole model on a tiny random LLaVA: gates, loss, decoding, routing kinds."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from data.batch import Batch
from data.collate import ChatCollator
from moa.backbones.llava import Backbone
from moa.experts.bank import ExpertBank
from moa.model import LanguageMixture, MixtureModel
from moa.routing.kinds import KINDS
from moa.routing.router import Router
from tests.data.test_collate import CODEC
from tests.data.test_collate import sample as toy_sample
from tests.support.tiny import QUESTIONS, random_image, tiny_batch, tiny_llava

LANGUAGE = r"model\.language_model\.layers\.\d+\..*_proj"
PROJECTOR = r"model\.multi_modal_projector\.linear_\d"
VISION = r"model\.vision_tower\.encoder\.layers\.[01]\.self_attn\.[qv]_proj"
EVERYWHERE = (LANGUAGE, PROJECTOR, VISION)
LEARNED = ("softmax", "top_k", "top_p", "threshold", "sigmoid")


def make_model(kind: str = "softmax", targets=EVERYWHERE, *, filled=True, **changes) -> MixtureModel:
    model, processor = tiny_llava()
    backbone = Backbone(model=model.requires_grad_(False), processor=processor)
    bank = ExpertBank.attach(model, list(targets), unused=backbone.unused_sites(), stream_of=backbone.stream_of)
    for name, rank in (("vqa", 4), ("caption", 2), ("grounding", 8)):
        bank.add(name, rank=rank, alpha=8)
    generator = torch.Generator().manual_seed(1)
    for site in bank.sites.values() if filled else ():
        for b in site.lora_B.values():
            b.data.normal_(std=0.3, generator=generator)
    torch.manual_seed(0)
    router = None
    options = {"experts": 3, "dims": backbone.dims, "num_tasks": 3}
    if changes.get("granularity") == "token":
        bank.add_token_routers(std=1.0)
    elif kind in LEARNED:
        per_site = changes.pop("per_site", False)
        options |= {"learned_threshold": kind == "threshold"}
        router = Router(**options, sites=len(bank.sites), hidden=16, per_site=per_site)
        torch.nn.init.normal_(router.head[-1].weight)
        if per_site:
            torch.nn.init.normal_(router.site_offset)
    elif (row := KINDS[kind]).learns == "means":
        router = row.router(**options, sites=len(bank.sites))
    mixture = LanguageMixture(backbone, bank, router, kind=kind, **changes)
    if KINDS[kind].learns == "means":
        mixture.update_anchors(tiny_batch(processor))
    return mixture.eval()


def batch_of(model: MixtureModel, **options) -> Batch:
    return tiny_batch(model.backbone.processor, **options)


def rows(batch: Batch, index: list[int]) -> Batch:
    pairs = ((f.name, getattr(batch, f.name)) for f in dataclasses.fields(batch))
    changed = {name: value[index] for name, value in pairs if isinstance(value, torch.Tensor)}
    return dataclasses.replace(batch, **{**changed, "image_index": torch.arange(len(index))})


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# The loss ----------------------------------------------------------------------------------------


def test_the_loss_is_each_samples_mean_over_its_answer_tokens():
    model, processor = tiny_llava()
    batch = tiny_batch(processor)
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        pixel_values=batch.pixel_values,
    ).logits
    expected = [F.cross_entropy(logits[i, :-1], batch.labels[i, 1:], ignore_index=-100) for i in range(4)]
    out = make_model(filled=False)(batch)
    close(out.loss_per_sample, torch.stack(expected))
    assert out.num_tokens.equal((batch.labels != -100).sum(1))


def test_the_output_layer_runs_on_answer_positions_alone():
    model = make_model()
    batch = batch_of(model)
    longest = int((batch.labels != -100).sum(1).max())
    seen = []
    model.model.lm_head.register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
    out = model(batch)
    assert seen == [(4, longest, 32)]
    full = model(dataclasses.replace(batch, labels=None))
    assert full.logits.shape[:2] == batch.input_ids.shape
    for i in range(4):
        places = (batch.labels[i] != -100).nonzero()[:, 0]
        count = len(places)
        close(out.logits[i, :count], full.logits[i, places - 1])
        assert out.labels[i, :count].equal(batch.labels[i, places])
        assert (out.labels[i, count:] == -100).all()


def test_a_sample_without_an_answer_has_no_loss_and_no_nan():
    model = make_model()
    batch = batch_of(model)
    labels = batch.labels.clone()
    labels[1] = -100
    out = model(dataclasses.replace(batch, labels=labels))
    assert out.loss_per_sample[1] == 0
    assert out.num_tokens[1] == 0
    assert model(dataclasses.replace(batch, labels=labels * 0 - 100)).loss_per_sample.sum() == 0


def test_fresh_experts_leave_the_loss_bit_identical_for_every_gate():
    model = make_model(filled=False)
    batch = batch_of(model)
    with model.bank.context.disabled():
        before = model(batch)
    for gates in (None, torch.eye(3)[[0, 1, 2, 0]], torch.full((4, 3), 9.0)):
        assert model(batch, gates).loss_per_sample.equal(before.loss_per_sample)


# Gates -------------------------------------------------------------------------------------------


def kinds() -> list[str]:
    return [*KINDS, "per site"]


def model_of(kind: str) -> MixtureModel:
    return make_model("softmax", per_site=True) if kind == "per site" else make_model(kind)


@pytest.mark.parametrize("kind", kinds())
def test_splitting_or_permuting_a_batch_never_changes_a_samples_gates_or_loss(kind):
    model = model_of(kind)
    batch = batch_of(model)
    whole, order = model(batch), [2, 0, 3, 1]
    turned = model(rows(batch, order))
    close(turned.gates, whole.gates[order])
    close(turned.loss_per_sample, whole.loss_per_sample[order])
    for i in range(4):
        alone = model(rows(batch, [i]))
        close(alone.gates, whole.gates[i : i + 1])
        close(alone.loss_per_sample, whole.loss_per_sample[i : i + 1])


@pytest.mark.parametrize("kind", kinds())
def test_padding_on_either_side_never_changes_gates_or_loss(kind):
    model = model_of(kind)
    whole = model(batch_of(model))
    for left in (False, True):
        padded = model(batch_of(model, pad=3, left=left))
        close(padded.gates, whole.gates)
        close(padded.loss_per_sample, whole.loss_per_sample)


@pytest.mark.parametrize("kind", kinds())
def test_the_answer_never_changes_the_gates(kind):
    model = model_of(kind)
    whole = model(batch_of(model)).gates
    other = model(batch_of(model, answers=["yes", "no", "<loc0001> and more", "blue"])).gates
    prompt = model.compute_gates(batch_of(model, answers=None, left=True)).gates
    assert other.equal(whole)
    close(prompt, whole)


def test_each_kind_of_evidence_changes_the_gates():
    model = make_model()
    batch = batch_of(model)
    whole = model.compute_gates(batch).gates
    changed = {
        "image": batch_of(model, images=[7, 8, 9, 10]),
        "text": batch_of(model, questions=["which?", *QUESTIONS[1:]]),
        "ocr": batch_of(model, words=(("sale",), (), (), ())),
        "task": batch_of(model, tasks=[1, 1, 2, 0]),
    }
    for kind, other in changed.items():
        assert not torch.allclose(model.compute_gates(other).gates[0], whole[0]), kind
        hidden = model.compute_gates(other, withhold=(kind,)).gates
        close(hidden, model.compute_gates(batch, withhold=(kind,)).gates)


def test_a_withheld_task_is_the_missing_one():
    model = make_model()
    withheld = model.compute_gates(batch_of(model, tasks=[-1] * 4)).gates
    assert withheld.equal(model.compute_gates(batch_of(model), withhold=("task",)).gates)


def test_experts_in_the_vision_tower_do_not_change_what_the_router_sees():
    with_experts, without = make_model(), make_model(targets=(LANGUAGE,))
    without.router.load_state_dict(with_experts.router.state_dict())
    batch = batch_of(without)
    close(with_experts.compute_gates(batch).gates, without.compute_gates(batch).gates)
    close(with_experts(batch).gates, with_experts.compute_gates(batch).gates)


def test_the_tower_runs_once_where_it_has_no_experts():
    for targets, runs in ((LANGUAGE, PROJECTOR), 1), (EVERYWHERE, 2):
        model, count = make_model(targets=targets), []
        tower = model.model.model.vision_tower
        first = tower.encoder.layers[0]
        first.register_forward_hook(lambda *_, count=count: count.append(1))
        model(batch_of(model))
        assert len(count) == runs


def test_one_hot_gates_pick_the_samples_own_expert():
    model = make_model("one_hot")
    batch = batch_of(model, experts=[2, 0, 1, -1])
    out = model(batch)
    assert out.gates[:3, 0].tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert out.aux == {}
    close(out.gates[3, 0], torch.full((3,), 1 / 3))


def test_fixed_gates_are_uniform_or_as_given():
    assert make_model("fixed").routing.weights.tolist() == pytest.approx([1 / 3] * 3)
    model = make_model("fixed", weights=[1.0, 0.0, 0.5])
    out = model(batch_of(model))
    assert out.gates[:, 0].tolist() == [[1.0, 0.0, 0.5]] * 4


def test_top_k_gates_are_sparse_and_sum_to_one():
    model = make_model("top_k", top_k=2)
    gates = model(batch_of(model)).gates
    assert ((gates > 0).sum(-1) == 2).all()
    close(gates.sum(-1), torch.ones(4, 1))


def test_a_null_expert_leaves_its_share_of_the_weight_to_the_base():
    """Its logit is 0: a share of 1 / (1 + sum of exp(logits)), after every expert's."""
    model, plain = (make_model("softmax", null_expert=null) for null in (True, False))
    batch = batch_of(model)
    found, logits = model.compute_gates(batch), plain.compute_gates(batch).logits
    whole = 1 + logits.exp().sum(-1, keepdim=True)
    close(found.gates, logits.exp() / whole)
    close(found.probs[..., -1:], 1 / whole)
    torch.nn.init.constant_(model.router.head[-1].bias, -1e4)  # none of them
    off = model(batch, torch.zeros(4, 3))
    close(model(batch).loss_per_sample, off.loss_per_sample)


def test_with_a_null_expert_one_place_of_top_k_goes_to_an_expert_or_to_the_base():
    model = make_model("top_k", top_k=1, null_expert=True)
    gates = model(batch_of(model)).gates
    logits = model.compute_gates(batch_of(model)).logits
    assert gates.sum(-1).tolist() == (logits.argmax(-1) < 3).float().tolist()
    banned = torch.tensor([False, False, False])
    assert model(batch_of(model), available=banned).gates.abs().max() == 0


def test_guidance_towards_none_lowers_the_gates_of_all_experts():
    model = make_model("softmax", null_expert=True)
    batch = dataclasses.replace(batch_of(model), expert_ids=torch.full((4,), 3))
    out = model(batch)
    rest = 1 - out.gates.sum(-1)[:, 0]
    close(out.aux["guidance"], -rest.log().mean())


def test_an_override_takes_the_same_path_as_any_other_gates():
    model = make_model()
    batch = batch_of(model)
    out = model(batch)
    again = model(batch, out.gates)
    close(again.loss_per_sample, out.loss_per_sample)
    assert again.router_logits is None
    close(model(batch, out.gates[:, 0]).loss_per_sample, out.loss_per_sample)
    oracle = make_model("one_hot")(batch)
    close(model(batch, oracle.gates).loss_per_sample, oracle.loss_per_sample)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*LEARNED, "one_hot", "fixed", "anchors"])
def test_an_unavailable_expert_changes_nothing(kind):
    model = make_model(kind)
    available = torch.tensor([True, False, True])
    before = model(batch_of(model), available=available)
    assert (before.gates[..., 1] == 0).all()
    for site in model.bank.sites.values():
        site.lora_B["caption"].data.add_(1)
    after = model(batch_of(model), available=available)
    assert after.loss_per_sample.equal(before.loss_per_sample)
    per_sample = available.expand(4, 3)
    close(model(batch_of(model), available=per_sample).gates, before.gates)


def test_top_k_fills_its_places_from_the_available_experts():
    model = make_model("top_k", top_k=2)
    gates = model(batch_of(model), available=torch.tensor([True, False, True])).gates
    assert ((gates > 0).sum(-1) == 2).all()


def test_a_sample_with_two_pictures_or_none_is_routed_and_answered():
    model = make_model(targets=(LANGUAGE, PROJECTOR))
    processor = model.backbone.processor
    single = tiny_batch(processor, questions=QUESTIONS[:2], answers=["a", "b"])
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    ids = single.input_ids.clone()
    start = int((ids[0] == image).nonzero()[0])
    extra = torch.full((2, 4), image)
    extra[1] = processor.tokenizer.pad_token_id
    mask = torch.cat([single.attention_mask, torch.ones(2, 4, dtype=torch.long)], 1)
    ids = torch.cat([ids[:, :start], extra, ids[:, start:]], 1)
    ids[1] = torch.where(ids[1] == image, 40, ids[1])  # the second sample has no picture
    labels = F.pad(single.labels, (4, 0), value=-100)
    batch = dataclasses.replace(
        single,
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        image_index=torch.tensor([0, 0]),
        image_mask=torch.tensor([True, False]),
    )
    out = model(batch)
    assert out.loss_per_sample.isfinite().all()
    swapped = dataclasses.replace(batch, pixel_values=batch.pixel_values.flip(0))
    assert not torch.allclose(model(swapped).loss_per_sample[0], out.loss_per_sample[0])
    assert model(swapped).gates[1].equal(out.gates[1])


def test_a_prompt_whose_image_tokens_were_cut_is_refused():
    model = make_model()
    batch = batch_of(model)
    cut = dataclasses.replace(batch, input_ids=batch.input_ids.clamp(max=40))
    with pytest.raises(ValueError, match="0 image tokens for 4 rows of pixel_values"):
        model(cut)


# Gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*LEARNED, "per site", "token", "token top_k"])
def test_every_kind_of_router_has_a_gradient_from_the_language_loss(kind):
    if kind.startswith("token"):
        model = make_model("top_k" if "top_k" in kind else "softmax", granularity="token")
        routers = model.bank.token_routers()
    else:
        model = model_of(kind)
        routers = dict(model.router.head.named_parameters())
        if kind == "per site":
            routers["site_offset"] = model.router.site_offset
    model(batch_of(model)).loss_per_sample.sum().backward()
    for name, parameter in routers.items():
        assert parameter.grad.abs().sum() > 0, name
    moved = {n for n, p in model.named_parameters() if p.grad is not None}
    assert all("router." in n or "lora_" in n or "token_router" in n for n in moved)


def test_every_trainable_parameter_gets_a_gradient_also_where_an_expert_is_unused():
    model = make_model("one_hot", filled=False)
    batch = batch_of(model, experts=[0] * 4)
    model(batch).loss_per_sample.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(p.grad.abs().sum() == 0 for p in model.bank.parameters("caption"))


def test_an_auxiliary_loss_reaches_the_router_and_never_the_experts():
    model = make_model("top_k")
    aux = model(batch_of(model)).aux
    assert set(aux) == {
        "load_balancing",
        "within_task_balancing",
        "localized_balancing",
        "divergence",
        "importance",
        "z",
        "entropy",
        "guidance",
    }
    for name, loss in aux.items():
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert model.router.head[-1].weight.grad.abs().sum() > 0, name
        assert all(p.grad is None for p in model.bank.parameters())


def test_guidance_is_the_cross_entropy_with_the_samples_experts():
    model = make_model(temperature=0.5)
    batch = batch_of(model, experts=[0, 2, -1, 1])
    out = model(batch)
    known = [0, 1, 3]
    expected = F.cross_entropy(out.router_logits[known, 0], batch.expert_ids[known])
    close(out.aux["guidance"], expected)
    close(out.gates, out.router_logits.softmax(-1))


@pytest.mark.parametrize("kind", ["softmax", "one_hot", "token", "token noise"])
def test_gradient_checkpointing_gives_the_gradients_of_plain_training(kind):
    changes = {"granularity": "token"} if "token" in kind else {}
    changes |= {"noise": "gaussian"} if "noise" in kind else {}
    model = make_model("top_k" if "token" in kind else kind, **changes).train()
    batch = batch_of(model)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        out = model(batch)
        (out.loss_per_sample.sum() + sum(out.aux.values())).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    model.enable_gradient_checkpointing()
    runs = []
    attention = model.model.model.language_model.layers[0].self_attn
    attention.register_forward_hook(lambda *_: runs.append(1))
    recomputed = gradients()
    assert len(runs) == 2
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-4)


def test_a_copy_of_the_model_works_on_its_own():
    model = make_model()
    other = copy.deepcopy(model)
    batch = batch_of(model)
    before = model(batch).loss_per_sample
    for parameter in other.bank.parameters():
        parameter.data.add_(0.1)
    assert not torch.allclose(other(batch).loss_per_sample, before)
    assert model(batch).loss_per_sample.equal(before)


# Decoding ----------------------------------------------------------------------------------------


def continue_without_cache(model: MixtureModel, batch: Batch, steps: int) -> torch.Tensor:
    """Greedy tokens from whole forward passes, with the gates of the prompt."""
    new = []
    for _ in range(steps):
        logits = model(batch, model.compute_gates(batch).gates).logits
        new.append(logits[:, -1].argmax(-1))
        ids = torch.cat([batch.input_ids, new[-1][:, None]], 1)
        mask = torch.cat([batch.attention_mask, torch.ones(len(batch), 1, dtype=torch.long)], 1)
        batch = dataclasses.replace(batch, input_ids=ids, attention_mask=mask)
    return torch.stack(new, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["softmax", "per site", "token", "token top_k", "fixed"])
def test_cached_decoding_equals_uncached(kind):
    if kind.startswith("token"):
        model = make_model("top_k" if "top_k" in kind else "softmax", granularity="token")
    else:
        model = model_of(kind)
    batch = batch_of(model, answers=None, left=True)
    cached = model.generate(batch, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert cached.equal(continue_without_cache(model, batch, 8))


@pytest.mark.slow
def test_a_batch_decodes_what_its_samples_decode_alone():
    model = make_model()
    batch = batch_of(model, answers=None, left=True)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    whole = model.generate(batch, **options)
    for i in range(4):
        assert model.generate(rows(batch, [i]), **options).equal(whole[i : i + 1])


@pytest.mark.slow
def test_beams_keep_the_gates_of_their_sample():
    model = make_model()
    batch = batch_of(model, answers=None, left=True)
    gates = torch.eye(3)[[0, 1, 2, 0]] * 3
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 3}
    whole = model.generate(batch, gates, **options)
    for i in range(4):
        alone = model.generate(rows(batch, [i]), gates[i : i + 1], **options)
        assert alone.equal(whole[i : i + 1])
    several = model.generate(batch, gates, **options, num_return_sequences=2)
    assert several.shape[0] == 8
    assert several[::2].equal(whole)


def test_return_sequences_keep_the_gates_of_their_sample():
    model = make_model()
    batch = batch_of(model, answers=None, left=True)
    gates = torch.eye(3)[[0, 1, 2, 0]] * 3
    # The second-best tokens have probability zero at this temperature: sampling is greedy.
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": True, "temperature": 1e-4}
    several = model.generate(batch, gates, **options, num_return_sequences=3)
    greedy = model.generate(batch, gates, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert several.equal(greedy.repeat_interleave(3, 0))


def test_generation_in_the_midst_of_training_uses_the_cache_and_leaves_training_on():
    model = make_model().train()
    model.enable_gradient_checkpointing()
    batch = batch_of(model, answers=None, left=True)
    lengths = []
    model.model.model.language_model.layers[0].mlp.register_forward_hook(
        lambda m, args, out: lengths.append(args[0].shape[1])
    )
    model.generate(batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert lengths == [batch.input_ids.shape[1], 1, 1]
    assert model.training


@pytest.mark.slow
def test_generation_sees_experts_that_were_trained_since():
    model = make_model()
    batch = batch_of(model, answers=None, left=True)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    first = model.generate(batch, **options)
    for parameter in model.bank.parameters():
        parameter.data.mul_(-1.5)
    second = model.generate(batch, **options)
    assert not second.equal(first)
    assert second.equal(continue_without_cache(model, batch, 8))


# Token routing -----------------------------------------------------------------------------------


def test_token_routing_reports_mean_gates_and_losses_over_valid_tokens_of_all_sites():
    model = make_model("top_k", granularity="token")
    whole, padded = model(batch_of(model)), model(batch_of(model, pad=4))
    close(whole.gates.sum(-1), torch.ones(4, 1))
    close(padded.gates, whole.gates)
    for name, loss in whole.aux.items():
        close(padded.aux[name], loss)
    assert model.bank.context.state.token_logits == {}


def test_a_gate_override_switches_token_routing_off():
    model = make_model("softmax", granularity="token")
    sample = make_model("one_hot")
    batch = batch_of(model)
    oracle = sample(batch)
    close(model(batch, oracle.gates).loss_per_sample, oracle.loss_per_sample)


# Precision and bad settings ----------------------------------------------------------------------


def test_a_bf16_backbone_runs_with_float32_gates_and_losses():
    model = make_model()
    plain = model(batch_of(model))
    model.model.to(torch.bfloat16)
    model.router.to(torch.bfloat16)
    out = model(batch_of(model))
    assert out.gates.dtype == out.loss_per_sample.dtype == torch.float32
    assert out.logits.dtype == torch.bfloat16
    torch.testing.assert_close(out.loss_per_sample, plain.loss_per_sample, atol=0.1, rtol=0.1)
    torch.testing.assert_close(out.gates, plain.gates, atol=0.05, rtol=0.1)
    batch = batch_of(model, answers=None, left=True)
    assert model.generate(batch, max_new_tokens=3, do_sample=False).shape[0] == 4


def test_autocast_leaves_gates_in_float32():
    model = make_model()
    plain = model(batch_of(model))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(batch_of(model))
        model.generate(batch_of(model, answers=None, left=True), max_new_tokens=3)
    assert out.gates.dtype == out.router_logits.dtype == torch.float32
    torch.testing.assert_close(out.loss_per_sample, plain.loss_per_sample, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kind": "softmax"}, "needs a router"), ({"kind": "fixed", "router": True}, "has no router")],
)
def test_a_kind_without_its_router_is_refused(options, message):
    model = make_model("fixed")
    router = make_model().router if options.pop("router", False) else None
    with pytest.raises(ValueError, match=message):
        LanguageMixture(model.backbone, model.bank, router, **options)


def test_availability_is_refused_where_tokens_are_routed_one_by_one():
    model = make_model("softmax", granularity="token")
    with pytest.raises(ValueError, match="token routing uses all experts"):
        model(batch_of(model), available=torch.tensor([True, True, False]))


def test_a_router_for_another_number_of_experts_is_refused():
    model = make_model()
    model.bank.add("late", rank=2, alpha=2)
    with pytest.raises(ValueError, match="expected .*4 experts"):
        model(batch_of(model))


# Learning ----------------------------------------------------------------------------------------

WHAT, WHERE = ("what is this?", "what do you see?"), ("where is this?", "where do you see it?")
# Kind of evidence -> the options of a batch in which that kind alone tells the experts apart.
TELLING = {
    "image": lambda ids: {"images": [100 * i + j % 4 for j, i in enumerate(ids)]},
    "text": lambda ids: {"questions": [(WHERE, WHAT)[i][j % 2] for j, i in enumerate(ids)]},
    "word order": lambda ids: {"questions": [("dog left of cat", "cat left of dog")[i] for i in ids]},
    "ocr": lambda ids: {"words": [("stop",) if i else () for i in ids]},
    "task": lambda ids: {"tasks": ids},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TELLING)
def test_the_router_learns_from_each_kind_of_evidence_where_it_alone_decides(kind):
    model = make_model(filled=False, targets=(LANGUAGE,)).train()
    torch.nn.init.normal_(model.router.head[-1].weight, std=0.02)
    optimizer = torch.optim.AdamW(model.router.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    *known, new = [telling_batch(model, kind, generator) for _ in range(10)]
    for step in range(70):
        batch = known[step % len(known)]
        logits = model.compute_gates(batch).logits[:, 0]
        optimizer.zero_grad()
        F.cross_entropy(logits, batch.expert_ids).backward()
        optimizer.step()
    model.eval()
    assert model.compute_gates(new).gates[:, 0].argmax(-1).equal(new.expert_ids)


def telling_batch(model: MixtureModel, kind: str, generator: torch.Generator) -> Batch:
    ids = torch.randint(2, (24,), generator=generator).tolist()
    same = {"questions": ["what is this?"] * 24, "images": [0] * 24, "tasks": [0] * 24}
    options = {**same, "words": [()] * 24, "answers": None, "experts": ids}
    return batch_of(model, **{**options, **TELLING[kind](ids)})


# Text alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [[LANGUAGE], EVERYWHERE], ids=["language", "everywhere"])
def test_text_alone_has_the_same_gates_and_loss_with_and_without_pictures_beside_it(targets):
    model = make_model(targets=targets)
    collate = ChatCollator(processor=model.backbone.processor, tasks=["vqa"], experts=["vqa"], codec=CODEC)
    text = toy_sample(image=None, ocr=None, task="vqa", expert="vqa")
    seen = dataclasses.replace(text, image=random_image(0))
    alone, beside = (model(collate(samples)) for samples in ([text], [seen, text]))
    close(alone.gates[0], beside.gates[1])
    close(alone.loss_per_sample[0], beside.loss_per_sample[1])
    ids = model.generate(dataclasses.replace(collate, for_generation=True)([text]), max_new_tokens=3)
    assert ids.shape == (1, 3)
