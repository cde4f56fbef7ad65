"""A store of experts: what is put in comes out bit by bit, what it claims was measured, and skills compose as text."""

import json
import multiprocessing
import re
import shlex
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.config import DataConfig, SourceConfig
from moa.build import build_model
from moa.checkpoint import TrainState, load_model, save_checkpoint, step_folder, weights_fingerprint
from moa.config import RunConfig
from moa.evaluation.fingerprints import digest
from moa.files.peft import read_header
from moa.merging.adapters import expert_from_folder
from moa.merging.core import inner_product
from moa.merging.store.compose import choose, parse
from moa.merging.store.place import Entry, open_place
from moa.sections import ExpertConfig, ModelConfig, RouterConfig
from moa.statistics.moments import Moments
from moa.statistics.stored import write_statistics
from scripts import store as script
from tests import ROOT
from tests.support.hub import serve_hub
from tests.support.tiny import save_tiny_llava, tiny_batch, tiny_llava

TARGETS = [r"model\.language_model\.layers\.0\.self_attn\.(q|v)_proj"]
SKILLS, OWN = ("caption", "ocr_vqa", "toxic"), ("vqa", "grounding")
SCORE = {"value": 0.75, "se": 0.25}


def make_run(folder, base, names, seed, **router):
    """A run as training leaves it, each expert with data and a task of its own."""
    sets = {n: SourceConfig(name=n, split="train", task=n, expert=n, num_samples=4) for n in names}
    config = RunConfig(
        model=ModelConfig(name=str(base), targets=TARGETS),
        router=RouterConfig(**{"evidence": ["text", "task"], "hidden": 8} | router),
        experts={name: ExpertConfig(rank=2, alpha=4.0) for name in names},
        data=DataConfig(tasks=[*names], sources=sets),
    )
    model = build_model(config)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        for parameter in model.bank.parameters(name):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    for value in model.router.state_dict().values():
        value += 0.5 * torch.randn(value.shape, generator=generator)
    save_checkpoint(folder, 1, model, config, TrainState(progress={"step": 1}))
    return step_folder(folder)


def isotropic(folder, variance):
    """Statistics of inputs that have one variance in all directions."""

    def moments():
        return Moments(
            vectors=torch.zeros(32, 0), values=torch.zeros(0), mean=torch.zeros(32), rest=variance, tokens=100
        )

    write_statistics(folder, {site: moments() for site in read_header(folder).ranks}, 7)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, a run of three skills of which two have statistics and one a score, and another run."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_llava(folder / "base")
    step = make_run(folder / "skills", folder / "base", SKILLS, 1)
    for name in SKILLS[:2]:
        isotropic(step / "experts" / name, 2.0)
    make_run(folder / "mine", folder / "base", OWN, 2)
    rows = json.dumps({"expert": "caption", "image_id": 0}) + "\n"
    about = {"weights": weights_fingerprint(step), "rows": digest(rows)}
    record = {"name": "scenes", "n": 9, "score": SCORE, "tasks": {"c": {"primary": "cider"}}, "fingerprints": about}
    for gates, weights in (("caption", about["weights"]), ("oracle", about["weights"]), ("toxic", "of another step")):
        (folder / "skills" / "eval" / gates).mkdir(parents=True)
        own = record | {"fingerprints": about | {"weights": weights}}
        (folder / "skills" / "eval" / gates / "scenes.json").write_text(json.dumps(own))
        (folder / "skills" / "eval" / gates / "scenes.jsonl").write_text(rows)
    script.main(["publish", f"store={folder}/store", f"run={folder}/skills"])
    return folder


def refused(capsys, *arguments):
    """What the script prints where it refuses: one line on stderr, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main([*map(str, arguments)])
    assert stop.value.code == 2
    found = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(found) == 1
    return found[0]


# Expressions ------------------------------------------------------------------------------------------


def test_an_expression_is_signed_numbers_of_names():
    assert parse(" caption + 2*ocr_vqa - .5 * toxic@0a1f") == {"caption": 1, "ocr_vqa": 2, "toxic@0a1f": -0.5}
    assert parse("- toxic") == {"toxic": -1}


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "'+' does not begin with a term"),
        ("caption ocr_vqa", "'+caption ocr_vqa' does not begin with a term; choices: + NAME"),
        ("caption +- toxic", "'+- toxic' does not"),
        ("caption * 2", "'+caption * 2' does not"),
        ("a + b - a", "a is in it twice"),
        ("a@12 + a@13", "a is in it twice"),
        ("a + 0 * b", "0 * b adds nothing"),
    ],
)
def test_what_is_no_expression_is_shown(expression, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(expression)


def test_the_method_is_chosen_by_what_is_known():
    lists = {key: [] for key in ("tasks", "data", "anchors", "scores", "mixes", "beside")}
    blank = {"name": "x", "digest": "", "base": None, "base_fingerprint": None, "rank": 8, "num_sites": 1}
    entries = {
        n: Entry(**blank, **lists, license={}, statistics=number) for n, number in (("a", 7), ("b", 7), ("c", None))
    }
    assert choose({"a": 2.0, "c": -1.0}, entries)[0] == {"method": "linear", "weights": {"a": 2, "c": -1}}
    weights = {"a": 0.75, "b": 0.25, "c": -1}
    assert choose({"a": 3.0, "b": 1.0, "c": -1.0}, entries)[0] == {
        "method": "regmean", "weights": weights, "added": ["c"]
    }  # fmt: skip
    assert choose({"a": 1.0, "c": 3.0}, entries)[0] == {"method": "linear", "weights": {"a": 0.25, "c": 0.75}}


# Publish, find, show ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_expert_comes_out_as_it_went_in_and_its_record_holds_what_was_measured(world):
    place, step = open_place(f"{world}/store"), step_folder(world / "skills")
    assert [*place.versions] == sorted(SKILLS)
    found = {name: place.get(name) for name in SKILLS}
    for name, (entry, folder) in found.items():
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (folder / file).read_bytes() == (step / "experts" / name / file).read_bytes()
        assert entry.tasks == [name] and entry.rank == 2 and entry.anchors == []
        assert entry.statistics == (None if name == "toxic" else 7)
    caption, toxic = found["caption"][0], found["toxic"][0]
    assert [row["gates"] for row in caption.scores] == ["caption", "oracle"] and caption.scores[0]["se"] == 0.25
    assert toxic.scores == []  # they are of another step
    experts = {name: expert_from_folder(folder) for name, (_, folder) in found.items()}
    ratios = []  # of squared lengths: what crosstalk is where inputs have one variance
    for site in experts["toxic"].ranks:
        own, other = (experts[name].factors(site, torch.float64) for name in ("ocr_vqa", "caption"))
        ratios.append(float(inner_product(other, other) / inner_product(own, own)))
    [row] = [row for row in found["ocr_vqa"][0].mixes if row["name"] == "caption"]
    assert row["disturbed"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    assert {row["name"]: row["disturbed"] for row in toxic.mixes} == {"caption": None, "ocr_vqa": None}
    assert all(row["disturbs"] > 0 and -1 <= row["cosine"] <= 1 for row in toxic.mixes)
    card = (found["caption"][1] / "README.md").read_text()
    assert "Of the expert alone" in card and "| scenes | cider | 75.0 (" in card


@pytest.mark.slow
def test_versions_are_kept_and_the_same_content_is_one(world, tmp_path, capsys):
    store = f"store={tmp_path}/store"
    one, two = (world / "store" / "objects", tmp_path / "other")
    [caption], [toxic] = (list(one.glob(f"*/{name}")) for name in ("caption", "toxic"))
    publish = ["publish", store, f"adapters=[{caption}]", "license=mit"]
    script.main(publish)
    script.main(publish)
    place = open_place(str(tmp_path / "store"))
    [first] = place.versions["caption"]
    assert place.get("caption")[0].license == {"license": "mit"}
    shutil.copytree(toxic, two / "caption")
    assert "has other weights of this name" in refused(capsys, "publish", store, f"adapters=[{two}/caption]")
    script.main(["publish", store, f"adapters=[{two}/caption]", "update=true"])
    assert place.versions["caption"][0] == first != place.versions["caption"][1]
    assert place.get(f"caption@{first[:6]}")[0].digest != place.get("caption")[0].digest
    capsys.readouterr()
    script.main(["show", "caption", store])
    assert f"versions: {', '.join(place.versions['caption'])}" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_torn_or_wrong_is_one_line(world, tmp_path, capsys):
    shutil.copytree(world / "store", tmp_path / "store")
    store = f"store={tmp_path}/store"
    place = open_place(str(tmp_path / "store"))
    _, folder = place.get("caption")
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-8])
    assert "adapter_model.safetensors: has" in refused(capsys, "show", "caption", store)
    assert "adapter_model.safetensors: not readable" in refused(capsys, "publish", store, f"adapters=[{folder}]")
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    weights.unlink()
    assert "is a pickle, and is not opened" in refused(capsys, "publish", store, f"adapters=[{folder}]")
    (folder / "manifest.json").write_text("{}")
    assert "is not that of version" in refused(capsys, "show", "caption", store)
    (folder / "card.json").write_text("{}")
    script.main(["find", store])
    printed = capsys.readouterr()
    assert "card.json: is not what" in printed.err and "toxic" in printed.out and "caption" not in printed.out
    _, toxic = place.get("toxic")
    odd = tmp_path / "a-b"
    shutil.copytree(toxic, odd)
    cases = (
        (["publish", store], "run, adapters: give one of the two"),
        (["publish", store, f"adapters=[{odd}]"], "'a-b' must be letters, digits and _"),
        (["publish", store, f"adapters=[{toxic},{toxic}]"], "'toxic' is the name of two"),
        (["show", "nobody", store], "nobody: names no expert; choices: caption, ocr_vqa, toxic"),
        (["show", "toxic@00", store], "toxic@00: names no expert; choices: toxic@"),
        (["show", "toxic", f"store={tmp_path}"], "has no folder names"),
        (["compose", "toxic + nobody", store, f"out={tmp_path}/out"], "nobody: names no expert"),
        (["compose", "toxic", store, "task=vqa"], "task: has no effect with compose"),
        (["open", store], "open: begin with one of publish, find"),
    )
    for arguments, message in cases:
        assert message in refused(capsys, *arguments), message


# Several writers --------------------------------------------------------------------------------------


def together(work, numbers):
    """Run `work` in one process each, all begun at once; their exit codes."""
    fork = multiprocessing.get_context("fork")
    gate = fork.Barrier(len(numbers))

    def run(number):
        gate.wait(60)
        work(number)

    workers = [fork.Process(target=run, args=(number,)) for number in numbers]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    return [worker.exitcode for worker in workers]


@pytest.mark.slow
def test_writers_in_several_processes_lose_nothing(world, tmp_path):
    place, entry = open_place(f"{tmp_path}/store", create=True), world / "store" / "objects"
    [source] = entry.glob("*/toxic")

    def put(number):
        for turn in range(4):
            for name in ("same", f"own_{number}"):
                built = tmp_path / f"built-{number}"
                shutil.rmtree(built, ignore_errors=True)
                shutil.copytree(source, built)
                (built / "README.md").write_text(f"{name} {number} {turn}")
                with place.writing():
                    place.put(name, built)

    assert together(put, range(4)) == [0] * 4
    assert {name: len(known) for name, known in place.versions.items()} == {
        "same": 16, **{f"own_{number}": 4 for number in range(4)}
    }  # fmt: skip
    cards = {(place.get(f"same@{v}")[1] / "README.md").read_text() for v in place.versions["same"]}
    assert cards == {f"same {number} {turn}" for number in range(4) for turn in range(4)}
    assert not [*(tmp_path / "store").rglob("*.tmp")]


@pytest.mark.slow
def test_of_two_that_publish_one_name_at_once_the_second_is_refused(world, tmp_path):
    for name in ("caption", "toxic"):
        [folder] = (world / "store" / "objects").glob(f"*/{name}")
        shutil.copytree(folder, tmp_path / name / "skill")

    def publish(name):
        torch.set_num_threads(1)  # threads do not survive a fork
        script.main(["publish", f"store={tmp_path}/store", f"adapters=[{tmp_path}/{name}/skill]"])

    assert sorted(together(publish, ("caption", "toxic"))) == [0, 2]
    assert len(open_place(f"{tmp_path}/store").versions["skill"]) == 1


# Compose ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_added_skills_are_merged_by_their_inputs_and_the_subtracted_one_comes_off(world, tmp_path, capsys):
    out, about = tmp_path / "out", [f"store={world}/store", f"base={world}/base", "verify=false"]
    script.main(["compose", "3 * caption + ocr_vqa - 0.5 * toxic", *about, f"out={out}"])
    assert "regmean, as all have statistics of their inputs" in capsys.readouterr().out
    step = step_folder(world / "skills")
    merged = expert_from_folder(out)
    experts = [expert_from_folder(step / "experts" / name) for name in SKILLS]
    for site in merged.ranks:  # inputs alike in all directions: the weighted mean
        a, b = merged.factors(site, torch.float64)
        parts = [weight * torch.matmul(*expert.factors(site, torch.float64)[::-1])
                 for weight, expert in zip((0.75, 0.25, -0.5), experts, strict=True)]  # fmt: skip
        torch.testing.assert_close(b @ a, sum(parts), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_experts_of_several_bases_are_refused_with_both(world, tmp_path, capsys):
    shutil.copytree(world / "store", tmp_path / "store")
    shutil.copytree(step_folder(world / "skills") / "experts" / "toxic", tmp_path / "other")
    file = tmp_path / "other" / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "base_fingerprint": "f" * 32})
    script.main(["publish", f"store={tmp_path}/store", f"adapters=[{tmp_path}/other]"])
    line = refused(capsys, "compose", "caption + other", f"store={tmp_path}/store", f"out={tmp_path}/out")
    assert "of several bases: caption " in line and f"other {'f' * 32}" in line
    script.main(["find", f"store={tmp_path}/store", f"base={world}/base"])
    assert "other" not in capsys.readouterr().out


# Equip, unequip ---------------------------------------------------------------------------------------


def gates_of(run, batch):
    model, _, config = load_model(run)
    with torch.no_grad():
        return model.compute_gates(batch).gates[:, 0], config, model


@pytest.mark.slow
def test_an_equipped_expert_has_its_task_and_the_others_keep_their_gates(world, tmp_path):
    script.main(["equip", "caption", f"store={world}/store", f"run={world}/mine", f"out={tmp_path}/more"])
    batch = tiny_batch(tiny_llava()[1], tasks=[0, 1, -1, 2])
    seen = replace(batch, task_ids=torch.tensor([0, 1, -1, -1]))
    before, old, _ = gates_of(world / "mine", seen)
    after, config, model = gates_of(tmp_path / "more", batch)
    assert config.data.tasks == [*OWN, "caption"] and list(config.experts) == [*OWN, "caption"]
    torch.testing.assert_close(after[:3, :2], before[:3], rtol=1e-6, atol=1e-7)
    assert (after[:3, 2] == 0).all() and after[3].tolist() == [0, 0, 1]
    _, folder = open_place(f"{world}/store").get("caption")
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        assert torch.equal(model.bank.state("caption")[key], value)
    script.main(["unequip", "caption", f"run={tmp_path}/more", f"out={tmp_path}/less"])
    again, config, _ = gates_of(tmp_path / "less", seen)
    assert config.experts.keys() == old.experts.keys()
    torch.testing.assert_close(again, before, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_an_expert_brings_the_anchors_of_its_samples(world, tmp_path, capsys):
    """The equipped router is the one that had seen the samples of both; an expert without anchors is refused."""
    processor, base = tiny_llava()[1], world / "base"
    batch = tiny_batch(processor, tasks=[0, 1, 0, 1], experts=[0, 1, 0, 1])
    for run, names in (("theirs", ("grounding", "caption")), ("mine", ("grounding",))):
        step = make_run(tmp_path / run, base, names, 3, kind="anchors")
        model, _, config = load_model(step)
        for value in model.router.state_dict().values():
            value.zero_()
        known = torch.where(batch.expert_ids < len(names), batch.expert_ids, -1)
        shown = replace(batch, expert_ids=known, task_ids=known)
        model.update_anchors(shown)
        shutil.rmtree(tmp_path / run)
        save_checkpoint(tmp_path / run, 1, model, config, TrainState(progress={"step": 1}))
    script.main(["publish", f"store={tmp_path}/store", f"run={tmp_path}/theirs"])
    theirs = open_place(f"{tmp_path}/store").get("caption")[0]
    assert theirs.anchors == ["task", "text"]
    equip = ["equip", "caption", f"run={tmp_path}/mine", f"out={tmp_path}/more"]
    assert "has no anchors of text, task" in refused(capsys, *equip, f"store={world}/store")
    script.main([*equip, f"store={tmp_path}/store"])
    texts = replace(batch, task_ids=torch.full_like(batch.task_ids, -1))  # caption is no task of the other run
    expected, _, model = gates_of(tmp_path / "theirs", texts)
    found, _, more = gates_of(tmp_path / "more", texts)
    torch.testing.assert_close(found, expected)
    assert torch.equal(more.router.text_sums, model.router.text_sums)


@pytest.mark.slow
def test_a_router_that_no_task_decides_is_refused(world, tmp_path, capsys):
    make_run(tmp_path / "run", world / "base", OWN, 2, kind="sigmoid")
    common = [f"run={tmp_path}/run", f"out={tmp_path}/out"]
    equip = ["equip", f"store={world}/store", *common]
    assert "no offset of a task decides its router" in refused(capsys, *equip, "caption")
    assert "nobody: names no expert" in refused(capsys, *equip, "nobody")
    assert "name: is missing" in refused(capsys, *equip)
    assert "nobody: the run has no such expert; choices: vqa" in refused(capsys, "unequip", "nobody", *common)
    script.main(["unequip", "vqa", *common])
    again = ["unequip", "grounding", f"run={tmp_path}/out", f"out={tmp_path}/none"]
    assert "chooses among no other" in refused(capsys, *again)


# The hub ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_repository_of_the_hub_is_a_store(world, tmp_path, monkeypatch, capsys):
    with serve_hub(tmp_path, monkeypatch) as hub:
        store, step = "store=hf:org/skills", step_folder(world / "skills")
        for name in ("caption", "ocr_vqa"):
            script.main(["publish", store, f"adapters=[{step}/experts/{name}]"])
        assert len(hub.commits) == 3  # each a single one, after the repository's own
        assert [row["name"] for row in open_place("hf:org/skills").get("ocr_vqa")[0].mixes] == ["caption"]
        hub.refuse = True  # somebody else has published meanwhile
        assert "412" in refused(capsys, "publish", store, f"adapters=[{step}/experts/toxic]")
        hub.refuse = False
    script.main(["find", store])  # the hub is gone, the cache is here
    assert "ocr_vqa" in capsys.readouterr().out
    script.main(["compose", "caption", store, "verify=false", f"base={world}/base", f"out={tmp_path}/out"])
    assert "cannot be read" in refused(capsys, "find", "store=hf:org/nothing")


# The page ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_commands_of_the_page_run_on_a_small_run(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"runs/demo": f"{world}/skills", "runs/mine": f"{world}/mine", "BASE": f"{world}/base"}
    text = (ROOT / "docs" / "store.md").read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("python -m scripts.store ")]
    assert len(commands) >= 6
    for command in commands:
        for name, folder in names.items():
            command = command.replace(name, folder)
        if "hf:" not in command and "THEIRS" not in command:
            own = ["verify=false"] if " compose " in command else []
            script.main([*shlex.split(command, comments=True)[3:], *own])
    assert (tmp_path / "OUT" / "adapter_model.safetensors").is_file()
