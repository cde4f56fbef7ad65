"""The files of configs/presets: each is what its header says, on a tiny model of its base's class."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from data.pairs import only_images
from moa.backbones.llava import Backbone
from moa.backbones.opening import open_backbone
from moa.build import build_mixture, only_adapters
from moa.cli.settings import load
from moa.cli.strict_yaml import read_yaml
from moa.config import RunConfig
from moa.experts.lora import ExpertLinear
from moa.model import MixtureModel
from moa.sections import ExpertConfig, LossConfig, RouterConfig
from scripts import presets
from scripts.demo.board.plan import read_board
from tests.support.banks import fill
from tests.support.tiny import tiny_batch, tiny_llava
from tests.support.tiny_clip import collator_of, pair, save_tiny
from tests.test_model import close

NAMES = presets.names()
DEMO = [name for name in NAMES if presets.read_preset(name).over == "configs/demo.yaml"]

SCORES, PAGE = presets.read_scores(), "python -m scripts.presets page writes it anew"

# Another value than the default for every setting; those of STAYS belong to the run, and a preset keeps them.
OTHER = {
    "router": {
        "kind": "sigmoid", "granularity": "token", "score": "cosine", "share": "block", "pool": "vote", "top_k": 5,
        "evidence": ["image", "text"], "null_expert": True, "temperature": 0.3, "hidden": 16, "pooling": "mean",
        "per_site": True, "task_prior": True, "modality_dropout": 0.2, "weights": {"vqa": 0.5}, "top_p": 0.5,
        "threshold": 0.1,
        "normalize": True, "renormalize": False, "noise": "gaussian", "bias_rate": 0.1, "root_gradient": True,
        "added_up": ["x"], "per_task": True, "noise_scale": 2.0, "straight_through": True, "clusters": "x",
        "unknown_task": "mean",
    },
    "losses": {
        **{field.name: 0.3 for field in dataclasses.fields(LossConfig)},
        "reduction": "token", "crosstalk_exclude": ["x"], "pairs": "classification", "negatives": "source",
    },
}  # fmt: skip
STAYS = {
    "router": ("evidence", "hidden", "pooling", "modality_dropout"),
    "losses": ("reduction", "pairs", "negatives"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sections:
    """What a preset decides alone, without the rules between it and the rest of a run."""

    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    losses: LossConfig = dataclasses.field(default_factory=LossConfig)


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
    return dataclasses.replace(expert, rank=2, alpha=expert.alpha and 4.0, active_ranks=active)


preset_config = cache(presets.config_of)


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
    tokens = [p for key, p in model.bank.site_routers().items() if not key.startswith(("token_noise", "depth"))]
    if config.router.row.learns == "gradient" and config.router.score != "arrow":
        assert any(p.grad is not None and bool(p.grad.any()) for p in [*routers, *tokens])
        assert all(p.grad is not None and bool(p.grad.any()) for p in tokens)


# What each paper's router decides, in loops over experts ------------------------------------------------


def softmax(z: list[float]) -> list[float]:
    return [math.exp(v) / sum(map(math.exp, z)) for v in z]


def best(z: list[float], k: int, extra: Sequence[int] = ()) -> list[float]:
    """The softmax over the k largest, and those in `extra`, which take no place."""
    rivals = sorted(set(range(len(z))) - set(extra), key=lambda e: -z[e])
    kept = [*rivals[:k], *extra]
    shares = dict(zip(kept, softmax([z[e] for e in kept]), strict=True))
    return [shares.get(e, 0.0) for e in range(len(z))]


def switch(z: list[float]) -> list[float]:
    """The best one at its share of the softmax."""
    return [share if share == max(softmax(z)) else 0.0 for share in softmax(z)]


def adamole(z: list[float]) -> list[float]:
    *own, raised = z
    level = 1 / (1 + math.exp(-raised)) / len(own)
    above = [max(0.0, share - level) for share in softmax(own)]
    return [value / sum(above) for value in above]


def skills(z: list[float]) -> list[float]:
    chances = [1 / (1 + math.exp(-v)) for v in z]
    return [chance / sum(chances) for chance in chances]


def dot(site: ExpertLinear, x: torch.Tensor) -> list[float]:
    return [float(row.double() @ x) for row in site.token_router]


def layer_normed(site: ExpertLinear, x: torch.Tensor) -> list[float]:
    def norm(v: torch.Tensor) -> torch.Tensor:
        return (v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt()

    return [float(norm(row.double()) @ norm(x)) / len(x) ** 0.5 for row in site.token_router]


def answered(site: ExpertLinear, x: torch.Tensor) -> list[float]:
    updates = (b.double() @ a.double() for a, b in map(site.whole, site.experts))
    return [abs(float(torch.linalg.svd(update).Vh[0] @ x)) for update in updates]


BY_TOKEN = {
    **dict.fromkeys(("hydralora", "asymlora", "r_lora", "coin_moelora", "loramoe", "pilot_ct_moa"), (dot, softmax)),
    **dict.fromkeys(("mixlora", "mola", "goat", "shared_expert"), (dot, lambda z: best(z, 2))),
    "moelora_riemannian": (dot, lambda z: best(z, 2)),
    "llava_mole": (dot, lambda z: best(z, 1)),
    "ase": (dot, lambda z: best(z, 2, [len(z) - 1])),
    "adamole": (dot, adamole),
    "hetero_moa": (dot, lambda z: [share if share > 0.25 else 0.0 for share in (1 / (1 + math.exp(-v)) for v in z)]),
    "phatgoose": (layer_normed, lambda z: best(z, 2)),
    "arrow": (answered, lambda z: best(z, 3)),
}
BY_SAMPLE = {
    **dict.fromkeys(("moelora_peft", "cgc_lora", "mtl_lora", "xlora"), softmax),
    **dict.fromkeys(("mm_prompt", "dm_adapter", "moe_adapters4cl"), lambda z: best(z, 2)),
    **dict.fromkeys(("mocle", "dg_moa"), switch),
    "poly": skills,
}


def check_tokens(name: str, model: MixtureModel, calls: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Two tokens at every third site: W x + sum_e gate_e scaling_e B_e A_e x, with the paper's gates; shared ones 1."""
    logits, rule = BY_TOKEN[name]
    bank, roles = model.bank, model.routing.roles
    chosen = [bank.names[place] for place in roles.choices]
    for path, (x, out) in [*calls.items()][::3]:
        site = bank.sites[path]
        if site.kind != "lora":
            continue  # tests/experts/test_adapter.py
        leader = site.routed.leader
        own = [expert for expert in chosen if expert in site.scalings]
        for place in (0, -1):
            token, read = (t.flatten(0, -2)[place].double() for t in (x, calls[leader][0]))
            gates = dict(zip(own, rule(logits(bank.sites[leader], read)), strict=True)) if own else {}
            expected = site.base_layer(token.float()).double()
            for expert, scaling in site.scalings.items():
                a, b = (factor.double() for factor in site.whole(expert))
                expected = expected + gates.get(expert, 1.0) * scaling * (b @ (a @ token))
            torch.testing.assert_close(out.flatten(0, -2)[place].double(), expected, atol=1e-5, rtol=1e-4)


def check_samples(name: str, model: MixtureModel, gates: torch.Tensor, logits: torch.Tensor) -> None:
    """The choices have the paper's gates, and the universal expert of MoCLE what is left."""
    choices, roles = list(model.routing.roles.choices), model.routing.roles.gates
    for found, row in zip(gates.flatten(0, 1).tolist(), logits.double().flatten(0, 1).tolist(), strict=True):
        expected = BY_SAMPLE[name](row)
        assert [found[place] for place in choices] == pytest.approx(expected, abs=1e-6)
        rest = [found[place] for place, gate in enumerate(roles) if gate == "rest"]
        assert rest == pytest.approx([1 - sum(expected)] * len(rest), abs=1e-6)


# The files -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMO)
def test_a_preset_is_a_row_of_the_page_starts_as_its_base_and_its_router_learns(name):
    whole, base = preset_config(name), backbone()
    assert whole.out == f"runs/{name}"
    assert presets.row(name, whole, SCORES) in Path("docs/presets.md").read_text().splitlines(), PAGE
    assert read_board("presets").presets[name] == presets.exportable(whole).split()[0]
    config = shrunk(whole)
    expected = plain_logits()
    model = build_mixture(config, base, {})
    try:
        batch = tiny_batch(base.processor, experts=[0, 1, 2, 3])
        with torch.no_grad():
            fresh = model.eval()(dataclasses.replace(batch, labels=None)).logits
        close(fresh[batch.attention_mask.bool()], expected[batch.attention_mask.bool()])
        fill(model.bank)
        calls = dict[str, tuple[torch.Tensor, torch.Tensor]]()
        for path, site in model.bank.sites.items():
            site.register_forward_hook(lambda m, args, out, path=path: calls.update({path: ((*args, None)[0], out)}))
        if model.router is not None and hasattr(model.router, "table"):
            torch.nn.init.normal_(model.router.table)
        out = model(batch)
        learns(model, config, out.loss_per_sample.sum(), out.aux)
        with torch.no_grad():
            if name in BY_TOKEN:
                check_tokens(name, model, calls)
            elif name in BY_SAMPLE:
                check_samples(name, model, out.gates, out.router_logits)
        if config.router.kind != "sigmoid" or config.router.normalize:  # one expert is a plain LoRA
            assert torch.equal(lone_gates(model), torch.ones(3, 1, 1))
    finally:
        model.bank.detach(base.model)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(NAMES) - set(DEMO)))
def test_a_preset_for_a_dual_encoder_starts_as_its_base_and_its_router_learns(name, tmp_path):
    config = preset_config(name)
    assert presets.row(name, config, SCORES) in Path("docs/presets.md").read_text().splitlines(), PAGE
    assert read_board("presets_clip").presets[name] == presets.exportable(config).split()[0]
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
    with torch.no_grad():
        decided = model.compute_gates(only_images(batch))
        check_samples(name, model, decided.gates, decided.logits)
    assert torch.equal(lone_gates(model), torch.ones(3, 1, 1))


@pytest.mark.parametrize("name", ["dg_moa", "pilot_ct_moa"])
def test_a_merge_answers_in_place_of_a_preset_whose_losses_need_its_router(name):
    config = presets.config_of(name, overrides=only_adapters({"merged": "x"}))
    assert config.router.kind == "fixed" and config.losses == LossConfig()


def test_router_and_losses_are_those_of_the_preset_alone_over_a_run_that_has_set_every_one_otherwise(tmp_path):
    plain, run, file = dataclasses.asdict(Sections()), tmp_path / "run.yaml", tmp_path / "preset.yaml"
    for key, other in OTHER.items():
        assert other.keys() == plain[key].keys() and all(plain[key][name] != other[name] for name in other)
    run.write_text(yaml.safe_dump(OTHER))
    for name in NAMES:
        own = {key: read_yaml(presets.path_of(name))[key] for key in OTHER}
        file.write_text(yaml.safe_dump(own))
        found = dataclasses.asdict(load(Sections, [run, file]))
        for key, given in own.items():
            assert given.pop("*") == "default", name
            assert found[key] == {**plain[key], **{kept: OTHER[key][kept] for kept in STAYS[key]}, **given}, name


def test_resume_and_overwrite_reach_train_py_and_have_no_effect_elsewhere(capsys, monkeypatch):
    commands = []
    done = subprocess.CompletedProcess([], 7)
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command) or done)
    for flag in ("--resume", "--overwrite"):
        with pytest.raises(SystemExit) as ended:
            presets.main(["run", "hydralora", flag, "train.batch_size=16"])
        assert ended.value.code == 7
        assert commands[-1][0] == sys.executable and commands[-1][-2:] == ["train.batch_size=16", flag]
    with pytest.raises(SystemExit):
        presets.main(["show", "hydralora", "--resume"])
    assert "--resume: has no effect with show" in capsys.readouterr().err


def test_a_wrong_name_or_header_is_one_line(capsys, tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        presets.main(["show", "hydra"])
    assert "no preset 'hydra'; choices: " in capsys.readouterr().err
    (tmp_path / "x.yaml").write_text("# paper: X\n# done: y\nout: runs/x\n")
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"x.yaml: its first comment: done: Key 'done' not in"):
        presets.read_preset("x")


def test_the_page_has_the_scores_of_the_boards_once_there_are_some(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "names", lambda: ["lori", "shira"])
    page = "# Presets\n\n| preset | paper |\n|---|---|\n| old | row |\n\nafter\n"
    plain = presets.page_of(page, presets.read_scores(tmp_path))
    head, _, lori, shira = plain.splitlines()[2:6]
    assert head == "| preset | paper | what it does | export | what differs |"
    assert lori.startswith("| [`lori`](../configs/presets/lori.yaml) | LoRI-D") and plain.endswith("|\n\nafter\n")
    rows = {
        "lori": {"means": {"trained": {"difference": 71.25}, "kept": {"difference": 90.0}}},
        "lori@merged": {"means": {"trained": {"difference": 70.04}}},
        "one_lora": {"means": {}},
    }
    (tmp_path / "presets.json").write_text(json.dumps({"rows": rows}))
    scored = presets.page_of(plain, presets.read_scores(tmp_path)).splitlines()
    assert scored[2] == "| preset | paper | what it does | export | trained | kept | merged | what differs |"
    assert " | exact | 71.2 | 90.0 | 70.0 | LoRI-D, with whole B." in scored[4]
    assert " | refused |  |  |  | The masks are random" in scored[5] and len(scored) == len(plain.splitlines())


def test_a_preset_is_shown_with_its_parameters(capsys):
    presets.main(["show", "hydralora", "experts.vqa.alpha=4"])
    text = capsys.readouterr().out
    assert "experts 613,888, router 17,920 parameters" in text and "one adapter: approximate" in text
