"""The bank of experts: against a plain loop, against plain PEFT, and through its life cycle."""

import copy
import re

import pytest
import torch
from torch import nn

from moa.experts import ExpertBank, ExpertLinear
from moa.mixing import mix
from moa.peft_io import read_expert, save_expert
from tests.tiny import tiny_batch, tiny_llava

LANGUAGE = r"model\.language_model\.layers\.\d+\..*_proj"
PROJECTOR = r"model\.multi_modal_projector\.linear_\d"
VISION = r"model\.vision_tower\.encoder\.layers\.[01]\.self_attn\.[qv]_proj"
SITE = "model.language_model.layers.0.self_attn.q_proj"


def stream_of(site: str) -> str:
    return "text" if "language_model" in site else "image"


def make_bank(model: nn.Module, targets=(LANGUAGE, PROJECTOR, VISION), **ranks: int) -> ExpertBank:
    bank = ExpertBank.attach(model.requires_grad_(False), list(targets), stream_of=stream_of)
    for name, rank in (ranks or {"vqa": 4, "caption": 2, "grounding": 8}).items():
        bank.add(name, rank=rank, alpha=8)
    return bank


def fill(bank: ExpertBank, std: float = 0.3) -> None:
    """Give every B values, so that the experts change something."""
    generator = torch.Generator().manual_seed(1)
    for site in bank.sites.values():
        for b in site.lora_B.values():
            b.data.normal_(std=std, generator=generator)


def inputs(processor):
    batch = tiny_batch(processor)
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "pixel_values": batch.pixel_values,
    }


def some_gates(bank: ExpertBank, batch: int = 4, sites: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(batch, sites, len(bank.names), generator=generator)


# The formula -------------------------------------------------------------------------------------


def plain_loop(x, base, gates, scalings, factors_a, factors_b):
    out = base.clone()
    for i, (a, b) in enumerate(zip(factors_a, factors_b, strict=True)):
        out = out + gates[..., i : i + 1] * scalings[i] * ((x @ a.T) @ b.T)
    return out


@pytest.mark.parametrize("ranks", [(3, 1, 4), (5, 5, 5), (2,)])
@pytest.mark.parametrize("per_token", [False, True])
def test_the_mixture_and_its_gradients_equal_a_plain_loop_over_experts(per_token, ranks):
    torch.manual_seed(0)
    count, scalings = len(ranks), (2.0, 0.5, 1.0)[: len(ranks)]
    factors_a = [torch.randn(r, 6, dtype=torch.double, requires_grad=True) for r in ranks]
    factors_b = [torch.randn(5, r, dtype=torch.double, requires_grad=True) for r in ranks]
    x = torch.randn(2, 7, 6, dtype=torch.double, requires_grad=True)
    base = torch.randn(2, 7, 5, dtype=torch.double, requires_grad=True)
    gates = torch.rand(2, 7 if per_token else 1, count, dtype=torch.double, requires_grad=True)
    leaves = [x, base, gates, *factors_a, *factors_b]

    spread = torch.tensor([i for i, r in enumerate(ranks) for _ in range(r)])
    wide = gates[..., spread] * torch.tensor(scalings, dtype=torch.double)[spread]
    ours = mix(x, base, wide, factors_a, factors_b)
    loop = plain_loop(x, base, gates, scalings, factors_a, factors_b)
    torch.testing.assert_close(ours, loop)
    weights = torch.randn_like(loop)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), leaves),
        torch.autograd.grad((loop * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_model_with_gated_experts_equals_the_model_with_their_sum_in_its_weights():
    model, processor = tiny_llava()
    dense = copy.deepcopy(model)
    bank = make_bank(model)
    fill(bank)
    weights = torch.tensor([0.7, 0.0, 1.6])
    bank.set_gates(weights.expand(4, 1, 3), torch.arange(4))
    ours = model(**inputs(processor)).logits
    for name, site in bank.sites.items():
        scaled = (
            w * site.scalings[e] * site.lora_B[e] @ site.lora_A[e]
            for w, e in zip(weights, bank.names, strict=True)
        )
        dense.get_submodule(name).weight.data += sum(scaled)
    torch.testing.assert_close(ours, dense(**inputs(processor)).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sites", ["one row", "one per site"])
def test_inference_computes_what_training_does(sites):
    model, processor = tiny_llava()
    bank = make_bank(model)
    fill(bank)
    gates = some_gates(bank, sites=1 if sites == "one row" else len(bank.sites))
    bank.set_gates(gates, torch.arange(4))
    with_grad = model(**inputs(processor)).logits
    with torch.no_grad():
        bank.set_gates(gates, torch.arange(4), dtype=torch.float32)
        first, second = model(**inputs(processor)).logits, model(**inputs(processor)).logits
    assert with_grad.requires_grad
    torch.testing.assert_close(first, with_grad, atol=1e-6, rtol=1e-5)
    assert first.equal(second)


def test_each_site_can_have_its_own_gates():
    model, processor = tiny_llava()
    bank = make_bank(model)
    fill(bank)
    gates = some_gates(bank, sites=len(bank.sites))
    order = list(bank.sites).index(SITE)
    seen = {}
    bank.sites[SITE].register_forward_hook(lambda m, args, out: seen.update(x=args[0], out=out))
    bank.set_gates(gates, torch.arange(4))
    model(**inputs(processor))
    site = bank.sites[SITE]
    expected = plain_loop(
        seen["x"],
        site.base_layer(seen["x"]),
        gates[:, order, None],
        list(site.scalings.values()),
        site.lora_A.values(),
        site.lora_B.values(),
    )
    torch.testing.assert_close(seen["out"], expected, atol=1e-6, rtol=1e-5)


def test_sites_of_the_image_stream_use_the_gates_of_each_pictures_sample():
    model, processor = tiny_llava()
    bank = make_bank(model, targets=(VISION,))
    fill(bank)
    pixels = tiny_batch(processor).pixel_values
    gates, index = some_gates(bank, batch=2), torch.tensor([1, 0, 0, 1])
    with torch.no_grad():
        bank.set_gates(gates, index)
        ours = model.model.vision_tower(pixels).last_hidden_state
        for image, sample in enumerate(index.tolist()):
            bank.set_gates(gates[sample : sample + 1], torch.tensor([0]))
            alone = model.model.vision_tower(pixels[image : image + 1]).last_hidden_state
            torch.testing.assert_close(ours[image : image + 1], alone, atol=1e-5, rtol=1e-4)


# Fresh, off, and frozen --------------------------------------------------------------------------


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
    bank.freeze("caption")
    before = {key: tensor.clone() for key, tensor in bank.state("caption").items()}
    optimizer = torch.optim.AdamW([p for p in bank.parameters() if p.requires_grad], lr=0.1)
    bank.set_gates(some_gates(bank), torch.arange(4))
    model(**inputs(processor)).logits.square().mean().backward()
    optimizer.step()
    assert all(p.grad is None for p in bank.parameters("caption"))
    assert all(before[key].equal(tensor) for key, tensor in bank.state("caption").items())
    assert bank.experts["caption"].frozen
    bank.freeze("caption", False)
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


# Initialisation ----------------------------------------------------------------------------------


def test_every_expert_and_site_starts_from_its_own_values_whatever_the_order():
    first = make_bank(tiny_llava()[0], vqa=4, caption=4)
    second = make_bank(tiny_llava()[0], caption=4, vqa=4)
    for name in ("vqa", "caption"):
        for key, tensor in first.state(name).items():
            assert tensor.equal(second.state(name)[key])
    starts = [a for site in first.sites.values() for a in site.lora_A.values()]
    rows = {tuple(a[0, :8].tolist()) for a in starts}
    assert len(rows) == len(starts)
    assert all(a.abs().max() <= a.shape[1] ** -0.5 for a in starts)


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


# Targets -----------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="is no regular expression"):
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
    model, processor = tiny_llava()
    bank = make_bank(model, targets=(LANGUAGE, PROJECTOR), vqa=4)
    bank.add("small", rank=2, alpha=2, targets=[SITE])
    fill(bank)
    assert bank.experts["small"].sites == (SITE,)
    gates = torch.tensor([[[0.0, 1.0]]]).expand(4, 1, 2)
    bank.set_gates(gates, torch.arange(4))
    ours = model(**inputs(processor)).logits
    dense, _ = tiny_llava()
    site = bank.sites[SITE]
    dense.get_submodule(SITE).weight.data += site.lora_B["small"] @ site.lora_A["small"]
    torch.testing.assert_close(ours, dense(**inputs(processor)).logits, atol=1e-5, rtol=1e-4)


def test_a_model_is_not_wrapped_twice():
    model, _ = tiny_llava()
    make_bank(model)
    with pytest.raises(ValueError, match="has a bank already"):
        make_bank(model)


# Life cycle --------------------------------------------------------------------------------------


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


def test_renaming_keeps_an_experts_place_and_its_parameters():
    model, _ = tiny_llava()
    bank = make_bank(model)
    before = list(bank.parameters("caption"))
    bank.rename("caption", "tell")
    assert bank.names == ["vqa", "tell", "grounding"]
    assert all(list(site.scalings) == bank.names for site in bank.sites.values())
    assert all(a is b for a, b in zip(before, bank.parameters("tell"), strict=True))


@pytest.mark.parametrize("name", ["a.b", "", "a b", "vqa"])
def test_a_bad_or_taken_name_is_refused(name):
    bank = make_bank(tiny_llava()[0])
    with pytest.raises(ValueError, match="name is|is an expert"):
        bank.add(name, rank=2, alpha=2)
    with pytest.raises(ValueError, match="name is|is an expert"):
        bank.rename("caption", name)


def test_an_unknown_expert_is_named_with_the_choices_and_a_near_one():
    bank = make_bank(tiny_llava()[0])
    for act in (bank.remove, bank.freeze, bank.state, bank.peft_config):
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


def test_the_base_keeps_its_own_names():
    model, _ = tiny_llava()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    bank = make_bank(model)
    bank.add_token_routers()
    after = bank.base_state_dict(model)
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)


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


# The kept concatenation --------------------------------------------------------------------------


def site_output(bank: ExpertBank) -> torch.Tensor:
    with torch.no_grad():
        bank.set_gates(torch.ones(1, 1, len(bank.names)))
        return bank.sites[SITE](torch.ones(1, 2, 32))


CHANGES = {
    "an optimiser step": lambda p: torch.optim.SGD([p], lr=1.0).step(),
    "writing in place": lambda p: p.data.add_(1),
    "replaced data": lambda p: setattr(p, "data", p.data + 1),
    "copying a state": lambda p: p.detach().copy_(p.detach() + 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_inference_sees_factors_that_changed_since(change):
    bank = make_bank(tiny_llava()[0], targets=(SITE,))
    fill(bank)
    before = site_output(bank)
    assert site_output(bank).equal(before)
    parameter = bank.sites[SITE].lora_B["vqa"]
    parameter.grad = -torch.ones_like(parameter)
    CHANGES[change](parameter)
    after = site_output(bank)
    factors = bank.sites[SITE].lora_A["vqa"]
    step = (torch.ones(1, 2, 32) @ factors.T).sum(-1, keepdim=True) * 2  # alpha / rank
    torch.testing.assert_close(after - before, step.expand_as(after), atol=1e-5, rtol=1e-4)


def test_inference_between_training_steps_under_the_same_gates_sees_each_step():
    bank = make_bank(tiny_llava()[0], targets=(SITE,))
    optimizer = torch.optim.SGD(bank.parameters(), lr=1.0)
    bank.set_gates(torch.ones(1, 1, 3))
    x, outs = torch.ones(1, 2, 32), []
    for _ in range(3):
        with torch.no_grad():
            outs.append(bank.sites[SITE](x))
        bank.sites[SITE](x).sum().backward()
        optimizer.step()
    assert not outs[0].equal(outs[1])
    assert not outs[1].equal(outs[2])


def test_decoding_steps_share_one_concatenation():
    bank = make_bank(tiny_llava()[0], targets=(SITE,))
    bank.set_gates(torch.ones(1, 1, 3))
    with torch.no_grad():
        bank.sites[SITE](torch.ones(1, 2, 32))
        first = bank.context.state.prepared[SITE]
        bank.sites[SITE](torch.ones(1, 1, 32))
    assert bank.context.state.prepared[SITE] is first


def test_inference_leaves_out_experts_that_no_sample_uses():
    model, processor = tiny_llava()
    bank = make_bank(model)
    fill(bank)
    gates = torch.tensor([[[0.0, 0.0, 0.5]], [[2.0, 0.0, 0.0]]]).repeat(2, 1, 1)
    with torch.no_grad():
        bank.set_gates(gates, torch.arange(4))
        pruned = model(**inputs(processor)).logits
        kept = bank.context.state.prepared[SITE].a
    assert kept.shape[0] == 4 + 8
    later = model(**inputs(processor)).logits  # the same gates, with gradients
    bank.set_gates(gates, torch.arange(4))
    full = model(**inputs(processor)).logits
    for out in (pruned, later):
        torch.testing.assert_close(out, full, atol=1e-6, rtol=1e-5)


def test_inference_sees_a_move_to_another_dtype_or_a_loaded_state():
    model, _ = tiny_llava()
    bank = make_bank(model, targets=(SITE,))
    fill(bank)
    before = site_output(bank)
    bank.load_state("vqa", {k: torch.zeros_like(t) for k, t in bank.state("vqa").items()})
    assert not site_output(bank).equal(before)
    model.double()
    bank.set_gates(torch.ones(1, 1, 3))
    with torch.no_grad():
        out = bank.sites[SITE](torch.ones(1, 2, 32, dtype=torch.double))
    assert out.dtype == torch.double


# Precision, checkpointing, memory ----------------------------------------------------------------


def test_under_bf16_the_output_is_bf16_and_master_weights_and_gates_get_float32_gradients():
    model, processor = tiny_llava()
    bank = make_bank(model.bfloat16(), targets=(LANGUAGE, PROJECTOR))
    fill(bank, std=0.05)
    gates = some_gates(bank).requires_grad_()
    batch = inputs(processor)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    bank.set_gates(gates, torch.arange(4))
    out = model(**batch).logits
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert gates.grad.dtype == torch.float32
    assert {p.grad.dtype for p in bank.parameters()} == {torch.float32}


def test_autocast_computes_in_bf16_and_agrees_with_float32():
    model, processor = tiny_llava()
    bank = make_bank(model)
    fill(bank, std=0.05)
    gates = some_gates(bank)
    outs, grads = [], []
    for enabled in (False, True):
        model.zero_grad()
        bank.set_gates(gates, torch.arange(4))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(**inputs(processor)).logits
        out.float().square().mean().backward()
        outs.append(out.detach().float())
        grads.append(torch.cat([p.grad.flatten() for p in bank.parameters()]))
    assert (outs[0] - outs[1]).abs().max() < 0.05 * outs[0].abs().max()
    assert torch.cosine_similarity(*grads, dim=0) > 0.99


def checkpointed(model: nn.Module, bank: ExpertBank) -> None:
    model.train()
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={
            "use_reentrant": False,
            "context_fn": bank.context.checkpoint_contexts,
        }
    )


@pytest.mark.parametrize("routing", ["sample", "token"])
def test_checkpointing_two_forwards_before_a_backward_gives_the_plain_gradients(routing):
    model, processor = tiny_llava()
    bank = make_bank(model)
    fill(bank)
    bank.add_token_routers()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        gates = [some_gates(bank).requires_grad_(), some_gates(bank).flip(0).requires_grad_()]
        loss = 0
        for one in gates:
            if routing == "sample":
                bank.set_gates(one, torch.arange(4))
            else:
                bank.route_tokens(2)
            loss = loss + model(**inputs(processor)).logits.square().mean()
            if routing == "token":
                logits = bank.take_token_logits()
                assert logits.keys() == bank.sites.keys()
                loss = loss + sum(x.square().mean() for x in logits.values())
        loss.backward()
        leaves = [p for p in model.parameters() if p.requires_grad]
        if routing == "sample":
            leaves = [*gates, *bank.parameters()]
        assert all(p.grad is not None for p in leaves)
        return [p.grad.clone() for p in leaves]

    plain = gradients()
    checkpointed(model, bank)
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def saved_bytes(run, exclude) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once."""
    skip = {t.untyped_storage().data_ptr() for t in exclude}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    return sum(kept.values()) + 0 * out.numel()


@pytest.mark.parametrize("num_experts", [2, 16, 64])
def test_a_mixture_keeps_no_more_activations_than_one_lora_of_the_total_rank(num_experts):
    rank, width = 4, 64
    layer = nn.Linear(width, width).requires_grad_(False)
    site = nn.ModuleDict({"site": layer})
    bank = ExpertBank.attach(site, ["site"])
    for i in range(num_experts):
        bank.add(f"expert{i}", rank=rank, alpha=1)
    bank.set_gates(torch.rand(8, 1, num_experts, requires_grad=True))
    x = torch.randn(8, 128, width, requires_grad=True)
    ours = saved_bytes(lambda: site["site"](x), (*bank.parameters(), layer.weight))
    a = torch.randn(rank * num_experts, width, requires_grad=True)
    b = torch.randn(width, rank * num_experts, requires_grad=True)
    lora = saved_bytes(lambda: layer(x) + (x @ a.T) @ b.T * 0.5, (a, b, layer.weight))
    assert ours <= 1.05 * lora


# Token routing -----------------------------------------------------------------------------------


def test_token_routing_equals_a_plain_loop_with_each_tokens_own_gates():
    model, _ = tiny_llava()
    bank = make_bank(model, targets=(SITE,))
    fill(bank)
    bank.add_token_routers(std=1.0)
    site, x = bank.sites[SITE], torch.randn(2, 5, 32)
    for top_k in (None, 2):
        bank.route_tokens(top_k, temperature=0.5)
        ours = site(x)
        probs = (x @ site.token_router.T / 0.5).softmax(-1)
        if top_k:
            probs = probs * (probs >= probs.topk(top_k, -1).values[..., -1:])
            probs = probs / probs.sum(-1, keepdim=True)
        expected = plain_loop(
            x,
            site.base_layer(x),
            probs,
            list(site.scalings.values()),
            site.lora_A.values(),
            site.lora_B.values(),
        )
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
        assert bank.take_token_logits().keys() == {SITE}
        assert bank.take_token_logits() == {}


def test_token_routers_need_all_experts_first_and_everywhere():
    bank = make_bank(tiny_llava()[0], targets=(LANGUAGE,), vqa=2)
    with pytest.raises(ValueError, match="has no token router"):
        bank.route_tokens(None)
        bank.sites[SITE](torch.ones(1, 2, 32))
    bank.add_token_routers()
    with pytest.raises(ValueError, match="before the token routers"):
        bank.add("late", rank=2, alpha=2)
    other = make_bank(tiny_llava()[0], targets=(LANGUAGE,), vqa=2)
    other.add("small", rank=2, alpha=2, targets=[SITE])
    with pytest.raises(ValueError, match="every expert at every site"):
        other.add_token_routers()


# PEFT --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
def test_plain_peft_loads_an_exported_expert_and_gives_the_same_logits(tmp_path, use_rslora):
    from peft import PeftModel

    model, processor = tiny_llava()
    bank = make_bank(model, vqa=4)
    bank.add("caption", rank=3, alpha=5, use_rslora=use_rslora)
    fill(bank)
    save_expert(tmp_path / "caption", bank.state("caption"), bank.peft_config("caption"))
    bank.set_gates(torch.tensor([[[0.0, 1.0]]]).expand(4, 1, 2), torch.arange(4))
    ours = model(**inputs(processor)).logits
    plain = PeftModel.from_pretrained(tiny_llava()[0], tmp_path / "caption").eval()
    theirs = plain(**inputs(processor)).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_round_trip_through_a_peft_folder_is_exact(tmp_path):
    first, second = (make_bank(tiny_llava()[0], vqa=4) for _ in range(2))
    fill(first)
    save_expert(tmp_path / "vqa", first.state("vqa"), first.peft_config("vqa"))
    second.import_expert("again", *read_expert(tmp_path / "vqa"))
    before, after = first.state("vqa"), second.state("again")
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)
    assert second.peft_config("again") == first.peft_config("vqa")


def test_a_peft_adapter_with_patterns_is_imported_as_peft_computes_it(tmp_path):
    from peft import LoraConfig, get_peft_model

    q, v = SITE, SITE.replace("q_proj", "v_proj")
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=[q, v],
        rank_pattern={"v_proj": 2},
        alpha_pattern={f"^{v}": 3},
        use_rslora=True,
    )
    plain, processor = tiny_llava()
    peft_model = get_peft_model(plain, config).eval()
    torch.manual_seed(0)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    peft_model.save_pretrained(tmp_path)

    model, _ = tiny_llava()
    bank = make_bank(model, targets=(LANGUAGE,), vqa=2)
    bank.import_expert("theirs", *read_expert(tmp_path))
    bank.set_gates(torch.tensor([[[0.0, 1.0]]]).expand(4, 1, 2))
    torch.testing.assert_close(
        model(**inputs(processor)).logits,
        peft_model(**inputs(processor)).logits,
        atol=1e-5,
        rtol=1e-4,
    )
    save_expert(tmp_path / "again", bank.state("theirs"), bank.peft_config("theirs"))
    again = make_bank(tiny_llava()[0], targets=(LANGUAGE,), vqa=2)
    again.import_expert("theirs", *read_expert(tmp_path / "again"))
    assert again.sites[q].scalings == bank.sites[q].scalings
    assert again.sites[v].scalings["theirs"] == pytest.approx(bank.sites[v].scalings["theirs"])


def test_an_adapter_with_tensors_that_no_site_consumes_is_refused():
    bank, other = make_bank(tiny_llava()[0], targets=(SITE,)), make_bank(tiny_llava()[0])
    with pytest.raises(ValueError, match="belong to no site"):
        bank.import_expert("new", other.state("vqa"), other.peft_config("vqa"))
    state = other.state("vqa")
    state.pop(next(iter(state)))
    with pytest.raises(ValueError, match="belong to no site"):
        other.import_expert("new", state, other.peft_config("vqa"))
    with pytest.raises(ValueError, match="1 keys missing"):
        other.load_state("vqa", state)
    assert other.names == ["vqa", "caption", "grounding"]


def test_an_adapter_of_another_width_or_with_nan_is_refused():
    bank = make_bank(tiny_llava()[0], targets=(SITE,))
    other = make_bank(tiny_llava(hidden=64)[0], targets=(SITE,))
    with pytest.raises(ValueError, match=r"another base: .*\[64, 64\].*\[32, 32\]"):
        bank.import_expert("new", other.state("vqa"), other.peft_config("vqa"))
    broken = {key: tensor.clone() for key, tensor in bank.state("vqa").items()}
    broken[next(iter(broken))][0, 0] = float("nan")
    for act in (
        lambda: bank.import_expert("new", broken, bank.peft_config("vqa")),
        lambda: bank.load_state("vqa", broken),
    ):
        with pytest.raises(ValueError, match="NaN"):
            act()


def test_loading_a_state_of_other_ranks_is_refused():
    bank = make_bank(tiny_llava()[0], targets=(SITE,), vqa=4, caption=2)
    with pytest.raises(ValueError, match=r"is \[2, 32\], expected \[4, 32\]"):
        bank.load_state("vqa", bank.state("caption"))
