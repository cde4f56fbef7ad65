"""Factors in common: the same numbers as a loop over experts, one gradient, and files that are whole."""

import pytest
import torch
from torch import nn

from moa.build import build_model
from moa.checkpoint import load_model, step_folder
from moa.config import load_config
from moa.experts.bank import ExpertBank
from moa.experts.ties import Ties
from moa.files.peft import save_expert
from moa.training.stages import parameter_groups
from tests.experts.test_expert_linear import plain_loop
from tests.support.banks import LANGUAGE, fill, inputs, make_bank
from tests.support.peft import read_expert
from tests.support.tiny import tiny_llava
from tests.support.toy import toy_config
from tests.test_train import run_once

A, B = Ties(share_a="one"), Ties(share_b="one")
SHAPES = {
    "nothing": {},
    "A of all": {"x": A, "y": A, "z": A},
    "A of the first and the last": {"x": A, "z": A},
    "B of all": {"x": B, "y": B, "z": B},
    "A of two, B of two": {"x": A, "y": Ties(share_a="one", share_b="two"), "z": Ties(share_b="two")},
}


def layer_with(ties: dict[str, Ties], *, ranks=(3, 3, 3)) -> tuple[ExpertBank, nn.Module]:
    """A double layer 6 -> 5 with experts x, y, z, all factors random."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({"site": nn.Linear(6, 5, dtype=torch.double).requires_grad_(False)})
    bank = ExpertBank.attach(holder, ["site"])
    for name, rank in zip("xyz", ranks, strict=True):
        bank.add(name, rank=rank, alpha=2 * rank)
    bank.tie(ties)
    holder.double()
    for parameter in bank.parameters():
        nn.init.normal_(parameter)
    return bank, holder["site"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_token", [False, True])
def test_shared_factors_and_their_gradients_equal_a_plain_loop_over_experts(shape, per_token):
    ranks = (3, 2, 3) if shape == "A of the first and the last" else (3, 3, 3)
    bank, site = layer_with(SHAPES[shape], ranks=ranks)
    x = torch.randn(2, 7, 6, dtype=torch.double, requires_grad=True)
    gates = torch.rand(2, 7 if per_token else 1, 3, dtype=torch.double, requires_grad=True)
    if per_token:
        bank.route_tokens(lambda logits, *_: gates)
        site.token_router = nn.Parameter(torch.zeros(3, 6, dtype=torch.double))
    else:
        bank.set_gates(gates)
    leaves = [x, gates, *bank.parameters()]
    ours = site(x)
    loop = plain_loop(x, site.base_layer(x), gates, [2.0] * 3, site.lora_A.values(), site.lora_B.values())
    torch.testing.assert_close(ours, loop)
    with torch.no_grad():
        torch.testing.assert_close(site(x), loop)
    weights = torch.randn_like(loop)
    found, expected = (torch.autograd.grad((out * weights).sum(), leaves) for out in (ours, loop))
    torch.testing.assert_close(found, expected)


def test_a_shared_factor_is_multiplied_once_and_kept_once():
    bank, site = layer_with(SHAPES["A of all"])
    bank.set_gates(torch.ones(1, 1, 3, dtype=torch.double))
    factors_a, factors_b = site._factors(bank.context.state)
    assert (len(factors_a), len(factors_b)) == (1, 3)
    untied, plain = layer_with({})
    untied.set_gates(torch.ones(1, 1, 3, dtype=torch.double))
    ranks = plain.layout(untied.context.state)[0]
    assert ranks.spread is ranks.gather is None  # nothing more to compute


def test_inference_takes_the_factors_of_the_experts_that_a_batch_uses():
    bank, site = layer_with(SHAPES["A of all"])
    x = torch.randn(2, 7, 6, dtype=torch.double)
    gates = torch.tensor([[[0.0, 0.3, 0.0]], [[0.0, 1.0, 0.5]]], dtype=torch.double)
    with torch.no_grad():
        bank.set_gates(gates)
        loop = plain_loop(x, site.base_layer(x), gates, [2.0] * 3, site.lora_A.values(), site.lora_B.values())
        torch.testing.assert_close(site(x), loop)


def test_with_one_hot_gates_a_shared_a_is_a_plain_lora_for_each_sample():
    bank, site = layer_with(SHAPES["A of all"])
    x = torch.randn(3, 7, 6, dtype=torch.double)
    bank.set_gates(torch.eye(3, dtype=torch.double)[:, None])
    expected = [site.base_layer(x[i]) + 2 * x[i] @ site.lora_A["x"].T @ b.T for i, b in enumerate(site.lora_B.values())]
    torch.testing.assert_close(site(x), torch.stack(expected))


def test_experts_of_one_fresh_a_differ_after_two_steps_whose_gates_differ():
    bank, site = layer_with(SHAPES["A of all"])
    for b in site.lora_B.values():
        nn.init.zeros_(b)
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.01)
    x = torch.randn(3, 7, 6, dtype=torch.double)
    for _ in range(2):
        bank.set_gates(torch.eye(3, dtype=torch.double)[:, None])
        (site(x).pow(3).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    heads = torch.stack([*site.lora_B.values()])
    assert torch.pdist(heads.flatten(1)).min() > 1e-3


# The bank ------------------------------------------------------------------------------------------


def test_layers_of_one_shape_have_one_factor_and_the_sum_of_their_gradients():
    model, processor = tiny_llava()
    bank = make_bank(model, (LANGUAGE,), x=2, y=2)
    whole = len([*bank.parameters()])
    bank.tie({"x": Ties(layers=(r".*\.(q|k|v|o)_proj",))})
    q, v = (bank.sites[f"model.language_model.layers.{n}.self_attn.{s}_proj"] for n, s in ((0, "q"), (1, "q")))
    assert q.lora_A["x"] is v.lora_A["x"]
    assert q.lora_B["x"] is v.lora_B["x"]
    assert q.lora_A["y"] is not v.lora_A["y"]
    tied = {id(p): p for site in bank.sites.values() for p in (site.lora_A["x"], site.lora_B["x"])}
    assert len([*bank.parameters("x")]) == len(tied) < whole // 2
    fill(bank)
    bank.set_gates(torch.ones(4, 1, 2))
    loss = model(**inputs(processor)).logits.square().mean()
    (together,) = torch.autograd.grad(loss, [q.lora_B["x"]])
    places = [place for place in bank.places()[id(q.lora_B["x"])]]
    for expert, site, factor in places:  # each by itself: the same values in Parameters of their own
        bank.sites[site].tie(factor, expert, nn.Parameter(bank.factor((expert, site, factor)).detach().clone()))
    bank.set_gates(torch.ones(4, 1, 2))
    alone = torch.autograd.grad(model(**inputs(processor)).logits.square().mean(), [*map(bank.factor, places)])
    torch.testing.assert_close(together, sum(alone), atol=1e-6, rtol=1e-4)


def test_a_member_can_be_removed_and_the_others_stay_tied():
    bank, site = layer_with(SHAPES["A of all"])
    assert len([*bank.parameters()]) == 4
    bank.remove("x")
    assert site.lora_A["y"] is site.lora_A["z"]
    bank.set_gates(torch.ones(1, 1, 2, dtype=torch.double))
    x = torch.randn(2, 7, 6, dtype=torch.double)
    loop = plain_loop(x, site.base_layer(x), torch.ones(2), [2.0] * 2, site.lora_A.values(), site.lora_B.values())
    torch.testing.assert_close(site(x), loop)


def test_a_shared_factor_is_trained_by_all_or_by_none():
    bank, site = layer_with({"x": A, "y": A})
    rule = r"experts x, y have one lora_A \(first at site\): y would train it, and x not"
    with pytest.raises(ValueError, match=rule):
        bank.train({"x": ()})
    assert site.lora_B["x"].requires_grad
    bank.train({"x": ["B"], "y": ["B"]})
    assert not site.lora_A["x"].requires_grad
    bank.train({"x": ()})  # nobody trains the A
    assert (bank.experts["x"].frozen, bank.experts["y"].trained) == (True, ("B",))
    assert [p.requires_grad for p in site.lora_A.values()] == [False, False, True]
    assert [p.requires_grad for p in site.lora_B.values()] == [False, True, True]


def test_what_ties_nothing_or_does_not_fit_is_refused():
    bank, _ = layer_with({}, ranks=(3, 2, 3))
    with pytest.raises(ValueError, match=r"expert y: its lora_A at site is to be that of x .* \[2, 6\] and \[3, 6\]"):
        bank.tie({"x": A, "y": A})
    with pytest.raises(ValueError, match="experts.x.share_b: no other expert of 'one' has one of its sites"):
        bank.tie({"x": B})
    with pytest.raises(ValueError, match="experts.x.tie_layers: .* name no two layers of one shape"):
        bank.tie({"x": Ties(layers=("site",))})
    with pytest.raises(ValueError, match="experts.x.tie_layers: 'other' matches no linear layer"):
        bank.tie({"x": Ties(layers=("other",))})


# Files ----------------------------------------------------------------------------------------------


TIED = {
    "experts": {
        "vqa": {"rank": 2, "alpha": 4, "share_a": "one", "tie_layers": [r".*\.mlp\.\w+_proj"]},
        "grounding": {"rank": 2, "alpha": 4, "share_a": "one", "tie_layers": [r".*\.mlp\.\w+_proj"]},
    }
}


@pytest.mark.slow
def test_a_run_with_shared_factors_is_written_whole_and_read_as_one(tmp_path):
    config = toy_config(tmp_path, stages={"joint": {"steps": 2}}, data__validation={}, **TIED)
    trained = run_once(config).model
    own = parameter_groups(trained, config)["experts"]
    assert len(own) == len({id(p) for p in trained.bank.parameters()}) == 2 + 2 * 2  # A, and B of each expert
    first, *_ = load_model(config.out)
    assert len([*first.bank.parameters()]) == 6
    for one, other in zip(first.bank.parameters(), trained.bank.parameters(), strict=True):
        assert torch.equal(one, other)
    state = first.bank.state("vqa")
    tensors, _ = read_expert(step_folder(config.out) / "experts" / "vqa")
    assert all(torch.equal(tensors[key], state[key]) for key in state)
    changed = {key: t + 1 if "lora_A" in key and "up" in key else t for key, t in tensors.items()}
    folder = tmp_path / "experts"
    for name in ("vqa", "grounding"):
        save_expert(folder / name, changed if name == "vqa" else first.bank.state(name), first.bank.peft_config(name))
    with pytest.raises(ValueError, match=r"expert vqa|expert grounding: its lora_A at .* differ by up to 1"):
        build_model(config, experts=folder)
    with pytest.raises(ValueError, match="expert grounding: its lora_A at .* that of vqa .* differ by up to 1"):
        first.bank.load_states({"vqa": {key: t + 1 if "lora_A" in key else t for key, t in tensors.items()}})
    first.bank.load_states({name: {k: 2 * t for k, t in first.bank.state(name).items()} for name in first.bank.names})
    assert torch.equal(first.bank.state("vqa")[key := next(iter(state))], 2 * tensors[key])


def test_a_fresh_expert_takes_the_factor_of_those_that_have_files(tmp_path):
    config = toy_config(tmp_path, experts={"vqa": {"rank": 2, "alpha": 4}, "grounding": {"rank": 2, "alpha": 4}})
    state = build_model(config).bank.state("vqa")
    filled = {key: torch.full_like(tensor, 0.5) for key, tensor in state.items()}
    save_expert(tmp_path / "old", filled, build_model(config).bank.peft_config("vqa"))
    experts = {"new": {"rank": 2, "share_a": "one", "factors": ["B"]},
               "old": {"init_from": str(tmp_path / "old"), "share_a": "one", "frozen": True}}  # fmt: skip
    new = toy_config(tmp_path, experts=experts, data__expert="new")
    model = build_model(new)
    for site in model.bank.sites.values():
        assert site.lora_A["new"] is site.lora_A["old"]
        assert (site.lora_A["new"] == 0.5).all()
        assert (site.lora_B["new"] == 0).all()
    assert all("lora_B" in key for key in parameter_groups(model, new)["experts"])
    # a run that replaces the shared factor under a fresh expert changes nothing of it
    model.bank.load_states({"old": {key: 2 * tensor for key, tensor in filled.items()}})


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"x": {"share_a": "one"}, "y": {}}, "experts.x.share_a: no other expert has the group 'one'"),
        ({"x": {"share_a": "1", "share_b": "1"}, "y": {"share_a": "1", "share_b": "1"}}, "y.share_b: another expert"),
        ({"x": {"factors": []}}, "experts.x.factors: names none"),
        ({"x": {"factors": ["A"]}}, r"experts.x.factors: \[A\] trains nothing"),
        ({"x": {"frozen": True, "factors": ["B"]}}, "experts.x.factors: .* no effect with frozen"),
        ({"x": {"share_a": "1", "tie_layers": ["q"]}, "y": {"share_a": "1"}}, "experts.x.tie_layers: must be the same"),
    ],
)
def test_settings_of_ties_without_effect_are_errors(experts, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, [("experts", experts)])


def test_tied_layers_are_not_for_fsdp2(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="experts.vqa.tie_layers: not for FSDP2; choices .*: ddp, zero2, zero3"):
        run_once(toy_config(tmp_path, **TIED))
