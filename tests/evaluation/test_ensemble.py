"""eval.gates=ensemble: every expert answers alone, and all decode the tokens of their mean probabilities."""

from dataclasses import replace

import pytest
import torch

from moa.evaluation.predict import (
    MeanProbabilities,
    choose_gates,
    ensemble_members,
    gates_of_members,
    prompt_collator,
    respond,
)
from moa.evaluation.settings import with_eval
from moa.evaluation.sources import open_sources, score_sources
from moa.loaded import load
from moa.routing.roles import Roles
from moa.routing.routing import Routing
from tests.evaluation.test_eval import make_run
from tests.support.tiny import random_image, tiny_batch


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(make_run(tmp_path_factory.mktemp("ensemble")), device="cpu")


def test_the_mean_is_of_probabilities_and_within_a_sample_and_beam():
    scores = torch.tensor([[0.0, 0.0], [5.0, 5.0], [1.0, 2.0], [3.0, 1.0]])  # one sample, two members, two beams
    found = MeanProbabilities(2, 1)(torch.zeros(4, 1).long(), scores).exp()
    each = scores.softmax(-1)
    torch.testing.assert_close(found[0], (each[0] + each[2]) / 2)
    torch.testing.assert_close(found[1], (each[1] + each[3]) / 2)
    assert torch.equal(found[:2], found[2:])


@torch.no_grad()
def uncached(network, batch, length):
    """Greedy tokens of the mean of two full forwards at each token, of a batch of one sample."""
    stops = {network.backbone.end, network.model.generation_config.eos_token_id}
    found = []
    for _ in range(length):
        probs = [network(batch, gates[None]).logits[:, -1].softmax(-1) for gates in torch.eye(2)]
        token = (sum(probs) / 2).argmax(-1, keepdim=True)
        found.append(int(token))
        if found[-1] in stops:
            break
        ids, mask = (torch.cat(pair, 1) for pair in ((batch.input_ids, token), (batch.attention_mask, token.bool())))
        batch = replace(batch, input_ids=ids, attention_mask=mask.long())
    return found


@pytest.mark.slow
def test_the_answers_are_those_of_a_loop_of_full_forwards_without_a_cache(model):
    network = model.network
    collator = prompt_collator(network, model.config, withhold_task=False)
    sources = open_sources(model.config.data.validation.values(), model.config.data, None)
    samples = [source[index] for source in sources.values() for index in range(3)]
    responses, _ = respond(network, collator, collator(samples), "ensemble", 6, 1)
    decode = collator.processor.tokenizer.batch_decode
    expected = decode([uncached(network, collator([s]), 6) for s in samples], skip_special_tokens=True)
    assert [r.text for r in responses] == [text.strip() for text in expected]
    alone = [respond(network, collator, collator(samples), name, 6, 1)[0] for name in network.bank.names]
    assert all([r.text for r in responses] != [r.text for r in found] for found in alone)
    assert all(r.gates is None for r in responses)
    beams, _ = respond(network, collator, collator(samples), "ensemble", 6, 2)
    assert len(beams) == len(samples)


def test_shared_experts_are_on_in_every_member_and_are_none(model):
    network, before = model.network, model.network.routing
    roles = Roles(("vqa", "grounding"), ("always", "routed"))
    network.routing = Routing(kind="fixed", roles=roles)
    try:
        assert ensemble_members(network) == ["grounding"]
        found = gates_of_members(network, tiny_batch(network.backbone.processor), ["grounding"])["gates"]
        network.routing = Routing(kind="fixed", roles=Roles(roles.experts, ("always", "always")))
        with pytest.raises(ValueError, match="gates=ensemble: no expert is routed"):
            ensemble_members(network)
    finally:
        network.routing = before
    assert found[:, 0].tolist() == [[1, 1]] * 4


@pytest.mark.slow
def test_the_evaluation_and_one_question_take_the_ensemble_and_nothing_else_does(model):
    (result,) = score_sources(model.network, with_eval(model.config, only=["vqa"], gates="ensemble"))
    assert len(result.responses) == 4
    (found,) = model.ask_all([(random_image(0), "what?")], "vqa", gates="ensemble")
    assert found.gates is None
    collator = prompt_collator(model.network, model.config, withhold_task=True)
    with pytest.raises(ValueError, match="gates=ensemble: averages"):
        choose_gates(model.network, collator([result.responses[0].sample]), "ensemble")
