"""Token routers that sites share, that a site's own experts size, and that the tokens of a prompt feed together."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from moa.experts.token_routers import leaders
from moa.model import MixtureModel
from moa.routing.roles import Roles
from moa.routing.routing import Routing
from tests.experts.test_expert_linear import plain_loop
from tests.support.banks import LANGUAGE, SITE, fill, make_bank
from tests.support.tiny import tiny_llava
from tests.test_model import batch_of, close, make_model, rows

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def routed(share: str = "site", kind: str = "softmax", pool: str = "none", **options) -> MixtureModel:
    model = make_model(kind, granularity="token", pool=pool, **options)
    for site in model.bank.sites.values():
        site.token_router = None
    model.bank.add_token_routers(share=share, std=1.0)
    return model


# Shared by sites ------------------------------------------------------------------------------------


def test_the_first_of_a_group_decides_for_it():
    tower, layer, projector = "tower.layers.0.self_attn", "model.layers.3", "model.projector"
    sites = [f"{tower}.{name}_proj" for name in "kvq"]  # CLIP registers them in this order, and runs q first
    sites += [f"{layer}.self_attn.{name}_proj" for name in "qo"]
    sites += [f"{layer}.mlp.{name}_proj" for name in ("gate", "up", "down")] + [f"{projector}.linear_{i}" for i in "12"]
    experts, streams = dict.fromkeys(sites, (0, 1)), dict.fromkeys(sites, "text")
    q, up, down = f"{tower}.q_proj", f"{layer}.mlp.up_proj", f"{layer}.mlp.down_proj"

    def found(share: str) -> list[str]:
        own = leaders(experts, streams, share)
        return [own[site] for site in (f"{tower}.k_proj", up, down, f"{projector}.linear_2")]

    gate, last = f"{layer}.mlp.gate_proj", f"{projector}.linear_2"
    assert found("site") == [f"{tower}.k_proj", up, down, last]
    assert found("input") == [q, gate, down, last]
    assert found("module") == [q, gate, gate, f"{projector}.linear_1"]
    assert found("block") == [q, f"{layer}.self_attn.q_proj", f"{layer}.self_attn.q_proj", f"{projector}.linear_1"]
    experts[down] = (0,)  # other experts, so a router of its own
    assert found("block")[2] == down
    with pytest.raises(ValueError, match="no two sites"):
        leaders({up: (0,), down: (1,)}, streams, "block")


@pytest.mark.slow
@pytest.mark.parametrize("share", ["input", "module", "block"])
@torch.no_grad()
def test_sites_of_a_group_equal_a_loop_with_the_gates_of_the_first(share):
    model, calls = routed(share), {}
    bank = model.bank
    for name, site in bank.sites.items():
        site.register_forward_hook(lambda m, args, out, name=name: calls.update({name: (args[0], out)}))
    whole = model(batch_of(model))
    assert len(bank.token_routers()) < len(bank.sites) == len(calls)
    for name, (x, out) in calls.items():
        site = bank.sites[name]
        leader = site.routed.leader
        gates = (calls[leader][0] @ bank.sites[leader].token_router.T).softmax(-1)
        factors = site.lora_A.values(), site.lora_B.values()
        close(out, plain_loop(x, site.base_layer(x), gates, [*site.scalings.values()], *factors))
    assert bank.context.state.decided == {}  # no graph is kept
    alone = model(rows(batch_of(model), [2]))
    close(alone.loss_per_sample, whole.loss_per_sample[2:3])


def test_a_site_that_runs_before_its_router_or_has_other_tokens_is_refused():
    bank = make_bank(tiny_llava()[0], targets=(LANGUAGE,), vqa=2)
    bank.add_token_routers(share="block")
    bank.route_tokens(Routing(roles=Roles(("vqa",), ("routed",)), granularity="token").token_gates)
    later = SITE.replace("q_proj", "k_proj")
    assert bank.sites[later].routed.leader == SITE
    with pytest.raises(ValueError, match="runs before"):
        bank.sites[later](torch.ones(1, 2, 32))
    bank.sites[SITE](torch.ones(1, 2, 32))
    with pytest.raises(ValueError, match=r"has \[1, 3\] tokens"):
        bank.sites[later](torch.ones(1, 3, 32))


@pytest.mark.slow
@pytest.mark.parametrize(("share", "pool"), [("block", "none"), ("input", "prompt_mean"), ("site", "vote")])
def test_checkpointing_gives_the_plain_gradients_and_every_parameter_has_one(share, pool):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = routed(share, pool=pool).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        outputs = [model(batch_of(model)), model(rows(batch_of(model), [3, 1]))]  # two before a backward
        sum(out.loss_per_sample.sum() + sum(out.aux.values()) for out in outputs).backward()
        assert all(router.grad.abs().sum() > 0 for router in model.bank.token_routers().values())
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, saving = gradients(False), gradients(True)
    assert all(grad is not None for grad in plain.values())
    for name, grad in plain.items():
        torch.testing.assert_close(saving[name], grad, msg=name)


@pytest.mark.parametrize("kind", ["top_k", "threshold"])
def test_the_noise_of_a_token_router_has_a_learned_scale_for_each_expert_of_the_site_in_training_alone(kind):
    """Noisy top-k, 1701.06538, eq. 4, at a site with two of three choices."""
    bank = make_bank(tiny_llava()[0], targets=(SITE,), a=2, b=3)
    bank.add("c", rank=2, alpha=4)
    thresholds = int(kind == "threshold")
    bank.add_token_routers(choices=["a", "x", "c"], thresholds=thresholds, noisy=True, std=1.0)
    site, roles = bank.sites[SITE], Roles(("a", "x", "c"), ("routed",) * 3)
    torch.nn.init.normal_(site.token_noise)
    routing = Routing(roles=roles, kind=kind, granularity="token", noise="learned", temperature=0.5, top_k=1)
    weight, x = torch.cat([site.token_router, site.token_noise]), torch.randn(1, 4, 32)
    columns = routing.token_logits(x, weight) / 0.5
    assert columns.shape[-1] == 4 + thresholds
    plain = Routing(roles=roles, kind=kind, granularity="token", temperature=0.5, top_k=1)
    still = plain.token_gates(x @ site.token_router.T / 0.5, (0, 2))
    torch.testing.assert_close(routing.eval().token_gates(columns, (0, 2), draw=True), still)
    torch.manual_seed(0)
    found = routing.train().token_gates(columns, (0, 2), draw=True)
    torch.manual_seed(0)
    drawn = torch.randn(1, 4, 2) * F.softplus(x @ site.token_noise.T)
    noisy = torch.cat([(x @ site.token_router[:2].T + drawn), x @ site.token_router[2:].T], -1) / 0.5
    torch.testing.assert_close(found, plain.token_gates(noisy, (0, 2)))
    assert f"token_noise.{SITE}" in bank.site_routers() and found[..., 1].eq(0).all()


# A site's own experts -------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "k"), [("top_k", 2), ("softmax", 9), ("sigmoid", 9)])
def test_a_router_chooses_among_its_sites_own_experts(kind, k):
    """MoLA, 2402.08562: more experts in some layers than in others; a shared one is at all of them."""
    bank = make_bank(tiny_llava()[0], targets=(SITE, SITE.replace(".0.", ".1.")), a=2, b=3)
    bank.add("common", rank=2, alpha=2)
    bank.add("c", rank=2, alpha=4, targets=[SITE])
    bank.add("d", rank=1, alpha=3, targets=[SITE.replace(".0.", ".1.")])
    fill(bank)
    bank.add_token_routers(choices=["a", "b", "c", "d"], std=1.0)
    roles = Roles(tuple(bank.names), ("routed", "routed", "always", "routed", "routed"))
    routing = Routing(roles=roles, kind=kind, top_k=min(k, 4), granularity="token")
    for name, own in ((SITE, ["a", "b", "c"]), (SITE.replace(".0.", ".1."), ["a", "b", "d"])):
        site, x = bank.sites[name], torch.randn(2, 5, 32)
        assert site.token_router.shape == (3, 32)
        bank.route_tokens(routing.token_gates)
        ours, logits = site(x), x @ site.token_router.T
        chosen = logits.sigmoid() if kind == "sigmoid" else logits.softmax(-1)
        if kind == "top_k":
            chosen = chosen * (chosen >= chosen.topk(k, -1).values[..., -1:])
            chosen = chosen / chosen.sum(-1, keepdim=True)
        gates = torch.cat([chosen, torch.ones(2, 5, 1)], -1)
        parts = ([held[e] for e in [*own, "common"]] for held in (site.scalings, site.lora_A, site.lora_B))
        close(ours, plain_loop(x, site.base_layer(x), gates, *parts))


def test_losses_count_a_sites_own_experts():
    roles = Roles(("a", "b", "c", "d"), ("routed", "joint", "routed", "routed"))
    routing = Routing(roles=roles, kind="top_k", top_k=3, granularity="token")
    logits, mask = torch.randn(1, 3, 3), torch.ones(3, dtype=torch.bool)
    ids, tasks = torch.tensor([0, 2, 3]), torch.zeros(3, dtype=torch.long)  # the expert 2 is not at this site
    found = routing.token_losses(logits, ids, tasks, mask, (0, 1, 3))
    two = logits[..., [0, 2]]
    wanted = torch.stack([two[0, 0].log_softmax(0)[0], two[0, 2].log_softmax(0)[1]])
    close(found["guidance"], -wanted.mean())
    close(found["z"], two.logsumexp(-1).square().mean())
    assert routing.token_losses(logits[..., :1], ids, tasks, mask, (1,)) == {}


# Pooled over the prompt -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("pool", "kind"), [("prompt_mean", "sigmoid"), ("prompt_mean", "top_k"), ("vote", "top_k")])
@torch.no_grad()
def test_the_tokens_of_a_prompt_decide_together_as_in_a_loop_over_samples(pool, kind):
    model, seen = routed(kind=kind, pool=pool), {}
    for name, site in model.bank.sites.items():
        site.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args[0], out)}))
    batch = batch_of(model, pad=2, left=True)
    model(batch)
    for name, (x, out) in seen.items():
        site, gates = model.bank.sites[name], []
        for i in range(4):
            first = int((batch.labels[i] != -100).nonzero()[0])
            prompt = batch.attention_mask[i].bool() & (torch.arange(batch.labels.shape[1]) < first)
            own = x[i][prompt] if model.bank.streams[name] == "text" else x[i]
            if pool == "vote":
                votes = (own @ site.token_router.T).softmax(-1).sum(0)
                best = votes.topk(2)
                gates.append(torch.zeros(3).scatter(0, best.indices, best.values / best.values.sum()))
            else:
                logits = own.mean(0) @ site.token_router.T
                gates.append(Routing(roles=model.routing.roles, kind=kind, granularity="token").token_gates(logits))
        factors = site.lora_A.values(), site.lora_B.values()
        close(out, plain_loop(x, site.base_layer(x), torch.stack(gates)[:, None], [*site.scalings.values()], *factors))


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["prompt_mean", "vote"])
@torch.no_grad()
def test_pooled_gates_depend_on_their_samples_prompt_alone(pool):
    model = routed("module", "top_k", pool)
    batch = batch_of(model)
    whole = model(batch)
    assert whole.gates.std(0).max() > 0.02
    for changed in (batch_of(model, pad=3), batch_of(model, pad=2, left=True)):
        close(model(changed).gates, whole.gates)
        close(model(changed).loss_per_sample, whole.loss_per_sample)
    close(model(batch_of(model, answers=["yes", "no", "<loc0001> and more", "blue"])).gates, whole.gates)
    close(model(batch_of(model, answers=None)).gates, whole.gates)
    order = [2, 0, 3]
    turned = model(rows(batch, order))
    close(turned.gates, whole.gates[order])
    close(turned.loss_per_sample, whole.loss_per_sample[order])


@contextmanager
def last_logits(model: MixtureModel) -> Iterator[list[torch.Tensor]]:
    """What the model would say next, also where labels let it compute the logits of answers alone."""
    found = []
    hook = model.model.model.language_model.register_forward_hook(
        lambda m, args, out: found.append(model.backbone.logits(out.last_hidden_state[:, -1]))
    )
    yield found
    hook.remove()


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["none", "prompt_mean", "vote"])
@torch.no_grad()
def test_decoding_keeps_the_gates_of_the_prompt(pool):
    """With and without the cache, and for beams and return sequences as for a sample alone."""
    model = routed("block", "top_k", pool)
    batch = batch_of(model, answers=None, left=True)
    whole = model.generate(batch, **GREEDY)
    longer = batch
    for step in range(4):
        with last_logits(model) as last:
            model(longer)
        last[0][:, model.model.generation_config.eos_token_id or 2] = -torch.inf  # min_new_tokens forbids the end
        assert last[0].argmax(-1).equal(whole[:, step])
        ids = torch.cat([longer.input_ids, whole[:, step : step + 1]], 1)
        mask = torch.cat([longer.attention_mask, torch.ones(4, 1, dtype=torch.long)], 1)
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < batch.input_ids.shape[1], -100)
        longer = dataclasses.replace(longer, input_ids=ids, attention_mask=mask, labels=labels)
    beams = model.generate(batch, **GREEDY, num_beams=2, num_return_sequences=2)
    for i in range(4):
        alone = model.generate(rows(batch, [i]), **GREEDY, num_beams=2, num_return_sequences=2)
        assert alone.equal(beams[2 * i : 2 * i + 2])


# Beside a router of samples ---------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_samples_and_tokens_decide_together_by_a_weight_of_each_layer():
    model, calls = make_model("top_k", granularity="both", top_k=2), {}
    bank = model.bank
    bank.add_token_routers(share="input", std=1.0, mixed=True)
    depths = torch.cat([site.depth for site in bank.sites.values() if site.depth is not None])
    assert torch.equal(depths, torch.linspace(-2, 2, len(bank.token_routers())))
    for name, site in bank.sites.items():
        site.register_forward_hook(lambda m, args, out, name=name: calls.update({name: (args[0], out)}))
    batch = batch_of(model)
    out = model(batch)
    sample = out.router_logits[:, 0].softmax(-1)
    for name, (x, y) in calls.items():
        site = bank.sites[name]
        leader = bank.sites[site.routed.leader]
        tokens = (calls[leader.name][0] @ leader.token_router.T).softmax(-1)
        weight = float(leader.depth.sigmoid())
        own = sample[:, None] if tokens.dim() == 3 else sample
        if len(own) != len(tokens):
            continue  # rows of images: their samples are not in this order
        mixed = weight * own + (1 - weight) * tokens
        kept = mixed * (mixed >= mixed.topk(2, -1).values[..., -1:])
        gates, factors = kept / kept.sum(-1, keepdim=True), (site.lora_A.values(), site.lora_B.values())
        close(y, plain_loop(x, site.base_layer(x), gates, [*site.scalings.values()], *factors))
    alone = model(rows(batch, [2]))
    close(alone.loss_per_sample, out.loss_per_sample[2:3])
    prompt = batch_of(model, answers=None, left=True)
    whole, again = (model.generate(prompt, use_cache=use, **GREEDY) for use in (True, False))
    assert torch.equal(whole, again)


@pytest.mark.slow
def test_a_router_of_samples_and_the_weights_of_layers_learn_beside_tokens():
    model = make_model(granularity="both")
    model.bank.add_token_routers(std=1.0, mixed=True)
    out = model(batch_of(model))
    (out.loss_per_sample.sum() + out.aux["divergence"]).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.bank.site_routers().values())
    assert bool(model.router.head[-1].weight.grad.any())


@pytest.mark.slow
def test_each_task_has_routers_of_its_own_and_an_unknown_one_the_mean_of_all():
    model, calls = routed(), {}
    for site in model.bank.sites.values():
        site.token_router = None
    model.bank.add_token_routers(share="input", std=1.0, num_tasks=3)
    tasks = [0, 2, -1, 1]
    for name, site in model.bank.sites.items():
        site.register_forward_hook(lambda m, args, out, name=name: calls.update({name: (args[0], out)}))
    batch = batch_of(model, tasks=tasks)
    whole = model(batch)
    with torch.no_grad():
        for name, (x, y) in calls.items():
            site = model.bank.sites[name]
            leader = model.bank.sites[site.routed.leader]
            if "language" not in name:
                continue  # rows of images: their samples are not in this order
            own = [leader.task_router.mean(0) if task < 0 else leader.task_router[task] for task in tasks]
            read = calls[site.routed.leader][0]
            gates = torch.stack([(read[row] @ router.T).softmax(-1) for row, router in enumerate(own)])
            factors = site.lora_A.values(), site.lora_B.values()
            close(y, plain_loop(x, site.base_layer(x), gates, [*site.scalings.values()], *factors))
        close(model(rows(batch, [2])).loss_per_sample, whole.loss_per_sample[2:3])
        other = model(batch_of(model, tasks=[1, 2, -1, 1])).loss_per_sample
        assert other[0] != whole.loss_per_sample[0] and torch.equal(other[1:], whole.loss_per_sample[1:])
    (whole.loss_per_sample.sum() + whole.aux["entropy"]).backward()
    assert all(bool(p.grad.flatten(1).any(1).all()) for p in model.bank.site_routers().values())
    prompt = batch_of(model, answers=None, left=True, tasks=tasks)
    cached, again = (model.generate(prompt, use_cache=use, **GREEDY) for use in (True, False))
    assert torch.equal(cached, again)
