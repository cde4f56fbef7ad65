"""The bank of experts: fresh, off and frozen, where they sit, and their life cycle."""

import copy
import re

import pytest
import torch
from torch import nn

from moa.experts.bank import FACTORS, ExpertBank, ExpertLinear
from tests.support.banks import (
    LANGUAGE,
    PROJECTOR,
    SITE,
    VISION,
    fill,
    inputs,
    make_bank,
    some_gates,
)
from tests.support.tiny import tiny_llava

# Fresh, off, and frozen ---------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
def test_fresh_experts_leave_the_output_bit_identical(grad):
    model, processor = tiny_llava()
    with torch.set_grad_enabled(grad):
        before = model(**inputs(processor)).logits
        bank = make_bank(model)
        bank.set_gates(some_gates(bank), torch.arange(4))
        assert model(**inputs(processor)).logits.equal(before)


def test_experts_switched_off_equal_the_backbone():
    model, processor = tiny_llava()
    before = model(**inputs(processor)).logits
    bank = make_bank(model)
    fill(bank)
    with bank.context.disabled():
        assert model(**inputs(processor)).logits.equal(before)
    bank.set_gates(torch.zeros(4, 1, 3), torch.arange(4))
    assert model(**inputs(processor)).logits.equal(before)
    with torch.no_grad():
        bank.set_gates(torch.zeros(4, 1, 3), torch.arange(4))
        assert model(**inputs(processor)).logits.equal(before)


def test_only_the_experts_get_gradients_and_each_of_them_does():
    model, processor = tiny_llava()
    bank = make_bank(model)
    fill(bank)
    bank.set_gates(some_gates(bank), torch.arange(4))
    model(**inputs(processor)).logits.square().mean().backward()
    own = {id(p) for p in bank.parameters()}
    with_grad = {id(p) for p in model.parameters() if p.grad is not None}
    assert with_grad == own
    assert all(p.grad.abs().sum() > 0 for p in bank.parameters())


def test_a_frozen_expert_does_not_move_and_still_takes_part():
    model, processor = tiny_llava()
    bank = make_bank(model)
    fill(bank)
    bank.train({"caption": ()})
    before = {key: tensor.clone() for key, tensor in bank.state("caption").items()}
    optimizer = torch.optim.AdamW([p for p in bank.parameters() if p.requires_grad], lr=0.1)
    bank.set_gates(some_gates(bank), torch.arange(4))
    model(**inputs(processor)).logits.square().mean().backward()
    optimizer.step()
    assert all(p.grad is None for p in bank.parameters("caption"))
    assert all(before[key].equal(tensor) for key, tensor in bank.state("caption").items())
    assert bank.experts["caption"].frozen
    bank.train({"caption": FACTORS})
    assert all(p.requires_grad for p in bank.parameters("caption"))


def test_experts_without_gates_are_an_error_and_not_silently_off():
    model, processor = tiny_llava()
    make_bank(model)
    with pytest.raises(ValueError, match="have no gates; call bank.set_gates"):
        model(**inputs(processor))


def test_gates_for_another_batch_are_refused():
    model, processor = tiny_llava()
    bank = make_bank(model)
    bank.set_gates(some_gates(bank, batch=2), torch.tensor([0, 0, 1, 1]))
    with pytest.raises(ValueError, match="gates are for 2 samples"):
        model(**inputs(processor))


@pytest.mark.parametrize("shape", [(4, 1, 2), (4, 5, 3)])
def test_gates_of_the_wrong_shape_are_refused_with_the_right_one(shape):
    bank = make_bank(tiny_llava()[0])
    with pytest.raises(ValueError, match=r"expected \[batch, 1 or \d+ sites, 3 experts"):
        bank.set_gates(torch.ones(shape), torch.arange(4))


# Initialisation -----------------------------------------------------------------------------------


def test_every_expert_and_site_starts_from_its_own_values_whatever_the_order():
    first = make_bank(tiny_llava()[0], vqa=4, caption=4)
    second = make_bank(tiny_llava()[0], caption=4, vqa=4)
    for name in ("vqa", "caption"):
        for key, tensor in first.state(name).items():
            assert tensor.equal(second.state(name)[key])
    starts = [a for site in first.sites.values() for a in site.lora_A.values()]
    rows = {tuple(a[0, :8].tolist()) for a in starts}
    assert len(rows) == len(starts)
    for a in starts:  # uniform in ±1/sqrt(in)
        ends = torch.stack([a.min(), a.max()]) * a.shape[1] ** 0.5
        torch.testing.assert_close(ends, torch.tensor([-1.0, 1.0]), rtol=0, atol=0.1)
        assert ends.abs().max() <= 1


def test_another_seed_gives_other_values():
    first, second = (ExpertBank.attach(tiny_llava()[0], [SITE]) for _ in range(2))
    first.add("vqa", rank=2, alpha=1, seed=0)
    second.add("vqa", rank=2, alpha=1, seed=1)
    assert not first.sites[SITE].lora_A["vqa"].equal(second.sites[SITE].lora_A["vqa"])


def test_making_experts_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    bank = make_bank(tiny_llava()[0])
    bank.add_token_routers()
    assert torch.get_rng_state().equal(before)


# Targets ------------------------------------------------------------------------------------------


def test_a_target_is_a_full_path_or_an_expression_for_the_whole_path():
    model, _ = tiny_llava()
    bank = ExpertBank.attach(model, [SITE, PROJECTOR])
    assert set(bank.sites) == {
        SITE,
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
    }
    with pytest.raises(ValueError, match="matches no linear layer"):
        ExpertBank.attach(tiny_llava()[0], ["q_proj"])  # a suffix would hit the vision tower too


def test_a_target_that_matches_nothing_is_refused_with_near_names():
    with pytest.raises(ValueError, match=f"targets: .*Near names: .*{re.escape(SITE)}"):
        ExpertBank.attach(tiny_llava()[0], [SITE.replace("self_attn", "attn")])
    with pytest.raises(ValueError, match="exclude: .*matches no linear layer"):
        ExpertBank.attach(tiny_llava()[0], [SITE], exclude=[PROJECTOR])
    with pytest.raises(ValueError, match="leaves none"):
        ExpertBank.attach(tiny_llava()[0], [SITE], exclude=[SITE])
    with pytest.raises(ValueError, match="is not a regular expression"):
        ExpertBank.attach(tiny_llava()[0], ["("])


def test_a_refused_target_leaves_the_model_as_it_was():
    model, _ = tiny_llava()
    with pytest.raises(ValueError, match="never reach the output"):
        ExpertBank.attach(model, [VISION, SITE], unused=[SITE])
    assert not any(isinstance(m, ExpertLinear) for m in model.modules())


def test_layers_that_are_read_and_not_run_are_no_targets():
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="matches no linear layer"):
        ExpertBank.attach(attention, ["out_proj"])


def test_an_expert_can_have_a_subset_of_the_sites():
    """Each site has a gate's expert by its name, also where it is the site's first, and a negative gate subtracts."""
    model, processor = tiny_llava()
    other, gates = SITE.replace("q_proj", "v_proj"), {"there": 0.5, "small": 2.0, "both": -1.5}
    bank = ExpertBank.attach(model.requires_grad_(False), [LANGUAGE, PROJECTOR])
    bank.add("there", rank=2, alpha=8, targets=[other])
    bank.add("small", rank=2, alpha=3, targets=[SITE])
    bank.add("both", rank=1, alpha=1, targets=[SITE, other])
    fill(bank)
    assert bank.experts["small"].sites == (SITE,)
    dense, _ = tiny_llava()
    for name in (SITE, other):
        site = bank.sites[name]
        for expert, a in site.lora_A.items():
            update = gates[expert] * site.scalings[expert] * site.lora_B[expert] @ a
            dense.get_submodule(name).weight.data += update
    expected = dense(**inputs(processor)).logits
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            bank.set_gates(torch.tensor([[[*gates.values()]]]).expand(4, 1, 3))
            found = model(**inputs(processor)).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_model_is_not_wrapped_twice():
    model, _ = tiny_llava()
    make_bank(model)
    with pytest.raises(ValueError, match="has a bank already"):
        make_bank(model)


# Life cycle ---------------------------------------------------------------------------------------


def test_removing_an_expert_leaves_the_others_outputs():
    model, processor = tiny_llava()
    bank = make_bank(model)
    fill(bank)
    bank.set_gates(torch.tensor([[[0.5, 0.0, 2.0]]]).expand(4, 1, 3), torch.arange(4))
    before = model(**inputs(processor)).logits
    bank.remove("caption")
    assert bank.names == ["vqa", "grounding"]
    assert not any("caption" in name for name, _ in model.named_parameters())
    bank.set_gates(torch.tensor([[[0.5, 2.0]]]).expand(4, 1, 2), torch.arange(4))
    torch.testing.assert_close(model(**inputs(processor)).logits, before, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["a.b", "", "a b", "vqa"])
def test_a_bad_or_taken_name_is_refused(name):
    bank = make_bank(tiny_llava()[0])
    with pytest.raises(ValueError, match="name is|is an expert"):
        bank.add(name, rank=2, alpha=2)


def test_an_unknown_expert_is_named_with_the_choices_and_a_near_one():
    bank = make_bank(tiny_llava()[0])
    for act in (bank.remove, lambda name: bank.train({name: ()}), bank.state, bank.peft_config):
        with pytest.raises(ValueError, match="choices: .*did you mean 'caption'"):
            act("captions")


def test_detaching_gives_the_model_back_unchanged():
    model, processor = tiny_llava()
    names, before = list(model.state_dict()), model(**inputs(processor)).logits
    bank = make_bank(model)
    fill(bank)
    bank.detach(model)
    assert list(model.state_dict()) == names
    assert model(**inputs(processor)).logits.equal(before)


def test_a_copy_of_the_model_has_its_own_gates_and_experts():
    model, processor = tiny_llava()
    bank = make_bank(model)
    fill(bank)
    other, other_bank = copy.deepcopy((model, bank))
    assert other_bank.sites[SITE] is other.get_submodule(SITE)
    bank.set_gates(torch.zeros(4, 1, 3), torch.arange(4))
    other_bank.set_gates(torch.ones(4, 1, 3), torch.arange(4))
    outs = model(**inputs(processor)).logits, other(**inputs(processor)).logits
    assert not torch.allclose(*outs)
