"""The same federation over Flower: its messages in this process, and two SuperNodes on loopback with TLS and keys."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState

from moa.checkpoint import load_tensors
from moa.federated.aggregate import digest_of
from moa.federated.assignment import holdings, modalities_of, tasks_of
from moa.federated.partition import make_clients
from moa.federated.store import Arrival, load_state
from tests import ROOT
from tests.federated import test_aggregate, test_partition
from tests.federated.test_simulation import finished, settings
from tests.support.toy import read_log

pytest.importorskip("flwr", reason="pip install 'moa[federated]', in an environment of its own: docs/federated.md")
from flwr.app import Error, Message
from flwr.supercore.task_identity import TaskIdentity

from moa.federated import flower

BIN = Path(sys.executable).parent
LONGEST = 900.0  # seconds for what takes less than one alone


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def call(*command: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_keys(folder: Path) -> None:
    """The commands of docs/federated.md: a CA, the certificate of the server, a key for each node."""
    folder.mkdir()
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    new = ("openssl", "req", "-newkey", "rsa:2048", "-nodes", "-keyout")
    call(*new, "ca.key", "-x509", "-days", "9", "-subj", "/CN=test CA", "-out", "ca.crt", folder=folder)
    call(*new, "server.key", "-subj", "/CN=127.0.0.1", "-out", "server.csr", folder=folder)
    call("openssl", "x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
         "-days", "9", "-extfile", "names", "-out", "server.crt", folder=folder)  # fmt: skip
    for place in range(2):
        call("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", f"client-{place}", folder=folder)


@contextmanager
def running(log: Path, *command: str, **environment: str) -> Iterator[subprocess.Popen]:
    """Inside, a command runs; after it neither it nor its children do."""
    with log.open("w") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=said, stderr=said)
        family = psutil.Process(process.pid)
        try:
            yield process
        finally:
            for one in (*family.children(recursive=True), family):
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()


def wait_for(what, *processes: subprocess.Popen) -> None:
    until = time.monotonic() + LONGEST
    while not what():
        assert time.monotonic() < until and all(process.poll() is None for process in processes)
        time.sleep(0.2)


class Loopback:
    """A grid whose nodes answer in this process; `change` of an answer is what arrives, None nothing."""

    def __init__(self, nodes: dict[int, dict], change=lambda message, reply: reply):
        self.nodes, self.change, self.sent = nodes, change, dict[str, Message]()
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1

    def get_node_ids(self):
        return [*self.nodes]

    def push_messages(self, messages):
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(len(self.sent))
            self.sent[str(len(self.sent))] = message
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, ids):
        replies = [self.change(self.sent[key], self.answer(self.sent[key])) for key in ids]
        return [reply for reply in replies if reply is not None]

    def answer(self, message: Message) -> Message:
        AcceleratorState._reset_state(reset_partial_state=True)
        handler = {"query": flower.answer_query, "train": flower.answer_train}[message.metadata.message_type]
        try:
            return handler(message, SimpleNamespace(node_config=self.nodes[message.metadata.dst_node_id]))
        except ValueError as error:
            return Message(Error(code=0, reason=str(error)), reply_to=message)


def nodes_of(config, names=("client-0", "client-1"), more: str = "") -> dict[int, dict]:
    file = Path(config.out).with_suffix(".yaml")
    own = lambda number: f"out={file.parent}/node-{number} {more}"  # noqa: E731
    return {n: {"client": name, "config": str(file), "settings": own(n)} for n, name in enumerate(names)}


def serve(config, grid, **changes) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    given = {"config": str(Path(config.out).with_suffix(".yaml")), "resume": False, "overwrite": False}
    flower.serve(grid, SimpleNamespace(run_config=given | {"wait": 60.0, "deadline": 0.1} | changes))


@pytest.mark.slow
def test_nodes_give_the_numbers_of_one_process(tmp_path):
    here = finished(settings(tmp_path, tmp_path / "here"))
    there = settings(tmp_path, tmp_path / "there")
    serve(there, Loopback(nodes_of(there)))
    assert_same_numbers(here, Path(there.out), tmp_path)


@pytest.mark.slow
def test_nodes_with_data_of_their_own_are_as_clients_that_data_is_dealt_to(tmp_path):
    by_source = {"rounds": 1, "partition": {"clients": 2, "how": "by_source"}, "num_questions": 0, "roles": []}
    here = finished(settings(tmp_path, tmp_path / "here", federated=by_source))
    there = settings(tmp_path, tmp_path / "there", federated__roles=[])
    more = "federated.rounds=1 federated.roles=[] 'federated.partition={clients: 2, how: own}'"
    nodes = nodes_of(there, more=more)
    for node, other in zip(nodes.values(), ("vqa", "grounding"), strict=True):  # sources are dealt in order of names
        node["settings"] += f" data.sources.{other}=null"
    serve(there, Loopback(nodes), settings=more)
    states = [load_state(Path(out)) for out in (here.run.out, there.out)]
    assert states[0].server.base() == states[1].server.base() and states[0].history == states[1].history


@pytest.mark.slow
def test_who_is_late_is_a_dropout_and_an_answer_of_another_round_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(flower, "POLL", 0.0)
    config = settings(tmp_path, tmp_path / "late")

    def change(message, reply):
        train = message.metadata.message_type == "train"
        if train and message.metadata.dst_node_id == 0:
            return None
        if train:
            reply.content.config_records["order"]["round"] = 7
        return reply

    serve(config, Loopback(nodes_of(config, more="federated.rounds=1"), change), settings="federated.rounds=1")
    (record,) = load_state(Path(config.out)).history
    assert record["failed"] == {"client-0": "no answer in 0.1 s"} and record["clients"] == []
    assert record["refused"] == [["client-1", "of round 7, and this is 1"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (("client-0", "client-1"), "seed=5", "client-0: the server has other settings: seed was 5, is 0"),
        (("client-0", "client-0"), "", "client-0: two nodes are this client, 0 and 1"),
        (("client-0", "client-7"), "", "client=client-7: no such client; choices: client-0, client-1"),
        ((), "", "client-0, client-1: no node is this client after 0 s"),
    ],
)  # fmt: skip
def test_nodes_that_cannot_take_part_are_named_before_anything_is_written(tmp_path, names, more, message):
    config = settings(tmp_path, tmp_path / "wrong")
    with pytest.raises(ValueError, match=message):
        serve(config, Loopback(nodes_of(config, names, more)), wait=60.0 if names else 0.0)
    assert not (tmp_path / "wrong").exists()


def test_tensors_of_every_type_arrive_bit_by_bit():
    sent = {"a.b": torch.randn(3, 2).bfloat16(), "c d": torch.randn(2, 3).T, "e": torch.tensor(4)}
    arrived = flower.unpack(flower.pack(sent))
    assert digest_of(arrived) == digest_of(sent)


def test_a_server_has_a_client_as_its_counts_say():
    recipe = test_partition.recipe("dirichlet_tasks", ocr_share=0.5, missing=0.2, test=0.1)
    roles = test_aggregate.ROLES
    for client in make_clients(test_partition.tags(), recipe, seed=0):
        kinds = json.loads(json.dumps(flower.partition_of(client)))
        found = flower.client_of(client.name, kinds)
        assert all(
            read(found) == read(client) for read in (tasks_of, modalities_of, lambda c: (len(c.train), len(c.test)))
        )
        assert holdings(found, roles, {"vqa", "ocr_vqa"}) == holdings(client, roles, {"vqa", "ocr_vqa"})
        assert not any(row.tag.image or row.tag.label for row in found.train)


def test_what_was_changed_on_the_way_is_refused():
    update = replace(test_aggregate.update(0), tasks=("vqa",), group="g")
    content = flower.content_of(Arrival(client="c0", steps=3, update=update, losses=(2.0, 1.0)))
    arrival = flower.arrival_of(content, "c0")
    assert arrival.losses == (2.0, 1.0) and arrival.update.counts == update.counts and arrival.update.group == "g"
    assert not test_aggregate.run([arrival.update])[1].refused
    other = next(iter(update.values))
    content["tensors"] = flower.pack({**update.values, other: update.values[other] + 1})
    (refused,) = test_aggregate.run([flower.arrival_of(content, "c0").update])[1].refused
    assert refused == ("c0", "torn: the values are not those of its digest")
    assert "c0 answered" in flower.arrival_of(content, "c1").failed
    del content["counts"]
    assert "torn" in flower.arrival_of(content, "c0").failed


def assert_same_numbers(here, there: Path, nodes: Path) -> None:
    """The server's state, what the nodes keep, and their losses."""
    states = [load_state(folder) for folder in (here.folder, there)]
    assert states[0].server.base() == states[1].server.base() and states[0].step == states[1].step
    assert states[0].history == states[1].history
    for place, name in enumerate(states[0].kept):
        folder, expected = nodes / f"node-{place}" / "nodes" / name, states[0].kept[name]
        kept = load_tensors(folder / "round-000002" / "kept.safetensors")
        assert kept.keys() == expected.keys() and all(torch.equal(kept[key], expected[key]) for key in kept)
        losses = [line["loss"] for n in (1, 2) for line in read_log(folder / f"round-00000{n}")]
        assert losses == [line["loss"] for line in read_log(here.run.out) if line.get("client") == name]


@pytest.mark.slow
def test_two_nodes_and_a_server_that_is_killed_give_the_numbers_of_one_process(tmp_path):
    here = finished(settings(tmp_path, tmp_path / "here"))
    there = settings(tmp_path, tmp_path / "there")
    make_keys(tmp_path / "keys")
    home, keys, file, out = tmp_path / "flwr", tmp_path / "keys", tmp_path / "there.yaml", Path(there.out)
    own = {"FLWR_HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
           "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}  # fmt: skip
    address = f"127.0.0.1:{free_port()}"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink.test]\naddress = "{address}"\nroot-certificates = "{keys}/ca.crt"\n', encoding="utf-8"
    )
    link = ["flower-superlink", "--port", address.partition(":")[2], "--enable-supernode-auth",
            "--disable-runtime-dependency-installation"]  # fmt: skip
    for name, value in {"certfile": "server.crt", "keyfile": "server.key", "ca-certfile": "ca.crt"}.items():
        link += [f"--ssl-{name}", str(keys / value)]
    with ExitStack() as stack:
        server = stack.enter_context(running(tmp_path / "link.log", *link, **own))
        wait_for(lambda: reached(address), server)
        for place in range(2):
            call("flwr", "supernode", "register", str(keys / f"client-{place}.pub"), "test", folder=ROOT, **own)
            node = ["flower-supernode", "--superlink", address, "--root-certificates", str(keys / "ca.crt")]
            node += ["--auth-supernode-private-key", str(keys / f"client-{place}"), "--port", str(free_port())]
            node += ["--node-config", f"client='client-{place}' config='{file}' settings='out={tmp_path}/node-{place}'"]
            stack.enter_context(running(tmp_path / f"node-{place}.log", *node, **own))
        command = ["flwr", "run", "configs/flower", "test", "--run-config", f"config='{file}'"]
        call(*command, folder=ROOT, **own)
        wait_for(lambda: (out / "server" / "incoming" / "round-000002").is_dir(), server)
        kill_app(server)
        rounds = load_state(out).rounds_done
        call(*command, "--run-config", "resume=true", folder=ROOT, **own)
        wait_for(lambda: load_state(out).rounds_done == 2, server)
    assert rounds == 1
    assert_same_numbers(here, out, tmp_path)


def reached(address: str) -> bool:
    host, _, port = address.partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def kill_app(server: subprocess.Popen) -> None:
    """Kill the process of the server's app, as a lack of memory would."""
    for process in psutil.Process(server.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any("flwr-serverapp" in word for word in process.cmdline()):
                process.send_signal(signal.SIGKILL)
