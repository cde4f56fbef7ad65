"""What a wrapped layer computes: against a plain loop, kept factors, precision, checkpointing, tokens."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from moa.experts.bank import ExpertBank
from moa.experts.lora_product import Ranks, mix
from tests.routing import test_decisions
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
from tests.support.tiny import tiny_batch, tiny_llava

# The formula --------------------------------------------------------------------------------------


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
    layer = nn.Linear(6, 5, dtype=torch.double).requires_grad_(False)
    gates = torch.rand(2, 7 if per_token else 1, count, dtype=torch.double, requires_grad=True)
    leaves = [x, gates, *factors_a, *factors_b]

    spread = torch.tensor([i for i, r in enumerate(ranks) for _ in range(r)])
    each = torch.tensor(scalings, dtype=torch.double)[spread]
    ours = mix(x, layer(x), gates, Ranks(place=spread, scaling=each), factors_a, factors_b)
    loop = plain_loop(x, layer(x), gates, scalings, factors_a, factors_b)
    torch.testing.assert_close(ours, loop)
    weights = torch.randn_like(loop)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), leaves),
        torch.autograd.grad((loop * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_with_root_experts_learn_by_the_square_root_of_their_gates_and_all_else_is_the_same():
    torch.manual_seed(0)
    double = {"dtype": torch.double, "requires_grad": True}
    factors_a, factors_b = [[torch.randn(*shape, **double) for _ in "ab"] for shape in ((3, 6), (5, 3))]
    x, layer = torch.randn(2, 7, 6, **double), nn.Linear(6, 5, dtype=torch.double).requires_grad_(False)
    gates = torch.rand(2, 7, 2, dtype=torch.double)
    gates[0, 0, 0] = 0
    gates.requires_grad_()
    ranks = Ranks(place=torch.tensor([0] * 3 + [1] * 3), scaling=torch.full((6,), 2.0, dtype=torch.double))
    ours = mix(x, layer(x), gates, ranks, factors_a, factors_b, root=True)
    roots = plain_loop(x, layer(x), gates.detach().sqrt(), (2.0, 2.0), factors_a, factors_b)
    whole = plain_loop(x, layer(x), gates, (2.0, 2.0), factors_a, factors_b)
    torch.testing.assert_close(ours, whole)
    learned, weights = [x, *factors_a, *factors_b], torch.randn_like(whole)
    found = torch.autograd.grad((ours * weights).sum(), [*learned, gates])
    expected = torch.autograd.grad((roots * weights).sum(), learned)
    for one, other in zip(found, [*expected, *torch.autograd.grad((whole * weights).sum(), [gates])], strict=True):
        torch.testing.assert_close(one, other)


def test_a_gate_that_many_tokens_share_gets_their_gradients_summed_in_its_own_precision():
    tokens, one = 4097, torch.ones(1, 1, dtype=torch.bfloat16)  # bf16 has no number 4097
    gate = torch.ones(1, 1, 1, requires_grad=True)
    x = torch.ones(1, tokens, 1, dtype=torch.bfloat16)
    ranks = Ranks(place=torch.tensor([0]), scaling=torch.ones(1))
    mix(x, torch.zeros_like(x), gate, ranks, [one], [one]).backward(x)
    assert gate.grad.item() == tokens


def test_a_base_layer_that_is_trained_gets_its_gradient():
    bank = make_bank(tiny_llava()[0], targets=(SITE,))
    fill(bank)
    site, x = bank.sites[SITE], torch.randn(2, 3, 32)
    site.base_layer.requires_grad_(True)
    bank.set_gates(some_gates(bank, batch=2))
    site(x).sum().backward()
    expected = x.sum((0, 1)).expand_as(site.base_layer.weight)
    torch.testing.assert_close(site.base_layer.weight.grad, expected, atol=1e-5, rtol=1e-4)


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
            w * site.scalings[e] * site.lora_B[e] @ site.lora_A[e] for w, e in zip(weights, bank.names, strict=True)
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
        bank.set_gates(gates, torch.arange(4))
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


# The kept concatenation ---------------------------------------------------------------------------


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


def test_gates_that_were_set_once_serve_another_dtype_and_more_rows():
    bank = make_bank(tiny_llava()[0], targets=(SITE,))
    fill(bank)
    site, x = bank.sites[SITE], torch.randn(2, 3, 32)
    bank.set_gates(some_gates(bank, batch=2), expand=True)
    expected = site(x)  # with gradients: nothing is kept
    with torch.no_grad():
        bank.set_gates(some_gates(bank, batch=2), expand=True)
        with torch.autocast("cpu", torch.bfloat16):
            site(x)
        torch.testing.assert_close(site(x), expected)
        torch.testing.assert_close(site(x[:, 0]), expected[:, 0])  # a row is a token
        beams = site(x.repeat_interleave(2, 0))
        torch.testing.assert_close(beams, expected.repeat_interleave(2, 0))


def test_inference_leaves_out_experts_that_no_sample_uses():
    model, processor = tiny_llava()
    bank = make_bank(model)
    fill(bank)
    gates = torch.tensor([[[0.0, 0.0, 0.5]], [[2.0, 0.0, 0.0]]]).repeat(2, 1, 1)
    with torch.no_grad():
        bank.set_gates(gates, torch.arange(4))
        pruned = model(**inputs(processor)).logits
        kept = bank.context.state.prepared[SITE].a
        bank.set_gates(torch.tensor([[[0.0, 1.0, 0.0]]]).expand(4, 1, 3), torch.arange(4))
        model(**inputs(processor))
        other = bank.context.state.prepared[SITE].a
        bank.set_gates(gates, torch.arange(4))
    assert (kept.shape[0], other.shape[0]) == (4 + 8, 2)  # each batch's own
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
    bank.load_states({"vqa": {k: torch.zeros_like(t) for k, t in bank.state("vqa").items()}})
    assert not site_output(bank).equal(before)
    model.double()
    bank.set_gates(torch.ones(1, 1, 3))
    with torch.no_grad():
        out = bank.sites[SITE](torch.ones(1, 2, 32, dtype=torch.double))
    assert out.dtype == torch.double


# Precision, checkpointing, memory -----------------------------------------------------------------


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


@pytest.mark.slow
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
                bank.route_tokens(test_decisions.routing(2).token_gates)
            loss = loss + model(**inputs(processor)).logits.square().mean()
            if routing == "token":
                logits = bank.take_token_logits()
                assert logits.keys() == bank.sites.keys()
                loss = loss + sum(x.square().mean() for x in logits.values())
        loss.backward()
        assert bank.take_token_logits() == {}  # recomputing records nothing
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


# Compiled -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_the_expert_path_is_one_graph_with_the_same_output_and_gradients():
    # in a process of its own: dynamo cannot trace pytest's checks of shapes and types
    command = [sys.executable, "-m", "tests.support.compiled"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


# Token routing ------------------------------------------------------------------------------------


def test_token_routing_equals_a_plain_loop_with_each_tokens_own_gates():
    model, _ = tiny_llava()
    bank = make_bank(model, targets=(SITE,))
    fill(bank)
    bank.add_token_routers(std=1.0)
    site, x = bank.sites[SITE], torch.randn(2, 5, 32)
    for top_k in (None, 2):
        bank.route_tokens(test_decisions.routing(top_k).token_gates, temperature=0.5)
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


def test_token_routing_decides_in_float32_under_autocast():
    bank = make_bank(tiny_llava()[0], targets=(SITE,))
    bank.add_token_routers(std=1.0)
    x, logits = torch.randn(2, 5, 32), []
    for enabled in (False, True):
        bank.route_tokens(test_decisions.routing(2).token_gates)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            bank.sites[SITE](x)
        logits.append(bank.take_token_logits()[SITE])
    assert logits[0].equal(logits[1]) and logits[1].dtype == torch.float32


def test_token_routers_need_all_experts_first():
    bank = make_bank(tiny_llava()[0], targets=(LANGUAGE,), vqa=2)
    with pytest.raises(ValueError, match="has no token router"):
        bank.route_tokens(test_decisions.routing(None).token_gates)
        bank.sites[SITE](torch.ones(1, 2, 32))
    bank.add_token_routers()
    with pytest.raises(ValueError, match="before the token routers"):
        bank.add("late", rank=2, alpha=2)
