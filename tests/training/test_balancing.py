"""Balance without a loss: the bias of top-k follows the loads of all processes, and is part of a checkpoint."""

import pytest
import torch

from moa.checkpoint import load_model
from moa.parts import router_state
from moa.training.step import update_biases
from tests.support.toy import read_log, toy_config
from tests.test_model import batch_of, make_model
from tests.test_train import run_killed, run_once

ROUTER = {"kind": "top_k", "top_k": 1, "granularity": "token", "share": "module", "bias_rate": 0.25}


def biased(**settings):
    model = make_model("top_k", granularity="token", top_k=1, bias_rate=0.25, **settings)
    for site in model.bank.sites.values():
        site.token_router = None
    model.bank.add_token_routers(std=1.0, biased=True)
    return model


@pytest.mark.slow
def test_the_loads_of_all_processes_move_each_sites_bias_and_the_gates_that_are_read_have_it():
    model = biased().train()
    out = model(batch_of(model))
    tokens = batch_of(model).attention_mask.sum().item()
    text = [site for site, stream in model.bank.streams.items() if stream == "text"]
    assert set(out.loads) == set(model.bank.token_biases)
    assert all(out.loads[site].sum().item() == tokens for site in text)  # padding is not counted, k is 1
    other = {site: torch.tensor([1000.0, 0.0, 0.0]) for site in out.loads}  # of another process
    add = torch.cat([*other.values()])
    update_biases(model, out.loads, lambda own: own + add)
    assert all(bias.tolist() == [-0.25, 0.25, 0.25] for bias in model.bank.token_biases.values())
    state = router_state(model)
    for bias in model.bank.token_biases.values():
        bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
    assert sum(key.startswith("token_bias.") and state[key][1] == 9 for key in state) == len(out.loads)
    assert model.eval()(batch_of(model)).gates.eq(torch.tensor([0.0, 1.0, 0.0])).all()


@pytest.mark.slow
def test_a_run_with_biases_resumes_exactly(tmp_path, monkeypatch):
    changes = {"router": ROUTER, "losses": {"guidance": 0.0, "guidance_end": 0.0}, "train__save_every": 1}
    changes["stages"] = {"experts": {"steps": 1}, "joint": {"steps": 3}}
    whole = toy_config(tmp_path, out=str(tmp_path / "whole"), **changes)
    broken = toy_config(tmp_path, out=str(tmp_path / "broken"), **changes)
    run_once(whole)
    run_killed(broken, 3, monkeypatch)
    assert read_log(broken.out) == read_log(whole.out)
    one, other = (load_model(f"{run.out}/checkpoints/step-000004")[0].bank.token_biases for run in (whole, broken))
    assert one and all(bias.abs().sum() > 0 and bias.equal(other[site]) for site, bias in one.items())
