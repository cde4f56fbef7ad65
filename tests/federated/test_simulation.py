"""A federation in one process: what it equals, what it leaves as it was, and that it survives a kill at any moment."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

import federate as federate_script
from data.checks import BadSampleError
from moa.checkpoint import load_model
from moa.cli.settings import load
from moa.federated import simulate, start
from moa.federated.client import receive, tensors_of
from moa.federated.config import FederateConfig, FederatedConfig, PartitionConfig
from moa.federated.groups import Groups
from moa.federated.matrix import forgotten, summary
from moa.federated.simulate import Federation, draw_clients, federate
from moa.federated.start import check_plans, open_federation
from moa.federated.store import incoming, load_state
from moa.training import run as run_module
from moa.training.setup import make_accelerator
from moa.training.step import train_step
from tests import ROOT
from tests.support.toy import read_log, toy_world
from tests.test_train import run_once

# OCR at one of the two clients; a role that stays there, and a server's optimiser with a state
ROLES = [
    {"name": "router ocr", "match": ["router:evidence=ocr"], "clients": "has:ocr", "elsewhere": "frozen"},
    {"name": "router", "match": ["router:rest"], "server": "momentum", "server_options": {"beta": 0.5}},
    {"name": "vqa", "match": ["experts:vqa"], "keep": True},
    {"name": "grounding", "match": ["experts:grounding"], "server": "scaffold"},
]
SHORT = {"rounds": 2, "partition": {"clients": 2, "how": "even", "ocr_share": 0.5}, "roles": ROLES, "num_questions": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("world")


def settings(world: Path, out: Path, **changes) -> FederateConfig:
    """The toy world's config; `changes` are keys, with `__` for the dots."""
    raw = toy_world(world) | {"stages": {"joint": {"steps": 2}}, "federated": SHORT, "out": str(out)}
    raw["data"]["validation"] = {}
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(raw))
    return load(FederateConfig, file, [(key.replace("__", "."), value) for key, value in changes.items()])


def opened(config: FederateConfig, **options) -> Federation:
    AcceleratorState._reset_state(reset_partial_state=True)
    return open_federation(config, make_accelerator(config), **options)


def finished(config: FederateConfig, **options) -> Federation:
    federation = opened(config, **options)
    federate(federation)
    return federation


@pytest.fixture(scope="module")
def unbroken(world) -> Federation:
    return finished(settings(world, world / "unbroken"))


def assert_same_state(one: Federation, other: Federation) -> None:
    states = [load_state(federation.folder) for federation in (one, other)]
    assert states[0].server.base() == states[1].server.base()
    assert states[0].history == states[1].history and states[0].step == states[1].step
    for kind in (lambda state: state.kept, lambda state: state.server.state):
        values = [kind(state) for state in states]
        assert values[0].keys() == values[1].keys() and values[0]
        for key, inner in values[0].items():
            assert all(torch.equal(tensor, values[1][key][name]) for name, tensor in inner.items())
    assert read_log(one.run.out) == read_log(other.run.out)


@pytest.mark.slow
def test_it_leaves_an_ordinary_run_and_nothing_but_tensors_and_counts_has_arrived(unbroken):
    model, _, config = load_model(unbroken.run.out)
    assert set(config.choices) == {"vqa", "grounding"}
    server = load_state(unbroken.folder).server
    assert all(torch.equal(tensor, server.tensors[key]) for key, tensor in tensors_of(model, config).items())
    record = unbroken.state.history[0]
    sent = sum(p.numel for p in unbroken.pieces if p.role in ("router", "grounding"))
    branch = sum(p.numel for p in unbroken.pieces if p.role == "router ocr")
    assert record["bytes_up"] == 4 * (2 * sent + branch) and record["clients"] == ["client-0", "client-1"]
    steps = [line for line in read_log(unbroken.run.out) if "loss" in line]
    assert [(line["step"], line["round"], line["client"]) for line in steps] == [
        (1 + 2 * place + step, 1 + place // 2, f"client-{place % 2}") for place in range(4) for step in range(2)
    ]


class Killed(Exception):
    pass


# What is written, in turn: two updates, the state after the round, its checkpoint; then the same of round 2.
WRITES = ("save_arrival", "save_arrival", "save_state", "save_checkpoint") * 2
KILLED_BEFORE = (1, 3, 5, 6)


@pytest.mark.slow
def test_a_federation_that_is_killed_between_its_writes_goes_on_to_the_same_values(world, unbroken, monkeypatch):
    config = settings(world, world / "killed")
    done, left = list[str](), [*KILLED_BEFORE]

    def dying(name, function):
        def call(*arguments, **options):
            if left and len(done) == left[0]:
                left.pop(0)
                raise Killed
            done.append(name)
            return function(*arguments, **options)

        return call

    for name in set(WRITES):
        monkeypatch.setattr(simulate, name, dying(name, getattr(simulate, name)))
    for number in range(len(KILLED_BEFORE)):
        with pytest.raises(Killed):
            finished(config, resume=number > 0)
    whole = finished(config, resume=True)
    assert tuple(done) == WRITES  # nothing twice
    assert_same_state(whole, unbroken)


@pytest.mark.slow
def test_one_client_with_all_data_is_plain_training(world, tmp_path):
    one = {**SHORT, "rounds": 1, "partition": {"clients": 1, "how": "even"}, "roles": []}
    stages = {"experts": {"steps": 2, "warmup_steps": 1}, "joint": {"steps": 2}}
    config = settings(world, tmp_path / "one", federated=one, stages=stages)
    federation = finished(config)
    plain = replace(config.run(), out=str(tmp_path / "plain"))
    run_once(plain)
    own, other = (tensors_of(load_model(out)[0], plain) for out in (federation.run.out, plain.out))
    assert all(torch.equal(tensor, other[key]) for key, tensor in own.items())
    losses = [[line["loss"] for line in read_log(out) if "loss" in line] for out in (config.out, plain.out)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_one_client_has_no_drift_to_correct(world, tmp_path):
    one = {**SHORT, "partition": {"clients": 1, "how": "even"}}
    roles = {"plain": [], "scaffold": [{"name": "all", "match": ["rest"], "server": "scaffold"}]}
    found = {n: finished(settings(world, tmp_path / n, federated=one | {"roles": r})) for n, r in roles.items()}
    plain, corrected = (found[name].state.server.tensors for name in roles)
    assert all(torch.allclose(tensor, corrected[key], atol=1e-6) for key, tensor in plain.items())
    state = found["scaffold"].state
    own = {name.removeprefix("c_k of "): value for name, value in state.kept["client-0"].items()}
    assert own and all(torch.allclose(v, state.server.state[f"/{name}"]["c"], atol=1e-5) for name, v in own.items())
    assert any(value.any() for value in own.values())


def sgd(model, groups, rates, train):
    named = [{"params": [*own.values()], "name": name, "lr": 0.1, "rate": 0.1} for name, own in groups.items()]
    return torch.optim.SGD(named)


@pytest.mark.slow
def test_one_step_of_sgd_at_clients_of_equal_size_is_one_step_on_all_their_samples(world, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "make_optimizer", sgd)
    plain = {"router__modality_dropout": 0.0, "losses": {"guidance": 1.0}, "train__clip_norm": 0.0}
    two = {**SHORT, "rounds": 1, "partition": {"clients": 2, "how": "even"}, "roles": []}
    config = settings(world, tmp_path / "two", federated=two, stages={"joint": {"steps": 1}}, **plain)
    federation = opened(config)
    runs = [federation.make_run(c, federation.config_of(c, 1), 1) for c in federation.training]
    batches = [next(run.steps())[0] for run in runs]
    everything = replace(federation.run.data, sources=federation.run.data.sources)
    run = replace(runs[0], config=replace(federation.run, data=everything), step=0, stage_step=0)
    trainer = run.begin_stage(None)
    train_step(trainer, batches, 1)
    trainer.close()
    together = {key: tensor.clone() for key, tensor in tensors_of(federation.model, federation.run).items()}
    receive(federation.model, federation.run, federation.state.server.tensors)
    federate(federation)
    for key, tensor in federation.state.server.tensors.items():
        assert torch.allclose(tensor, together[key], atol=1e-6), key
    assert any(not torch.equal(t, together[k]) for k, t in opened_start(config).items())


def opened_start(config: FederateConfig) -> dict[str, torch.Tensor]:
    federation = opened(config, overwrite=True)
    return dict(federation.state.server.tensors)


@pytest.mark.slow
def test_after_the_common_rounds_each_client_trains_a_copy_that_it_keeps_and_mixes_by_likeness(world, tmp_path):
    two = {"own": {"rank": 2, "alpha": 4}, "common": {"rank": 2, "alpha": 4, "gate": "rest"}}
    own = {"trains": "joint", "only": ["own"], "copy_of": "common", "steps": 2}
    stages = {"common": {"trains": "experts", "expert": "common", "only": ["common"], "steps": 2},
              "likeness": {"trains": "router", "steps": 1}, "own": own}  # fmt: skip
    roles = [{"name": "common", "match": ["experts:common"]},
             {"name": "own", "match": ["experts:own", "router"], "keep": True}]  # fmt: skip
    table = {**SHORT, "partition": {"clients": 2, "how": "even"}, "roles": roles}
    table |= {"last_round": {"common": 1}, "first_round": {"likeness": 2, "own": 2}}
    router = {"kind": "likeness", "temperature": 2.0, "evidence": ["text"], "modality_dropout": 0.1}
    changes = {"experts": two, "router": router, "stages": stages, "data__expert": "own", "losses": {"guidance": 0.0}}
    federation = finished(settings(world, tmp_path / "dpa", federated=table, **changes))
    first, last = federation.state.history
    size = sum(piece.numel for piece in federation.pieces if piece.role == "common")
    assert (first["bytes_up"], last["bytes_up"], last["unmoved"]) == (8 * size, 0, ["common"])
    tensors, kept = federation.state.server.tensors, federation.state.kept["client-1"]
    for key in (key for key in tensors if key.startswith("experts.common.")):
        mine, start = (values[key.replace("common", "own")] for values in (kept, tensors))
        near, far = (float((tensors[key] - other).abs().max()) for other in (mine, start))
        assert 0 < near < 0.1 * far if "lora_A" in key else near > 0
    federation.show(federation.delivered(federation.training[1]))
    run = federation.make_run(federation.training[1], federation.config_of(federation.training[1], 1), 1)
    gates = federation.model.compute_gates(next(run.steps())[0][0]).gates[:, 0]
    assert bool(((gates[:, 0] > 0.2) & (gates[:, 0] <= 0.5)).all()) and torch.allclose(
        gates.sum(1), torch.ones(len(gates))
    )


@pytest.mark.slow
def test_a_private_federation_without_noise_is_the_mean_of_clients(world, tmp_path, monkeypatch):
    monkeypatch.setattr(simulate, "spent", lambda *arguments: 1.5)
    monkeypatch.setattr(start, "spent", lambda *arguments: 1.5)
    roles = [role if role.get("keep") else {**role, "weight": "uniform"} for role in ROLES]
    roles = [{k: v for k, v in role.items() if v != "scaffold"} for role in roles]  # its steps depend on single clients
    uniform = {**SHORT, "rounds": 1, "roles": roles, "factors": "freeze_a"}
    plain = finished(settings(world, tmp_path / "uniform", federated=uniform))
    privacy = {"clip": 1e3, "noise": 1e-12}
    own = finished(settings(world, tmp_path / "private", federated={**uniform, "privacy": privacy}))
    assert own.state.history[0]["epsilon"] == 1.5
    for key, tensor in own.state.server.tensors.items():
        assert torch.allclose(tensor, plain.state.server.tensors[key], atol=1e-6), key
    assert (own.folder / "server" / "secret").stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_a_role_of_others_is_frozen_at_a_client_and_nothing_of_it_is_sent(world, unbroken):
    server = load_state(unbroken.folder).server
    lacking = next(c for c in unbroken.training if not any("ocr" in r.tag.modalities - r.hidden for r in c.train))
    federation = opened(settings(world, world / "frozen", train__weight_decay=0.1))
    with federation.reporting():
        federation.store(*federation.train_here([lacking]))
    sent = federation.arrivals[lacking.name].update.values
    branch = [piece for piece in federation.pieces if piece.role == "router ocr"]
    start, now = federation.state.server.tensors, tensors_of(federation.model, federation.run)
    assert branch and not {piece.name for piece in branch} & sent.keys()
    assert all(torch.equal(piece.of(now), piece.of(start)) for piece in branch)
    assert not torch.equal(now["router.encoders.image.project.weight"], start["router.encoders.image.project.weight"])
    assert not any(name.startswith("experts.vqa") for name in sent)  # is kept
    assert server.round == 3


@pytest.mark.slow
def test_a_wrong_update_and_a_client_that_fails_are_named_and_nothing_of_them_is_averaged(
    world, tmp_path, monkeypatch, capsys
):
    three = {**SHORT, "rounds": 1, "partition": {"clients": 4, "how": "even"}, "roles": []}
    config = settings(world, tmp_path / "bad", federated=three)
    federation = opened(config)
    broken, twisted, torn, lost = federation.training
    with federation.reporting():
        for arrival in federation.train_here((broken, twisted, torn)):
            federation.store(arrival)
    folder = incoming(federation.folder, 1)
    values = load_file(folder / broken.name / "values.safetensors")
    save_file({name: torch.full_like(value, torch.nan) for name, value in values.items()},
              folder / broken.name / "values.safetensors")  # fmt: skip
    record = json.loads((folder / twisted.name / "record.json").read_text())
    record["update"]["base"] = "another"
    (folder / twisted.name / "record.json").write_text(json.dumps(record))
    (folder / torn.name / "values.safetensors").write_bytes(b"half")

    def bad(*arguments, **options):
        raise BadSampleError("x.jsonl:3", "broken image", "no such file")

    monkeypatch.setattr(simulate, "client_update", bad)
    again = finished(config, resume=True)
    (record,) = again.state.history
    refused = {name: reason for name, reason in record["refused"]}
    assert refused.keys() == {broken.name, twisted.name} and record["clients"] == []
    assert "is not finite numbers" in refused[broken.name] and "other values" in refused[twisted.name]
    assert "torn" in record["failed"][torn.name] and "broken image" in record["failed"][lost.name]
    start = federation.state.server.tensors
    assert all(torch.equal(tensor, start[key]) for key, tensor in again.state.server.tensors.items())
    printed = capsys.readouterr().out
    assert f"refused: {broken.name}" in printed and "0 updates, 2 dropped out" in printed


def test_the_clients_of_a_round_are_drawn_by_seed_and_round_alone():
    partition = PartitionConfig(clients=22, held_out=2)
    config = FederatedConfig(partition=partition, participation=0.5, dropout=0.3)
    drawn = [draw_clients(config, 0, round_) for round_ in range(1, 41)]
    assert drawn == [draw_clients(config, 0, round_) for round_ in range(1, 41)]
    assert all(len({place for place, _ in own}) == 10 and own == sorted(own) for own in drawn)
    assert len(set(map(tuple, drawn))) == 40 and {place for own in drawn for place, _ in own} == set(range(20))
    assert 0.2 < sum(not sends for own in drawn for _, sends in own) / 400 < 0.4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"federated__partition__min_samples": 40}, "federated.partition: client-.: .. training samples, must be 40"),
        ({"federated__roles": [{"name": "x", "match": ["router"]}]}, r"federated.roles: experts.*is in no role"),
        ({"federated__roles": [{"name": "x", "match": ["rest"]}, {"name": "y", "match": ["experts:vqa", "experts:*"]}]},
         r"federated.roles: experts.vqa.* is taken twice"),
        ({"federated__partition": {"clients": 2, "how": "own"}}, "partition.how: own is of clients on machines"),
        ({"federated__losses": {"pull": 1.0}}, "federated.losses.pull: no such term; choices: prox"),
        ({"data__sources__grounding__expert": "vqa"}, r"federated.partition: experts \['grounding'\] have no owner"),
    ],
)  # fmt: skip
def test_what_cannot_begin_is_named(world, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        opened(settings(world, tmp_path / "wrong", **changes))
    assert not (tmp_path / "wrong" / "federated.yaml").exists()


@pytest.mark.slow
def test_a_resume_with_other_settings_is_refused(world, unbroken):
    other = replace(unbroken.config, federated=replace(unbroken.config.federated, rounds=3))
    with pytest.raises(ValueError, match="federated.rounds was 2, is 3"):
        opened(other, resume=True)


def test_the_summary_is_of_what_clients_train_on():
    rows = {
        "global": {"scores": {"a": 0.2, "b": 0.4}, "own": {}},
        "client-0": {"scores": {"a": 0.5, "b": 0.0}, "own": {"a": 1.0}, "held_out": False},
        "client-1": {"scores": {"a": 0.0, "b": 0.9}, "own": {"a": 0.5, "b": 0.5}, "held_out": False},
        "client-2": {"scores": {"a": 0.1, "b": 0.1}, "own": {"b": 1.0}, "held_out": True},
    }
    found = summary(rows)
    assert found["global"] == pytest.approx(0.3) and found["personal"] == pytest.approx(0.475)
    assert found["worst"] == {"client": "client-1", "value": 0.45} and found["unseen_client"] == 0.1


def test_what_is_forgotten_is_the_best_score_of_a_phase_less_that_at_the_end():
    phases = [{"global": {"a": 0.8}, "client-0": {"a": 0.5}}, {"global": {"a": 0.9, "b": 0.3}, "client-1": {}}]
    rows = {name: {"scores": {"a": 0.6, "b": 0.4, "c": 0.1}} for name in ("global", "client-0", "client-1")}
    lost = forgotten(phases, rows)
    assert lost.keys() == {"global", "client-0"} and lost["client-0"] == {"a": pytest.approx(-0.1)}
    assert lost["global"] == {"a": pytest.approx(0.3), "b": pytest.approx(-0.1)}


@pytest.mark.slow
def test_tasks_come_and_go_over_rounds_and_the_scores_between_are_stored(world, tmp_path, monkeypatch):
    table = {**SHORT, "rounds": 3, "partition": {"clients": 2, "how": "even"}, "roles": []}
    table |= {"arrives": {"grounding": 2}, "leaves": {"vqa": 2}}
    federation = opened(settings(world, tmp_path / "tasks", federated=table, stages={"joint": {"steps": 1}}))
    federation.measure = lambda own: {"global": {"a": float(own.state.rounds_done)}}
    federate(federation)
    sent = {(line["round"], client) for line in read_log(federation.run.out) if (client := line.get("client"))}
    assert len(sent) == 6 and [line.get("phase", {}).get("global") for line in federation.state.history] == [
        {"a": 1.0}, {"a": 2.0}, None
    ]  # fmt: skip
    client = federation.training[0]
    tasks = [{row.tag.task for row in federation.at(client, round_).train} for round_ in (1, 2, 3)]
    assert tasks == [{"vqa"}, {"vqa", "grounding"}, {"grounding"}]
    assert [*federation.config_of(client, 3).data.sources] == ["grounding"]
    assert {row.tag.task for row in federation.seen(3)[0].train} == {"vqa", "grounding"}
    # a client with other data than when it got its group looks for one anew
    plain, federation.grouped = federation.state, ("vqa", "grounding")
    for since, news in ((1, True), (3, False)):
        groups = Groups(of={client.name: "vqa"}, since={client.name: since})
        federation.state = replace(plain, groups=groups, server=replace(plain.server, round=3))
        assert federation.member(client, trains=True).first == news
    federation.grouped = ()
    monkeypatch.setattr(Federation, "drawn", lambda self, round_: [])
    with pytest.raises(ValueError, match="federated.arrives: no client that is drawn in round 1 has samples there"):
        check_plans(federation)


@pytest.mark.slow
def test_the_command_is_killed_and_goes_on_to_its_table(world, tmp_path, unbroken, monkeypatch, capsys):
    config = settings(world, tmp_path / "command", federated__num_questions=2)
    file = str(Path(config.out).with_suffix(".yaml"))
    more = ["federated.num_questions=2", f"eval.sources={json.dumps(evaluated(world))}"]
    command = [sys.executable, "federate.py", "--config", file, *more]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while not (incoming(Path(config.out), 1) / "client-0").is_dir():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(sys, "argv", ["federate.py", "--config", file, *more, "--resume"])
    federate_script.main()
    printed = capsys.readouterr().out
    assert "continues after round" in printed and "client-1" in printed and "personal" in printed
    own, other = (load_state(Path(out)).server.base() for out in (config.out, unbroken.run.out))
    assert own == other
    assert json.loads((Path(config.out) / "federated.json").read_text())["data_sets"] == ["vqa"]
    assert (Path(config.out) / "pictures" / "clients.png").is_file()


def evaluated(world: Path) -> dict:
    return {"vqa": {"format": "jsonl", "path": str(world / "vqa.jsonl")}}
