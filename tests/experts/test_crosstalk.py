"""Crosstalk against loops over dense updates: its values, its gradient, what it counts, and that it changes nothing."""

import pytest
import torch

from moa.experts.crosstalk import Watch, crosstalk, crosstalk_by_pair, output_energies
from tests.support.toy import read_log, toy_config
from tests.test_model import batch_of, make_model
from tests.test_train import run_once


def inputs_of(model, batch, gates):
    """Each site's input [rows, seq, in] in a forward."""
    found, hooks = {}, []
    for name, site in model.bank.sites.items():
        keep = lambda module, args, name=name: found.__setitem__(name, args[0].detach())  # noqa: E731
        hooks.append(site.register_forward_pre_hook(keep))
    model(batch, gates)
    for hook in hooks:
        hook.remove()
    return found


def brute_force(model, batch, inputs):
    """P and the value of each pair by loops over sites, samples and tokens."""
    names, pairs = model.bank.names, {}
    for site, x in inputs.items():
        layer = model.bank.sites[site]
        table = torch.zeros(3, 3)
        for row in range(len(x)):
            text = model.bank.streams[site] == "text"
            sample = row if text else int(batch.image_index[row])
            for token in range(x.shape[1]):
                if text and not batch.attention_mask[row, token]:
                    continue
                for j, name in enumerate(names):
                    dense = layer.scalings[name] * layer.lora_B[name] @ layer.lora_A[name]
                    k = int(batch.expert_ids[sample])
                    table = table + torch.zeros(3, 3).index_put(
                        (torch.tensor(k), torch.tensor(j)), (dense @ x[row, token]).square().sum()
                    )
        for k in range(3):
            for j in range(3):
                if j != k:
                    pairs.setdefault((names[j], names[k]), []).append(table[k, j] / table[k, k].detach())
    flat = [value for values in pairs.values() for value in values]
    return sum(flat) / len(flat), {pair: sum(values) / len(values) for pair, values in pairs.items()}


def watched(model, batch, gates, *, gradient=True):
    model.bank.context.watch = Watch(sites=frozenset(model.bank.sites), gradient=gradient)
    output = model(batch, gates)
    model.bank.context.watch = None
    return output


@pytest.mark.slow
def test_values_and_gradient_are_those_of_loops_over_dense_updates():
    sites = (
        r"model\.language_model\.layers\.0\.self_attn\.(q|o)_proj",
        r"model\.vision_tower\..*layers\.0\..*\.q_proj",
    )
    model = make_model(targets=sites)
    batch, gates = batch_of(model, pad=3), torch.eye(3)[[0, 1, 2, 0]]
    expected, pairs = brute_force(model, batch, inputs_of(model, batch, gates))
    output = watched(model, batch, gates)
    torch.testing.assert_close(output.aux["crosstalk"], expected, rtol=1e-5, atol=0)
    found = crosstalk_by_pair(output.energies, model.counted, model.bank.names)
    assert found.pop("crosstalk") == pytest.approx(float(expected.detach()), rel=1e-5)
    assert found == {f"crosstalk/{j}/{k}": pytest.approx(float(v.detach()), rel=1e-5) for (j, k), v in pairs.items()}
    parameters = list(model.bank.parameters())
    ours = torch.autograd.grad(output.aux["crosstalk"], parameters)
    theirs = torch.autograd.grad(expected, parameters)
    for own, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-7)
        assert reference.abs().max() > 0


def test_the_energies_are_those_of_the_updates():
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(shape, generator=generator) for shape in ((2, 3, 5), (4, 5), (6, 4)))
    expected = torch.stack([(2.0 * x @ a[:3].T @ b[:, :3].T), (0.5 * x @ a[3:].T @ b[:, 3:].T)], -2).square().sum(-1)
    found = output_energies(x, [a[:3], a[3:]], [b[:, :3], b[:, 3:]], [2.0, 0.5])
    torch.testing.assert_close(found, expected)


def test_padding_unknown_samples_and_shared_experts_count_for_nothing():
    model = make_model(targets=(r"model\.language_model\.layers\.0\.mlp\.up_proj",))
    gates = torch.eye(3)[[0, 1, 2, 0]]
    energies = watched(model, batch_of(model), gates, gradient=False).energies
    padded = watched(model, batch_of(model, pad=5), gates, gradient=False).energies
    torch.testing.assert_close(padded, energies, rtol=1e-4, atol=1e-4)
    unknown = watched(model, batch_of(model, experts=[0, -1, 2, 3]), gates, gradient=False).energies
    assert unknown[:, 1].abs().max() == 0 and torch.equal(unknown[:, 2], energies[:, 2])
    counted = torch.tensor([True, True, False])
    found = crosstalk_by_pair(energies, counted, model.bank.names)
    assert set(found) == {"crosstalk", "crosstalk/caption/vqa", "crosstalk/vqa/caption"}
    assert crosstalk(energies[:, :1, :1], counted[:1]) == 0


def test_measuring_changes_no_output_and_no_gradient_and_ends_with_the_forward():
    model = make_model()
    batch = batch_of(model)
    plain, measured = model(batch), watched(model, batch, None, gradient=False)
    assert torch.equal(plain.logits, measured.logits) and "crosstalk" not in measured.aux
    assert measured.energies is not None and plain.energies is None and model(batch).energies is None


@pytest.mark.slow
def test_checkpointed_layers_give_the_penalty_the_same_gradient():
    model = make_model()
    batch = batch_of(model)
    watched(model, batch, None).aux["crosstalk"].backward()
    plain = [p.grad.clone() for p in model.bank.parameters()]
    model.zero_grad()
    model.enable_gradient_checkpointing()
    model.train()
    watched(model, batch, None).aux["crosstalk"].backward()
    for parameter, expected in zip(model.bank.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_run_logs_it_at_some_steps_and_a_penalty_joins_the_loss(tmp_path):
    stages = {"experts": {"steps": 6, "lr": {"experts": 2e-2}}, "router": {"steps": 1}}
    shared = {"stages": stages, "logging__every": 3, "data__validation": {}}
    runs = {}
    for weight in (0.0, 1.0):
        config = toy_config(tmp_path, out=str(tmp_path / f"run-{weight}"), losses__crosstalk=weight, **shared)
        run_once(config)
        runs[weight] = [line for line in read_log(config.out) if "loss" in line]
    logged = [line["step"] for line in runs[0.0] if "crosstalk" in line]
    assert logged == [3, 6] and {"crosstalk/vqa/grounding", "crosstalk/grounding/vqa"} < runs[0.0][2].keys()
    assert [line["step"] for line in runs[1.0] if "crosstalk" in line] == [*range(2, 7)]  # at first all B are 0
    second, plain = runs[1.0][1], runs[0.0][1]
    assert second["aux/crosstalk"] == pytest.approx(second["crosstalk"], rel=1e-5)
    assert second["loss"] == plain["loss"] and second["grad_norm"] > 10 * plain["grad_norm"]


def test_a_penalty_without_effect_is_refused(tmp_path):
    alone = {"experts": {"one": {}}, "data__expert": "one", "router__kind": "fixed"}
    joint = {"stages": {"joint": {"steps": 1}}, "data__validation": {}}
    with pytest.raises(ValueError, match=r"losses\.crosstalk: has no effect"):
        run_once(toy_config(tmp_path, losses__crosstalk=0.1, **alone, **joint))
    with pytest.raises(ValueError, match=r"losses\.crosstalk: no stage trains experts"):
        toy_config(tmp_path, losses__crosstalk=0.1, stages={"router": {"steps": 1}})
