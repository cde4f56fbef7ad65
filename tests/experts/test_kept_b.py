"""Stages in which B keeps its largest numbers: which, what learns, restarts, and what refuses them."""

import pytest
import torch

from moa.checkpoint import load_model
from tests.support.banks import LANGUAGE, fill, inputs, make_bank, some_gates
from tests.support.tiny import tiny_llava
from tests.support.toy import read_log, toy_config
from tests.test_train import run_killed, run_once


def of(bank, name):
    return torch.cat([bank.factor((name, site, "B")).flatten() for site in bank.experts[name].sites])


def test_the_largest_numbers_of_all_layers_stay_and_they_alone_learn():
    model, processor = tiny_llava()
    bank = make_bank(model, targets=(LANGUAGE,), vqa=2, other=2)
    fill(bank)
    before, other = of(bank, "vqa").detach().clone(), of(bank, "other").detach().clone()
    bank.keep_largest("vqa", 0.25)
    after = of(bank, "vqa").detach().clone()
    kept = sorted(range(len(before)), key=lambda place: -abs(before[place]))[: len(before) // 4]
    expected = torch.zeros_like(before)
    expected[kept] = before[kept]
    assert torch.equal(after, expected) and torch.equal(of(bank, "other"), other)
    bank.set_gates(some_gates(bank))
    model(**inputs(processor)).logits.sum().backward()
    for name, learns in (("vqa", expected != 0), ("other", torch.ones_like(expected) == 1)):
        gradient = torch.cat([bank.factor((name, site, "B")).grad.flatten() for site in bank.experts[name].sites])
        assert torch.equal(gradient != 0, learns)
    bank.keep_largest("vqa", 0.25)  # as where a run is resumed
    assert torch.equal(of(bank, "vqa"), after)
    bank.keep_largest("vqa", None)
    assert not any(buffer.numel() for buffer in model.buffers() if buffer.dtype == torch.float32 and buffer.dim() == 2)
    fresh = make_bank(tiny_llava()[0], targets=(LANGUAGE,), vqa=2)
    assert not fresh.keep_largest("vqa", 0.5) and not of(fresh, "vqa").any()


@pytest.mark.slow
def test_a_run_whose_last_stage_keeps_a_share_resumes_exactly_and_has_no_more_numbers(tmp_path, monkeypatch):
    stages = {"experts": {"steps": 2, "lr": {"experts": 0.05}},
              "late": {"trains": "experts", "steps": 3, "kept_b": 0.2, "lr": {"experts": 0.05}}}  # fmt: skip
    changes = {"stages": stages, "train__save_every": 1, "train__weight_decay": 0.1}
    whole = toy_config(tmp_path, out=str(tmp_path / "whole"), **changes)
    broken = toy_config(tmp_path, out=str(tmp_path / "broken"), **changes)
    run_once(whole)
    run_killed(broken, 4, monkeypatch)
    assert read_log(broken.out) == read_log(whole.out)
    one, other = (load_model(config.out)[0].bank for config in (whole, broken))
    for name in one.names:
        assert torch.equal(of(one, name), of(other, name))
        assert int(of(one, name).count_nonzero()) == round(0.2 * len(of(one, name)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stages": {"router": {"steps": 1, "kept_b": 0.1}}},
            "stages.router.kept_b: needs a stage that trains experts",
        ),
        ({"experts__vqa__init": "random_b"}, "stages.experts.kept_b: needs a lora_B of each expert's own"),
        ({"experts__vqa__tie_layers": [".*up_proj"]}, "not so: vqa"),
    ],
)
def test_what_cannot_keep_a_share_is_refused_by_its_key(tmp_path, changes, message):
    with pytest.raises(ValueError) as caught:
        toy_config(tmp_path, **{"stages": {"experts": {"steps": 1, "kept_b": 0.1}}, **changes})
    assert message in str(caught.value)
