import dataclasses

import pytest
import torch

from moa.routing.clusters import k_means
from moa.routing.router import EVIDENCE, AnchorRouter, ClusterRouter, Evidence, Router, described

DIMS = {"image": 6, "text": 5}
PADDED = {
    "image": ("image_tokens", "image_mask"),
    "text": ("text_tokens", "text_mask"),
    "ocr": ("ocr_tokens", "ocr_boxes", "ocr_confidence", "ocr_mask"),
}


def make_evidence(batch: int = 4, seed: int = 0) -> Evidence:
    """Every sample has every kind; the padding is at the end."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    lengths = torch.arange(batch) % 3 + 1
    mask = torch.arange(3)[None] < lengths[:, None]
    return Evidence(
        image_tokens=normal(batch, 4, 6),
        image_mask=torch.ones(batch, 4, dtype=torch.bool),
        text_tokens=normal(batch, 3, 5),
        text_mask=mask,
        ocr_tokens=normal(batch, 3, 5),
        ocr_boxes=torch.rand(batch, 3, 4, generator=generator),
        ocr_confidence=torch.rand(batch, 3, generator=generator),
        ocr_mask=mask,
        task_ids=torch.arange(batch) % 3,
    )


def make_router(**changes) -> Router:
    torch.manual_seed(0)
    options = {"experts": 3, "sites": 5, "dims": DIMS, "num_tasks": 3, "hidden": 8}
    router = Router(**{**options, **changes})
    torch.nn.init.normal_(router.head[-1].weight)  # gates that visibly differ
    return router.eval()


def change(evidence: Evidence, kind: str) -> Evidence:
    """Other evidence of one kind."""
    if kind == "task":
        return dataclasses.replace(evidence, task_ids=(evidence.task_ids + 1) % 3)
    name = f"{kind}_tokens"
    return dataclasses.replace(evidence, **{name: getattr(make_evidence(4, seed=9), name)})


def without(evidence: Evidence, kind: str) -> Evidence:
    if kind == "task":
        return dataclasses.replace(evidence, task_ids=torch.full_like(evidence.task_ids, -1))
    name = f"{kind}_mask"
    return dataclasses.replace(evidence, **{name: torch.zeros_like(getattr(evidence, name))})


def rows(evidence: Evidence, index: list[int]) -> Evidence:
    pairs = ((f.name, getattr(evidence, f.name)) for f in dataclasses.fields(evidence))
    return Evidence(**{name: value[index] for name, value in pairs})


ROUTERS = {
    "attention": lambda: make_router(),
    "mean": lambda: make_router(pooling="mean"),
    "per site": lambda: make_router(per_site=True),
    "anchors": lambda: filled_anchors(),
}


def filled_anchors(**changes) -> AnchorRouter:
    router = AnchorRouter(**{"experts": 3, "dims": DIMS, "num_tasks": 3, **changes})
    router.update(make_evidence(9, seed=5), torch.arange(9) % 3)
    return router


def test_an_expert_without_samples_so_far_takes_no_share_from_those_that_have_some():
    evidence, router = make_evidence(6), AnchorRouter(experts=3, dims=DIMS, num_tasks=3)
    assert not router(evidence).any()  # nobody has any: all alike
    router.update(make_evidence(4, seed=5), torch.tensor([1, 1, 1, 1]))
    assert router(evidence)[:, 0].softmax(-1).equal(torch.tensor([0.0, 1, 0]).expand(6, -1))
    router.update(make_evidence(4, seed=6), torch.tensor([2, 2, 2, 2]))
    gates = router(evidence, withhold=EVIDENCE)[:, 0].softmax(-1)  # samples without any evidence
    assert gates.equal(torch.tensor([0.0, 0.5, 0.5]).expand(6, -1))


@pytest.mark.parametrize("name", ROUTERS)
def test_splitting_or_permuting_a_batch_never_changes_a_samples_logits(name):
    router, evidence = ROUTERS[name](), make_evidence(6)
    whole = router(evidence)
    order = [3, 0, 5, 1, 4, 2]
    torch.testing.assert_close(router(rows(evidence, order)), whole[order])
    for i in range(6):
        torch.testing.assert_close(router(rows(evidence, [i])), whole[i : i + 1])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ROUTERS)
def test_padding_and_what_stands_in_it_never_change_the_logits(name, side):
    router, evidence = ROUTERS[name](), make_evidence()
    padded = {}
    for kind, names in PADDED.items():
        for field in names:
            value = getattr(evidence, field)
            noise = torch.full((4, 2, *value.shape[2:]), 7).to(value.dtype)
            if field == f"{kind}_mask":
                noise = torch.zeros(4, 2, dtype=torch.bool)
            padded[field] = torch.cat([value, noise] if side == "right" else [noise, value], dim=1)
    torch.testing.assert_close(router(dataclasses.replace(evidence, **padded)), router(evidence), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", EVIDENCE)
@pytest.mark.parametrize("name", ROUTERS)
def test_each_kind_of_evidence_counts_where_it_is_on_and_is_never_read_where_it_is_off(name, kind):
    evidence = make_evidence()
    on = ROUTERS[name]()
    assert not torch.allclose(on(evidence), on(change(evidence, kind)))
    others = [k for k in EVIDENCE if k != kind]
    off = (filled_anchors if name == "anchors" else make_router)(evidence=others)
    assert off(evidence).equal(off(change(evidence, kind)))
    absent = {f.name: None for f in dataclasses.fields(Evidence) if f.name.startswith(kind)}
    assert off(dataclasses.replace(evidence, **absent)).equal(off(evidence))


@pytest.mark.parametrize("kind", EVIDENCE)
@pytest.mark.parametrize("name", ROUTERS)
def test_missing_and_withheld_evidence_are_the_same_and_decide_nothing(name, kind):
    router, evidence = ROUTERS[name](), make_evidence()
    gone = router(without(evidence, kind))
    assert gone.equal(router(evidence, withhold=(kind,)))
    assert gone.equal(router(without(change(evidence, kind), kind)))
    assert not torch.allclose(gone, router(evidence))


def test_evidence_that_only_one_sample_lacks_leaves_the_others_alone():
    router, evidence = make_router(), make_evidence()
    mask = evidence.ocr_mask.clone()
    mask[2] = False
    partly = router(dataclasses.replace(evidence, ocr_mask=mask))
    whole = router(evidence)
    assert partly[[0, 1, 3]].equal(whole[[0, 1, 3]])
    assert not partly[2].equal(whole[2])


def test_a_batch_without_any_ocr_word_is_no_special_case():
    router, evidence = make_router(), make_evidence()
    empty = {name: getattr(evidence, name)[:, :0] for name in PADDED["ocr"]}
    torch.testing.assert_close(router(dataclasses.replace(evidence, **empty)), router(without(evidence, "ocr")))


def test_word_order_reaches_the_router():
    router, evidence = make_router(evidence=("text",)), make_evidence(3)
    turned = evidence.text_tokens.flip(1)
    assert not torch.allclose(router(evidence)[2], router(dataclasses.replace(evidence, text_tokens=turned))[2])


def test_the_places_of_ocr_words_reach_the_router():
    router, evidence = make_router(evidence=("ocr",)), make_evidence()
    moved = dataclasses.replace(evidence, ocr_boxes=1 - evidence.ocr_boxes)
    unsure = dataclasses.replace(evidence, ocr_confidence=evidence.ocr_confidence / 2)
    assert not torch.allclose(router(evidence), router(moved))
    assert not torch.allclose(router(evidence), router(unsure))


def test_an_ocr_word_has_its_corners_its_size_and_its_confidence():
    router, seen = make_router(evidence=("ocr",)), []
    router.encoders["ocr"].place.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    boxes = torch.tensor([[[0.1, 0.2, 0.5, 0.8]]])
    router(Evidence(ocr_tokens=torch.ones(1, 1, 5), ocr_boxes=boxes, ocr_confidence=torch.full((1, 1), 0.9),
                    ocr_mask=torch.ones(1, 1, dtype=torch.bool)))  # fmt: skip
    torch.testing.assert_close(seen[0], torch.tensor([[[0.1, 0.2, 0.5, 0.8, 0.4, 0.6, 0.9]]]))


def test_anchors_take_the_mean_over_the_kinds_that_a_sample_has_times_the_sharpness():
    evidence = make_evidence()
    both, text, task = (filled_anchors(evidence=kinds)(evidence) for kinds in (("text", "task"), ("text",), ("task",)))
    torch.testing.assert_close(both, (text + task) / 2)
    lacking = without(evidence, "task")
    torch.testing.assert_close(filled_anchors(evidence=("text", "task"))(lacking), text)
    torch.testing.assert_close(filled_anchors(evidence=("text",), sharpness=20)(evidence), 2 * text)


@pytest.mark.parametrize("name", ROUTERS)
def test_how_often_a_sample_shows_a_thing_does_not_matter(name):
    """Means and attention, never sums; the words of a question have neighbours, and so another meaning twice."""
    evidence, router = make_evidence(), ROUTERS[name]()
    kinds = [kind for kind in PADDED if kind != "text" or name == "anchors"]
    tokens = {field: getattr(evidence, field) for kind in kinds for field in PADDED[kind]}
    twice = {field: torch.cat([value, value], 1) for field, value in tokens.items()}
    again = dataclasses.replace(evidence, **twice)
    torch.testing.assert_close(router(again), router(evidence), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["attention", "mean", "per site"])
def test_every_parameter_of_the_router_gets_a_gradient(name):
    router, evidence = ROUTERS[name](), make_evidence()
    mask = torch.tensor([True, True, True, False])  # one sample lacks everything
    evidence = dataclasses.replace(
        evidence,
        task_ids=torch.where(mask, evidence.task_ids, -1),
        **{f"{k}_mask": getattr(evidence, f"{k}_mask") & mask[:, None] for k in PADDED},
    )
    router(evidence).square().sum().backward()
    for parameter_name, parameter in router.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


def test_evidence_that_no_sample_has_gives_finite_gradients():
    router, evidence = make_router(), make_evidence()
    for kind in EVIDENCE:
        evidence = without(evidence, kind)
    router(evidence).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in router.parameters())


def test_a_per_site_offset_starts_at_zero_and_belongs_to_its_site():
    router, shared, evidence = make_router(per_site=True), make_router(), make_evidence()
    assert router(evidence).shape == (4, 5, 3)
    torch.testing.assert_close(router(evidence), shared(evidence).expand(4, 5, 3))
    router.site_offset.data[2] += 1
    torch.testing.assert_close(router(evidence)[:, 2], shared(evidence)[:, 0] + 1)
    torch.testing.assert_close(router(evidence)[:, 1], shared(evidence)[:, 0])


def test_modalities_are_dropped_in_training_only_and_at_the_chance_asked_for():
    evidence = make_evidence(4000)
    router = make_router(evidence=("task",), modality_dropout=0.3)
    kept, missing = router(evidence), router(without(evidence, "task"))
    assert router(evidence).equal(kept)
    router.train()
    torch.manual_seed(0)
    dropped = router(evidence).eq(missing).flatten(1).all(1)
    assert not dropped.eq(kept.eq(missing).flatten(1).all(1)).all()
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.03)
    torch.manual_seed(0)
    assert router(evidence).eq(missing).flatten(1).all(1).equal(dropped)


def test_a_fresh_router_is_nearly_undecided():
    torch.manual_seed(0)
    router = Router(experts=3, sites=5, dims=DIMS, num_tasks=3)
    assert router(make_evidence()).softmax(-1).amax() < 0.5


def test_the_router_computes_in_float32_under_autocast_and_after_a_cast():
    router, evidence = make_router(), make_evidence()
    expected = router(evidence)
    with torch.autocast("cpu", torch.bfloat16):
        assert router(evidence).equal(expected)
    router.to(torch.bfloat16)
    assert router(evidence).equal(expected)
    half = {
        f.name: value.bfloat16() if value.is_floating_point() else value
        for f in dataclasses.fields(evidence)
        if (value := getattr(evidence, f.name)) is not None
    }
    assert router(Evidence(**half)).dtype == torch.float32


def test_the_state_of_a_router_brings_its_logits_back():
    for make, other in (
        (make_router, Router(experts=3, sites=5, dims=DIMS, num_tasks=3, hidden=8).eval()),
        (filled_anchors, AnchorRouter(experts=3, dims=DIMS, num_tasks=3)),
    ):
        router = make()
        assert not other(make_evidence()).equal(router(make_evidence()))
        other.load_state_dict(router.state_dict())
        assert other(make_evidence()).equal(router(make_evidence()))


def test_anchors_of_two_processes_add_up_to_those_of_one():
    evidence, ids = make_evidence(6), torch.tensor([0, 1, 2, 2, 1, -1])
    whole, parts = (AnchorRouter(experts=3, dims=DIMS, num_tasks=3) for _ in range(2))
    whole.update(evidence, ids)
    parts.update(rows(evidence, [0, 1, 2]), ids[:3])
    parts.update(rows(evidence, [3, 4, 5]), ids[3:])
    for a, b in zip(whole.buffers(), parts.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert not list(whole.parameters())


def test_anchors_find_the_expert_of_new_samples_by_any_kind_of_evidence():
    for kind in ("image", "text", "ocr", "task"):
        torch.manual_seed(1)
        width = DIMS["image" if kind == "image" else "text"]
        means, ids = 3 * torch.randn(3, width), torch.arange(12) % 3
        evidence = make_evidence(12)
        if kind == "task":
            evidence = dataclasses.replace(evidence, task_ids=ids)
        else:
            tokens = getattr(evidence, f"{kind}_tokens") * 0.3 + means[ids][:, None]
            evidence = dataclasses.replace(evidence, **{f"{kind}_tokens": tokens})
        router = AnchorRouter(experts=3, evidence=(kind,), dims=DIMS, num_tasks=3)
        router.update(rows(evidence, list(range(6))), ids[:6])
        found = router(rows(evidence, list(range(6, 12))))[:, 0]
        assert found.argmax(-1).equal(ids[6:])
        assert (found.amax(-1) > 0.5 * router.sharpness).all()  # and not for want of evidence


def test_a_prior_of_the_task_is_added_to_the_logits_and_to_none_of_an_unknown_or_hidden_task():
    torch.manual_seed(0)
    router = Router(experts=3, sites=1, evidence=("task",), dims={}, num_tasks=2, hidden=8, task_prior=True).eval()
    evidence = Evidence(task_ids=torch.tensor([0, 1, -1]))
    before = router(evidence)[:, 0]
    torch.nn.init.normal_(router.prior)
    added = torch.stack([router.prior[0], router.prior[1], torch.zeros(3)])
    torch.testing.assert_close(router(evidence)[:, 0], before + added)
    hidden = router(evidence, withhold=("task",))
    torch.testing.assert_close(hidden, hidden[2:].expand_as(hidden))
    router(evidence)[0].sum().backward()
    assert torch.equal(router.prior.grad, torch.tensor([[1.0, 1, 1], [0, 0, 0]]))


def test_clusters_of_apart_evidence_are_found_and_each_has_its_row_of_logits():
    torch.manual_seed(0)
    middles = torch.eye(5)[:3] * 4
    tokens = (middles.repeat_interleave(10, 0) + 0.1 * torch.randn(30, 5))[:, None]
    evidence = Evidence(text_tokens=tokens, text_mask=torch.ones(30, 1, dtype=torch.bool))
    features, present = described(evidence, ["text"], 0)
    centres, sizes = k_means([features[:12], features[12:]], 3, 4, 0)
    assert present.all() and sizes == [10, 10, 10]
    torch.testing.assert_close(centres.norm(dim=-1), torch.ones(3), atol=0.02, rtol=0)
    router = ClusterRouter(experts=2, sites=4, evidence=("text",), centres=centres, per_site=True)
    torch.nn.init.normal_(router.cluster_table)
    logits = router(evidence)
    found = [router.cluster_table.flatten(2).eq(row[:, None]).all(0).all(-1).nonzero().item() for row in logits]
    assert all(len({*found[start : start + 10]}) == 1 for start in (0, 10, 20)) and len({*found}) == 3
    torch.testing.assert_close(router(evidence, withhold=("text",)), torch.zeros(30, 4, 2))
    with pytest.raises(ValueError, match="31 clusters of 30 different samples"):
        k_means([features], 31, 1, 0)
