"""The files of configs/presets: each is what its header says, on a tiny model of its base's class."""

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch

from moa.backbones.llava import Backbone
from moa.backbones.opening import open_backbone
from moa.build import build_mixture
from moa.config import ExpertConfig, RunConfig
from moa.model import MixtureModel
from scripts import presets
from tests.support.banks import fill
from tests.support.tiny import tiny_batch, tiny_llava
from tests.support.tiny_clip import collator_of, pair, save_tiny
from tests.test_model import close

NAMES = presets.names()
DEMO = [name for name in NAMES if presets.read_preset(name).over == "configs/demo.yaml"]


@cache
def backbone() -> Backbone:
    model, processor = tiny_llava(num_layers=4)
    return Backbone(model=model.requires_grad_(False), processor=processor)


@cache
def plain_logits() -> torch.Tensor:
    base = backbone()
    batch = tiny_batch(base.processor)
    given = {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        return base.model(**given).logits


def small(expert: ExpertConfig) -> ExpertConfig:
    active = 1 if expert.active_ranks is not None else None
    return dataclasses.replace(expert, rank=2, alpha=4.0, active_ranks=active)


def shrunk(config: RunConfig) -> RunConfig:
    """A config whose experts fit the tiny base."""
    return dataclasses.replace(config, experts={key: small(expert) for key, expert in config.experts.items()})


def lone_gates(model: MixtureModel) -> torch.Tensor:
    """What the kind decides where there is one expert, at some logits."""
    routing, logits = model.routing, torch.tensor([-3.0, 0.0, 2.0])[:, None, None]
    options = {**routing.options, "top_k": 1, "raised": torch.zeros_like(logits)}
    ids, weights = torch.zeros(3, dtype=torch.long), torch.ones(1)
    return routing.kind.gates(logits=logits, mask=None, expert_ids=ids, weights=weights, joint=None, **options)[0]


def learns(model: MixtureModel, config: RunConfig, loss: torch.Tensor, aux: dict[str, torch.Tensor]) -> None:
    """Every token router, and something of a router, has a gradient from the losses that the config weighs."""
    weights = dataclasses.asdict(config.losses)
    (loss + sum(weights[key] * value for key, value in aux.items())).backward()
    routers = [*(model.router.parameters() if model.router is not None else ())]
    tokens = [*model.bank.token_routers().values()]
    if config.router.row.learns == "gradient" and config.router.score != "arrow":
        assert any(p.grad is not None and bool(p.grad.any()) for p in [*routers, *tokens])
        assert all(p.grad is not None and bool(p.grad.any()) for p in tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMO)
def test_a_preset_is_a_row_of_the_page_starts_as_its_base_and_its_router_learns(name):
    whole, base = presets.config_of(name), backbone()
    assert whole.out == f"runs/{name}"
    assert presets.row(name, whole) in Path("docs/presets.md").read_text().splitlines()
    config = shrunk(whole)
    expected = plain_logits()
    model = build_mixture(config, base, {})
    try:
        batch = tiny_batch(base.processor, experts=[0, 1, 2, 3])
        with torch.no_grad():
            fresh = model.eval()(dataclasses.replace(batch, labels=None)).logits
        close(fresh[batch.attention_mask.bool()], expected[batch.attention_mask.bool()])
        fill(model.bank)
        out = model(batch)
        learns(model, config, out.loss_per_sample.sum(), out.aux)
        assert torch.equal(lone_gates(model), torch.ones(3, 1, 1))  # one expert is a plain LoRA
    finally:
        model.bank.detach(base.model)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(NAMES) - set(DEMO)))
def test_a_preset_for_a_dual_encoder_starts_as_its_base_and_its_router_learns(name, tmp_path):
    config = presets.config_of(name)
    assert presets.row(name, config) in Path("docs/presets.md").read_text().splitlines()
    base = open_backbone(str(save_tiny("clip", tmp_path / "base")))
    batch = collator_of(base)([pair(number) for number in range(4)])
    with torch.no_grad():
        expected = base.image_features(batch.pixel_values)
    model = build_mixture(shrunk(config), base, {}).eval()
    with torch.no_grad():
        assert torch.equal(model.routed_features(batch)[0], expected)
    fill(model.bank)
    out = model(batch)
    learns(model, config, out.loss_per_sample.sum(), out.aux)
    assert torch.equal(lone_gates(model), torch.ones(3, 1, 1))


def test_a_wrong_name_or_header_is_one_line(capsys, tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        presets.main(["show", "hydra"])
    assert "no preset 'hydra'; choices: " in capsys.readouterr().err
    (tmp_path / "x.yaml").write_text("# paper: X\n# done: y\nout: runs/x\n")
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"x.yaml: its first comment: done: Key 'done' not in"):
        presets.read_preset("x")


def test_a_preset_is_shown_with_its_parameters(capsys):
    presets.main(["show", "hydralora", "experts.vqa.alpha=4"])
    text = capsys.readouterr().out
    assert "experts 613,888, router 17,920 parameters" in text and "one adapter: approximate" in text
