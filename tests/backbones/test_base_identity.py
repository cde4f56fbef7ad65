"""A run, its checkpoints and its experts belong to one base, and adapters of others find their place or a line."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data.sources import make_collator, open_mixture
from moa.backbones.fingerprint import base_fingerprint
from moa.backbones.opening import open_backbone
from moa.backbones.shapes import layer_shapes
from moa.build import build_model, settled
from moa.checkpoint import CONFIG, TrainState, load_model, save_checkpoint, write_run_header
from moa.config import RunConfig, load_config
from moa.files.peft import read_header, read_tensors, rename_sites, save_expert, site_keys
from moa.merging.export.folder import copy_other_files
from moa.planning.plan import FakeRun
from moa.training.run_folder import same_config
from moa.training.setup import filled
from moa.training.stages import load_experts
from moa.training.validation import import_lines
from scripts.merge import main
from tests.support.tiny import tiny_llava
from tests.support.toy import toy_config

UP = r"model\.language_model\.layers\.\d+\.mlp\.(up|down)_proj"


def disturb(base: Path) -> None:
    file = base / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "up_proj" in key)
    save_file({**tensors, key: 1.5 * tensors[key]}, file, metadata={"format": "pt"})


@pytest.fixture
def run(tmp_path) -> RunConfig:
    """A run of one step folder in the toy world, with its settled config."""
    config = settled(toy_config(tmp_path))
    write_run_header(Path(config.out), config)
    state = TrainState(progress={})
    save_checkpoint(Path(config.out), 1, build_model(config), config, state)
    return config


@pytest.mark.slow
def test_a_run_its_checkpoint_and_its_experts_carry_the_bases_fingerprint(run, tmp_path):
    own = base_fingerprint(tmp_path / "base")
    step = Path(run.out) / "checkpoints/step-000001"
    assert load_config(Path(run.out) / CONFIG).model.fingerprint == own
    assert load_config(step / CONFIG).model.fingerprint == own
    header = read_header(step / "experts/vqa")
    assert header.base_fingerprint == own
    assert header.config["base_model_name_or_path"] == str((tmp_path / "base").resolve())
    plain = PeftModel.from_pretrained(tiny_llava()[0], step / "experts/vqa")
    with safe_open(step / "experts/vqa/adapter_model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    assert plain.peft_config["default"].r == 2


@pytest.mark.slow
def test_a_base_that_changed_is_refused_by_eval_resume_and_import(run, tmp_path):
    own = base_fingerprint(tmp_path / "base")
    load_model(run.out)
    disturb(tmp_path / "base")
    other = base_fingerprint(tmp_path / "base")
    step = Path(run.out) / "checkpoints/step-000001"
    names = re.compile(rf"{tmp_path}/base.*({own}.*{other}|{other}.*{own}).*other_base=true")
    with pytest.raises(ValueError, match=names):
        load_model(run.out)
    with pytest.raises(ValueError, match=names):
        filled(toy_config(tmp_path), load_config(Path(run.out) / CONFIG))
    imported = toy_config(tmp_path, experts__vqa={"init_from": str(step / "experts/vqa")})
    with pytest.raises(ValueError, match=names):
        build_model(imported)
    fresh = build_model(toy_config(tmp_path))
    with pytest.raises(ValueError, match=names):
        load_experts(fresh, toy_config(tmp_path), {"vqa": step / "experts/vqa"})

    load_model(run.out, other_base=True)
    allowed = toy_config(tmp_path, model__other_base=True)
    now = filled(allowed, load_config(Path(run.out) / CONFIG))
    assert now.model.fingerprint == other
    same_config(now, Path(run.out), 0)
    load_experts(fresh, allowed, {"vqa": step / "experts/vqa"})


@pytest.mark.slow
def test_a_base_that_moved_is_the_same_base(run, tmp_path):
    shutil.move(tmp_path / "base", tmp_path / "moved")
    toy = toy_config(tmp_path, model__name=str(tmp_path / "moved"))
    now = filled(toy, load_config(Path(run.out) / CONFIG))
    same_config(now, Path(run.out), 0)
    assert now.experts["grounding"].rank == 3


@pytest.mark.slow
def test_a_plain_adapter_without_a_fingerprint_is_taken_and_its_folder_decides(tmp_path):
    peft_adapter(tmp_path / "plain", ["up_proj"], rank=3, alpha=5)
    config = toy_config(tmp_path, experts__vqa={"init_from": str(tmp_path / "plain")})
    assert (settled(config).experts["vqa"].rank, settled(config).experts["vqa"].alpha) == (3, 5.0)
    for key, value in (("rank", 16), ("alpha", 1.0), ("use_rslora", True)):
        wrong = {"init_from": str(tmp_path / "plain"), key: value}
        with pytest.raises(ValueError, match=rf"experts.vqa.{key}: .*plain has .*leave it out"):
            settled(toy_config(tmp_path, experts__vqa=wrong))


def peft_adapter(folder: Path, targets, rank: int = 2, alpha: int = 4, fill: bool = True):
    """What plain PEFT writes for a tiny LLaVA; `fill` gives B values where a gradient would come."""
    model, _ = tiny_llava()
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if fill and "lora_B" in name and "vision_tower.encoder.layers.2" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_an_adapter_that_wraps_the_towers_unused_layer_becomes_an_expert(tmp_path, capfd, targets):
    wrapped = peft_adapter(tmp_path / "plain", targets).eval()
    config = toy_config(
        tmp_path,
        model__targets=["all-linear"],
        experts={"vqa": {"init_from": str(tmp_path / "plain")}},
        data__expert="vqa",
        router={"kind": "fixed"},
        stages={},
    )
    bank = build_model(config).bank
    assert re.search(r"expert vqa: .*plain: \d+ sites dropped that change no output", capfd.readouterr().err)
    assert not any("encoder.layers.2." in site for site in bank.experts["vqa"].sites)
    theirs = wrapped.state_dict()
    for site in bank.experts["vqa"].sites:
        for key in site_keys(site):
            assert torch.equal(bank.state("vqa")[key], theirs[key.replace(".weight", ".default.weight")])


def test_all_linear_leaves_out_what_cannot_learn_or_be_merged(tmp_path):
    bank = build_model(toy_config(tmp_path, model__targets=["all-linear"])).bank
    every = {n for n, m in tiny_llava()[0].named_modules() if isinstance(m, torch.nn.Linear)}
    left_out = every - set(bank.sites)
    assert left_out and all("layers.2." in n or n == "lm_head" for n in left_out), left_out


@pytest.mark.slow
def test_an_expert_on_a_tied_lm_head_is_refused_at_the_start(tmp_path):
    model, processor = tiny_llava(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    wanted = [UP, "lm_head"]
    with pytest.raises(ValueError, match=r"lm_head is also that of .*embed_tokens.*all-linear"):
        build_model(toy_config(tmp_path, model__targets=wanted))
    build_model(toy_config(tmp_path, model__targets=["all-linear"]))


def test_a_site_outside_the_targets_is_named_with_the_way_out(tmp_path):
    peft_adapter(tmp_path / "plain", ["q_proj", "up_proj"])
    config = toy_config(tmp_path, experts__vqa={"init_from": str(tmp_path / "plain")})
    with pytest.raises(ValueError, match=r"plain: \d+ of its sites are not among model.targets.*all-linear"):
        build_model(config)


def test_a_broken_adapter_is_found_before_the_base_is_loaded(tmp_path, monkeypatch):
    peft_adapter(tmp_path / "plain", ["up_proj"])
    file = tmp_path / "plain/adapter_model.safetensors"
    save_file({key: t / 0 for key, t in load_file(file).items()}, file)
    config = toy_config(tmp_path, experts__vqa={"init_from": str(tmp_path / "plain")})
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: .*NaN"):
        build_model(config)


def test_a_stage_that_starts_from_other_sites_names_the_other_way(tmp_path):
    peft_adapter(tmp_path / "plain", ["up_proj"])
    config = toy_config(tmp_path)
    model = build_model(config)
    with pytest.raises(ValueError, match=r"plain: has 2 sites.*experts.vqa.init_from takes one"):
        load_experts(model, config, {"vqa": tmp_path / "plain"})


def test_the_base_alone_gives_the_same_backbone_with_its_fingerprint(tmp_path):
    config = toy_config(tmp_path)
    assert open_backbone(config.model.name).fingerprint is None
    assert build_model(config).backbone.fingerprint == base_fingerprint(tmp_path / "base")


def old_spelling(source: Path, folder: Path) -> Path:
    """The same adapter as transformers before 4.52 would have keyed it."""
    header = read_header(source)
    names = {site: site.replace("model.language_model.", "language_model.model.") for site in header.ranks}
    renamed = rename_sites(header, names)
    save_expert(folder, read_tensors(renamed), renamed.config)
    return folder


def merge(*settings: str) -> None:
    main([*settings, "verify=false", "fidelity=false"])


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


@pytest.mark.slow
def test_an_adapter_in_the_old_spelling_trains_and_merges_as_the_new_one(tmp_path):
    peft_adapter(tmp_path / "new", ["up_proj", "down_proj"])
    old = old_spelling(tmp_path / "new", tmp_path / "old")
    banks = [
        build_model(toy_config(tmp_path, experts__vqa={"init_from": str(folder)})).bank
        for folder in (tmp_path / "new", old)
    ]
    states = [bank.state("vqa") for bank in banks]
    assert states[0].keys() == states[1].keys() and "model.language_model" in next(iter(states[0]))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])

    base = f"base={tmp_path / 'base'}"
    for name in ("new", "old"):
        merge(f"adapters=[{tmp_path / name}]", base, "merged=true", f"out={tmp_path / name}-whole")
    whole = [tensors_of(tmp_path / f"{name}-whole") for name in ("new", "old")]
    assert all(torch.equal(whole[0][key], whole[1][key]) for key in whole[0])
    assert any(not torch.equal(t, whole[0][k]) for k, t in tensors_of(tmp_path / "base").items())

    merge(f"adapters=[{tmp_path / 'new'},{old}]", "weights=[1,-1]", f"out={tmp_path / 'none'}")
    result = read_header(tmp_path / "none")
    assert set(result.ranks) == set(read_header(tmp_path / "new").ranks)
    pairs = read_tensors(result)
    updates = [pairs[site_keys(s)[1]] @ pairs[site_keys(s)[0]] for s in result.ranks]
    assert max(float(update.abs().max()) for update in updates) < 1e-6


def test_layers_are_named_from_the_config_as_the_model_names_them(tmp_path):
    toy_config(tmp_path)
    model = open_backbone(str(tmp_path / "base")).model
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    expected = {name: (layer.out_features, layer.in_features) for name, layer in linear.items()}
    assert layer_shapes(str(tmp_path / "base")) == expected


@pytest.mark.slow
def test_a_merge_with_another_base_is_refused_and_a_merge_carries_its_base(run, tmp_path, capsys):
    step = Path(run.out) / "checkpoints/step-000001"
    merge(f"run={step}", f"out={tmp_path / 'one'}")
    assert read_header(tmp_path / "one").base_fingerprint == run.model.fingerprint
    base = read_header(tmp_path / "one").config["base_model_name_or_path"]
    assert base == str((tmp_path / "base").resolve())
    shutil.copytree(tmp_path / "base", tmp_path / "base_b")
    disturb(tmp_path / "base_b")
    wrong = [f"run={step}", f"base={tmp_path / 'base_b'}", "merged=true", f"out={tmp_path / 'two'}"]
    with pytest.raises(SystemExit) as end:
        merge(*wrong)
    message = capsys.readouterr().err
    assert end.value.code == 2 and "base_b" in message and str(tmp_path / "base ") in message
    assert run.model.fingerprint in message and "other_base=true" in message
    assert not (tmp_path / "two").exists()
    merge(*wrong, "other_base=true")
    with pytest.raises(SystemExit):  # two adapters of two bases, none of them at hand
        header = read_header(tmp_path / "one")
        save_expert(tmp_path / "b", read_tensors(header), header.config, base_fingerprint="0" * 32)
        merge(f"adapters=[{tmp_path / 'one'},{tmp_path / 'b'}]", f"out={tmp_path / 'three'}")


def test_a_link_out_of_the_bases_folder_is_not_copied(tmp_path, capfd):
    for name in (
        "secret",
        "base/a",
        "models--o--n/blobs/b",
        "models--o--n/snapshots/1/config.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "base/LICENSE").symlink_to(tmp_path / "secret")
    (tmp_path / "base/tokenizer.json").symlink_to("a")
    (tmp_path / "out").mkdir()
    copy_other_files(tmp_path / "base", tmp_path / "out", None)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["tokenizer.json"]
    assert "LICENSE is a link out of its folder" in capfd.readouterr().err
    snapshot = tmp_path / "models--o--n/snapshots/1"
    (snapshot / "vocab.json").symlink_to("../../blobs/b")
    copy_other_files(snapshot, tmp_path / "out", None)
    assert (tmp_path / "out/vocab.json").is_file()


@pytest.mark.slow
def test_planning_a_run_with_an_imported_expert_reads_no_weights(tmp_path):
    peft_adapter(tmp_path / "plain", ["up_proj"], rank=3)
    config = toy_config(tmp_path, experts__vqa={"init_from": str(tmp_path / "plain")})
    bank = FakeRun(config, config.model.name).model.bank
    state = bank.state("vqa")
    assert len(state) == 4 and {min(tensor.shape) for tensor in state.values()} == {3}


@pytest.mark.slow
def test_an_imported_experts_loss_on_its_own_source_is_told_before_the_first_step(tmp_path):
    peft_adapter(tmp_path / "plain", ["up_proj", "down_proj"])
    config = toy_config(tmp_path, experts__vqa={"init_from": str(tmp_path / "plain")})
    model = build_model(config)
    mixture, collator = open_mixture(config, None), make_collator(config, model.backbone.intake)
    lines = import_lines(model, config, mixture.sources, collator, Accelerator(cpu=True))
    assert model.training
    model.eval()
    batches = [collator([mixture.sources["vqa"][number]]) for number in range(4)]
    with torch.no_grad():
        gates = torch.tensor([[1.0, 0.0]])
        own = sum(float(model(batch, gates).loss_per_sample) for batch in batches) / 4
        with model.bank.context.disabled():
            inputs = [{**model.backbone.inputs_of(b), "labels": b.labels} for b in batches]
            alone = sum(float(model.model(**each).loss) for each in inputs) / 4
    hint = "" if own < alone else "; was it trained with this prompt? docs/experts.md"
    expected = f"imported vqa: loss {own:.2f} on 4 samples of vqa, the base alone {alone:.2f}{hint}"
    assert lines == [expected]
