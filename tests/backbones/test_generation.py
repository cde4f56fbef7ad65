"""Generation with the routed mixture: gates decided once, any cache, one projection for q, k and v."""

import pytest
import torch

from moa.experts.bank import ExpertBank
from moa.model import LanguageMixture, MixtureModel
from moa.routing.router import Router
from tests.support.tiny import tiny_batch, tiny_llava

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def world() -> tuple[MixtureModel, object]:
    """A routed model whose samples have gates of their own."""
    from moa.backbones.llava import Backbone

    model, processor = tiny_llava()
    backbone = Backbone(model=model.requires_grad_(False), processor=processor)
    bank = ExpertBank.attach(model, [r"model\.language_model\..*_proj"], stream_of=backbone.stream_of)
    generator = torch.Generator().manual_seed(1)
    for name, rank in (("one", 2), ("two", 3)):
        bank.add(name, rank=rank, alpha=4)
    for parameter in bank.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    torch.manual_seed(0)
    router = Router(experts=2, sites=len(bank.sites), dims=backbone.dims, num_tasks=3, hidden=8)
    torch.nn.init.normal_(router.head[-1].weight)
    return LanguageMixture(backbone, bank, router).eval(), processor


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_the_router_decides_once_for_a_whole_generation(world, options):
    model, processor = world
    calls: list[int] = []
    hook = model.router.register_forward_hook(lambda *_: calls.append(1))
    model.generate(tiny_batch(processor, answers=None, left=True), **GREEDY, **options)
    hook.remove()
    assert len(calls) == 1


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}])
def test_every_cache_gives_the_tokens_of_the_growing_one(world, options):
    model, processor = world
    batch = tiny_batch(processor, answers=None, left=True, pad=3)
    usual = model.generate(batch, **GREEDY)
    assert torch.equal(model.generate(batch, **GREEDY, **options), usual)


@pytest.mark.parametrize("count", [1, 4])
def test_a_batch_of_any_size_is_decoded_as_its_samples_are(world, count):
    model, processor = world
    questions, answers = ("what is this?", "where?", "read", "a cat"), None
    whole = tiny_batch(processor, questions=questions[:count], answers=answers, left=True)
    together = model.generate(whole, **GREEDY)
    for i in range(count):
        alone = tiny_batch(
            processor, questions=questions[i : i + 1], answers=answers, images=[i], left=True,
            words=(((), ("stop",), ("exit", "here"), ())[i],), tasks=[i % 3],
        )  # fmt: skip
        assert torch.equal(model.generate(alone, **GREEDY)[0], together[i])


def test_kept_projections_follow_the_factors(world):
    model, processor = world
    batch = tiny_batch(processor, answers=None, left=True)
    before = model.generate(batch, **GREEDY)
    state = {key: tensor.clone() for key, tensor in model.bank.state("one").items()}
    with torch.no_grad():
        model.backbone.hidden_states(batch, model.backbone.features(batch))
    model.bank.load_states({"one": {key: -3 * tensor for key, tensor in state.items()}})
    changed = model.backbone.generate(batch, model.backbone.features(batch), **GREEDY)
    assert not torch.equal(changed, before)
    model.bank.load_states({"one": state})
    assert torch.equal(model.generate(batch, **GREEDY), before)
