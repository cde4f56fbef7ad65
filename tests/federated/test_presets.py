"""Settings of a federation: every shipped preset fits the demo's model, and what cannot be is named."""

import pytest
import torch

from moa.cli.settings import load, to_yaml
from moa.federated.aggregate import check_roles
from moa.federated.config import FederateConfig, FederatedConfig, make_roles, special, stages_of
from moa.federated.pieces import Names, pieces_of
from moa.routing.router import AnchorRouter, Router
from tests import ROOT

FOLDER = ROOT / "configs/federated"
SCAFFOLD = {"server": "scaffold"}
PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "demo")


def demo(*presets: str, **changes) -> FederateConfig:
    files = [FOLDER / "demo.yaml", *(FOLDER / f"{name}.yaml" for name in presets)]
    return load(FederateConfig, files, [(key.replace("__", "."), value) for key, value in changes.items()])


def shapes_of(config: FederateConfig) -> dict[str, tuple[int, ...]]:
    """Of what trains, with one site and a router of the config's evidence and experts, whose widths are small."""
    names, evidence = config.choices, tuple(config.router.evidence)
    by_token = config.router.granularity == "token"
    shared = {"experts": len(names), "evidence": evidence, "dims": {"image": 5, "text": 6}, "num_tasks": 4}
    router = AnchorRouter(**shared) if config.router.row.learns == "means" else Router(**shared, sites=1, hidden=4)
    tensors = dict(router.named_parameters()) or dict(router.named_buffers())
    tensors = {"token_router.q": torch.zeros(len(names), 7)} if by_token else tensors
    tensors = {} if config.router.row.router is None else tensors
    found = {f"router.{key}": tuple(value.shape) for key, value in tensors.items()}
    for name, expert in config.experts.items():
        if not expert.frozen:
            found[f"experts.{name}.q.lora_A.weight"] = (expert.rank or 8, 7)
            found[f"experts.{name}.q.lora_B.weight"] = (5, expert.rank or 8)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *PRESETS])
def test_a_preset_cuts_the_demos_model_and_its_rules_fit(name):
    config = demo(*([name] if name else []))
    experts = [name for name, expert in config.experts.items() if not expert.frozen]
    roles = make_roles(config.federated.roles, experts)
    names = Names(choices=tuple(config.choices), evidence=tuple(config.router.evidence))
    pieces = pieces_of(shapes_of(config), roles, names)
    check_roles(roles, pieces)
    clients = [f"client-{number}" for number in range(config.federated.partition.clients)]
    assert special(config.federated, clients).keys() == set(clients)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_what_is_local_sent_and_aggregated(name):
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    head = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    assert all(word in head for word in ("Local: ", "Sent: ", "Aggregated: "))


def test_settings_come_back_from_their_own_yaml(tmp_path):
    config = demo("flexlora")
    (tmp_path / "federated.yaml").write_text(to_yaml(config))
    assert load(FederateConfig, tmp_path / "federated.yaml") == config


def test_each_expert_that_no_other_role_names_has_a_role():
    names = [role.name for role in make_roles(demo().federated.roles, [*demo().experts])]
    each = [f"expert {name}" for name in ("vqa", "line", "caption", "grounding")]
    assert names == ["ocr expert", "router ocr", *each, "shared", "router"]


def test_rates_fall_by_a_cosine_over_rounds_from_all_of_them():
    settings = FederatedConfig(rounds=5, lr_end=0.2)
    assert [settings.rate_factor(r) for r in (1, 3, 5)] == pytest.approx([1.0, 0.6, 0.2])
    assert settings.rate_factor(1) == FederatedConfig(rounds=1, lr_end=0.2).rate_factor(1) == 1.0
    config = demo(federated__clients={"client-0": {"steps": 0.5}})
    stage = stages_of(config, 3, config.federated.clients["client-0"])["experts"]
    assert stage.steps == 4 and stage.lr.experts == pytest.approx(0.4 * 3e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"federated__participation": 0.04}, "federated.participation: 0.04 of 10 clients is none"),
        ({"federated__partition__how": "even"}, "federated.partition.alpha: is of dirichlet_"),
        ({"federated__partition__how": "by_colour"}, "federated.partition.how: must be one of"),
        ({"federated__roles": [{"name": "x", "match": ["rest"], "clients": "some"}]}, "clients: must be one of"),
        ({"federated__roles": [{"name": "x", "match": ["rest"], "of": "some"}]}, "of"),
        ({"federated__roles": [{"name": "x", "match": []}]}, "match: is empty"),
        ({"federated__groups__by": "lora_B", "federated__roles": [{"name": "x", "match": ["rest"], **SCAFFOLD}]},
         "federated.roles.x.server: scaffold reads"),
        ({"stages__experts__copy_of": "vqa"}, "stages.experts.copy_of: is of a stage in one round"),
        ({"stages__experts__init_from": "x"}, "stages.experts.init_from: has no effect in a federation"),
        ({"stages__experts__only": ["x"]}, "stages.experts.only: no expert that learns is called 'x'"),
        ({"federated__first_round": {"all": 2}}, "federated.first_round.all: no such stage; choices: experts, router"),
        ({"federated__arrives": {"new": 2}}, "federated.arrives.new: no such data source; choices: vqa, line"),
        ({"federated__last_round": {"router": 5}}, "federated.last_round.router: must be in 1..4"),
        ({"federated__first_round": {"router": 2, "experts": 3}}, "federated.first_round: round [1] has no stage"),
        ({"stages": {}}, "stages: names none"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_named(changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("[", r"\[")) as caught:
        demo(**changes)
    assert "\n" not in str(caught.value)


def test_a_role_for_each_expert_needs_one_and_another_name():
    roles = demo(federated__roles=[{"name": "x", "match": ["experts:{expert}"]}]).federated.roles
    with pytest.raises(ValueError, match="x matches {expert}, so its name must have it too"):
        make_roles(roles, ["vqa"])
    with pytest.raises(ValueError, match="no other role names: there is none"):
        make_roles(demo().federated.roles, ["ocr_vqa", "shared"])


def test_special_settings_are_of_clients_that_there_are():
    with pytest.raises(ValueError, match="federated.clients.client-x: no such client; choices: client-0"):
        special(demo(federated__clients={"client-x": {"rank": 2}}).federated, ["client-0"])


def test_the_example_of_the_docs_lies_over_the_demo_run(tmp_path):
    text = (ROOT / "docs/federated.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "mine.yaml").write_text(text)
    config = load(FederateConfig, [ROOT / "configs/demo.yaml", tmp_path / "mine.yaml"])
    assert [*config.stages] == ["joint"] and config.federated.drawn == 9
    assert [role.name for role in make_roles(config.federated.roles, ["vqa", "line"])] == [
        "expert vqa", "expert line", "router"
    ]  # fmt: skip
