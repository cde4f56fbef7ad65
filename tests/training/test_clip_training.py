"""Training a CLIP: the losses and their gathered negatives, the loop's stages, evaluation, exports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel

import eval as eval_script
from moa.checkpoint import load_model, step_folder
from moa.config import load_config
from moa.contrastive import not_negatives, sigmoid_loss, softmax_loss
from moa.training.setup import make_accelerator, open_run
from scripts.merge import main as merge
from tests import ROOT
from tests.support.tiny import random_image
from tests.support.tiny_clip import (
    EXPERTS,
    KINDS,
    NAMES,
    TARGETS,
    collator_of,
    mixture_of,
    pair,
    save_tiny,
)
from train import train

UNIFORM = "weights={photos: 0.333333333, drawings: 0.333333333, maps: 0.333333334}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {kind: save_tiny(kind, root / kind) for kind in KINDS}


def pairs_batch(model, count=6, **changes):
    return collator_of(model.backbone)([pair(number, **changes) for number in range(count)])


def test_the_contrastive_loss_is_clips_own_where_all_texts_differ(folders):
    """Against the loss of transformers' CLIPModel, whose features and scale are the same."""
    model = mixture_of(folders["clip"], "clip")
    samples = [pair(i, answers=(name,)) for i, name in enumerate(NAMES)]
    batch = collator_of(model.backbone)(samples)
    plain = AutoModel.from_pretrained(folders["clip"])
    with torch.no_grad():
        expected = plain(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            pixel_values=batch.pixel_values,
            return_loss=True,
        ).loss
        found = model(batch).loss_per_sample.mean()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_the_sigmoid_loss_is_siglips_own_where_all_texts_differ(folders):
    model = mixture_of(folders["siglip"], "siglip")
    samples = [pair(i, answers=(name,)) for i, name in enumerate(NAMES)]
    batch = collator_of(model.backbone)(samples)
    plain = AutoModel.from_pretrained(folders["siglip"])
    with torch.no_grad():
        inputs = {"input_ids": batch.input_ids, "pixel_values": batch.pixel_values}
        expected = plain(**inputs, return_loss=True).loss
        found = model(batch).loss_per_sample.mean()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_pairs_with_the_same_text_or_picture_are_no_negatives():
    texts, images = torch.tensor([5, 6, 5, 7]), torch.tensor([1, 2, 3, 1])
    ignored = not_negatives(texts, images, torch.tensor([0, 1]))
    assert ignored.tolist() == [[False, False, True, True], [False] * 4]
    logits = torch.tensor([[2.0, 1.0, 9.0, 9.0], [0.0, 1.0, 0.5, 0.2]])
    own = torch.tensor([0, 1])
    by_hand = F.cross_entropy(torch.tensor([[2.0, 1.0]]), torch.tensor([0]))
    loss = softmax_loss(logits, logits, own, ignored)
    torch.testing.assert_close(loss[0], by_hand)
    by_hand = -F.logsigmoid(torch.tensor(2.0)) - F.logsigmoid(torch.tensor(-1.0))
    torch.testing.assert_close(sigmoid_loss(logits, own, ignored)[0], by_hand)


def test_negatives_may_be_kept_within_a_data_set(folders):
    model = mixture_of(folders["clip"], "clip", negatives="source")
    samples = [pair(i, source=("pets", "maps")[i // 2]) for i in range(4)]
    collator = collator_of(model.backbone)
    with torch.no_grad():
        whole = model(collator(samples)).loss_per_sample
        halves = [model(collator(samples[i : i + 2])).loss_per_sample for i in (0, 2)]
    torch.testing.assert_close(whole, torch.cat(halves), atol=1e-6, rtol=0)


GATHER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
from tests.training.test_clip_training import spread_gradients
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=int(sys.argv[1]), world_size=2)
torch.set_num_threads(1)
spread_gradients(sys.argv[2], sys.argv[4], int(sys.argv[1]))
"""
SHARES = ((0, 4), (4, 6))  # uneven: a bad sample may have been left out


def step_gradients(model, batch, total):
    """The step's loss and gradients, as the loop adds them up: shares of all processes."""
    model.train()
    model.backbone.model.requires_grad_(False)
    for parameter in model.bank.parameters():
        parameter.requires_grad_(True)
    gates = F.one_hot(batch.expert_ids, 3).float()
    loss = model(batch, gates).loss_per_sample.sum() / total
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.bank.parameters()]


def spread_gradients(folder, kind, rank):
    """One of two processes: its share of the batch, sums over both to a file."""
    import torch.distributed as dist

    model = mixture_of(Path(folder) / kind, kind, std=0.3)
    samples = [pair(number) for number in range(6)][slice(*SHARES[rank])]
    loss, gradients = step_gradients(model, collator_of(model.backbone)(samples), 6)
    for tensor in (loss, *gradients):
        dist.all_reduce(tensor)
    if rank == 0:
        torch.save([loss, *gradients], Path(folder) / f"{kind}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_two_processes_have_the_loss_and_gradients_of_one_with_the_whole_batch(kind, folders, tmp_path):
    root = folders[kind].parent
    script = GATHER.format(root=str(ROOT))
    commands = [[sys.executable, "-c", script, str(rank), str(root), str(tmp_path / "meet"), kind] for rank in (0, 1)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen(command, cwd=ROOT, env=environment) for command in commands]
    assert [process.wait(timeout=240) for process in running] == [0, 0]
    found = torch.load(root / f"{kind}.pt", weights_only=True)
    model = mixture_of(folders[kind], kind, std=0.3)
    loss, gradients = step_gradients(model, pairs_batch(model), 6)
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients)
    for one, two in zip([loss, *gradients], found, strict=True):
        torch.testing.assert_close(one, two, atol=2e-6, rtol=1e-4)


def test_classification_reads_the_frozen_text_head(kind, folders):
    towers = {"clip": "vision_model", "siglip": "vision_model", "open_clip": r"visual\..*"}
    targets = [rf"{towers[kind]}.*\.mlp\..*"]
    model = mixture_of(folders[kind], kind, std=0.3, targets=targets, objective="classification")
    batch = pairs_batch(model, 4)
    output = model(batch)
    head = model.frozen_head("a photo of a {}", NAMES)
    ids, mask = model.backbone.processor.texts([f"a photo of a {name}" for name in NAMES])
    with torch.no_grad():
        torch.testing.assert_close(head, model.backbone.text_features(ids, mask))
    expected = F.cross_entropy(output.logits[:, 0], torch.tensor([0, 1, 2, 3]), reduction="none")
    torch.testing.assert_close(output.loss_per_sample, expected)
    output.loss_per_sample.mean().backward()
    assert all(p.grad is not None for p in model.bank.parameters())
    # two templates: the mean of their normalised texts
    both = model.frozen_head("a photo of a {}\nthe {}", NAMES)
    other = model.frozen_head("the {}", NAMES)
    torch.testing.assert_close(both, F.normalize(head + other, dim=-1))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_classification_refuses_experts_that_would_never_run(folders):
    with pytest.raises(ValueError, match="4 of model.targets lie in the text tower"):
        mixture_of(
            folders["clip"],
            "clip",
            targets=[r"(vision|text)_model\..*\.fc\d"],
            objective="classification",
        )


@pytest.mark.slow
def test_gradient_checkpointing_recomputes_each_tower_with_its_own_gates(folders):
    """The texts' gates are set last; the pictures' layers are recomputed after that."""
    found = []
    for checkpointing in (False, True):
        model = mixture_of(folders["clip"], "clip", std=0.3)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        model(pairs_batch(model)).loss_per_sample.mean().backward()
        found.append([p.grad for p in (*model.bank.parameters(), *model.router.parameters())])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
    refused = mixture_of(folders["open_clip"], "open_clip")
    with pytest.raises(ValueError, match="open_clip recomputes without a place for the gates"):
        refused.enable_gradient_checkpointing()


def clip_world(folder: Path, base: Path, kind: str) -> dict:
    """A config, as plain data: two classifications and one retrieval, one expert each."""
    folder.mkdir(exist_ok=True)
    for number in range(6):
        random_image(number).save(folder / f"{number}.png")
    sources = {}
    for expert in EXPERTS:
        rows = [
            {"image": f"{i % 6}.png", "question": "a photo of a {}", "task": "name",
             "answers": [NAMES[i % 4]], "choices": list(NAMES)}
            if expert != "maps"
            else {"image": f"{i}.png", "question": "{}", "task": "find",
                  "answers": [f"map {i}", f"plan {i}"]}
            for i in range(6)
        ]  # fmt: skip
        file = folder / f"{expert}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources[expert] = {"format": "jsonl", "path": str(file), "expert": expert}
    return {
        "out": str(folder / "run"),
        "model": {"name": str(base), "targets": TARGETS[kind]},
        "experts": {name: {"rank": 2, "alpha": 4} for name in EXPERTS},
        "router": {"evidence": ["image", "text", "task"], "hidden": 8},
        "data": {"sources": sources, "validation": sources, "tasks": ["name", "find"]},
        "train": {"batch_size": 6, "micro_batch_size": 3},
        "eval": {"every": 2, "batch_size": 4, "compare": ["off", "uniform"]},
        "logging": {"progress": False},
        "stages": {
            "experts": {"steps": 2, "lr": {"experts": 5e-2}},
            "router": {"steps": 1, "lr": {"router": 1e-2}},
            "joint": {"steps": 1},
        },
    }


@pytest.fixture(scope="module")
def runs(folders, tmp_path_factory):
    """A trained run of each kind."""
    made = {}
    for kind, base in folders.items():
        folder = tmp_path_factory.mktemp(kind)
        (folder / "run.yaml").write_text(yaml.safe_dump(clip_world(folder, base, kind), sort_keys=False))
        config = load_config(folder / "run.yaml")
        AcceleratorState._reset_state(reset_partial_state=True)  # of a test before, in bf16
        run, state = open_run(config, make_accelerator(config))
        train(run, state)
        made[kind] = folder / "run"
    return made


@pytest.mark.slow
def test_every_stage_trains_and_a_saved_run_loads_as_it_was(kind, runs):
    rows = [json.loads(line) for line in (runs[kind] / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["stage"] for row in steps] == ["experts", "experts", "router", "joint"]
    assert all(row["grad_norm"] > 0 for row in steps)
    assert any("validation/maps" in row for row in rows)
    (first, _, _), (second, _, _) = load_model(runs[kind]), load_model(runs[kind])
    batch = pairs_batch(first, expert=None, task="name")
    with torch.no_grad():
        moved = [b for e in EXPERTS for key, b in first.bank.state(e).items() if "lora_B" in key]
        assert any(b.abs().max() > 1e-3 for b in moved)
        for one, two in zip(first.routed_features(batch), second.routed_features(batch), strict=True):
            assert torch.equal(one, two)


@pytest.mark.slow
def test_eval_scores_classes_and_retrieval_side_by_side(kind, runs, capsys):
    eval_script.main([f"run={runs[kind]}", "progress=false", "eval.num_images=0"])
    shown = capsys.readouterr().out
    assert "run: off" in shown and "text_to_image" in shown
    record = json.loads((runs[kind] / "eval" / "photos.json").read_text())
    assert set(record["tasks"]["classification"]["metrics"]) >= {"top_1", "mean_per_class"}
    record = json.loads((runs[kind] / "eval" / "off" / "maps.json").read_text())
    assert set(record["tasks"]) == {"image_to_text", "text_to_image"}
    assert record["tasks"]["text_to_image"]["n"] == 12  # two captions a picture


@torch.no_grad()
def uniform_features(run):
    """Features of four pictures and their texts with equal gates: what a linear merge stands for."""
    model, _, _ = load_model(run)
    batch = pairs_batch(model, 4, expert=None, task="name")
    gates = torch.full((4, 1, 3), 1 / 3)
    return model, batch, model.image_features(batch, gates), model.text_features(batch, gates)


def plain_inputs(batch, kind):
    names = ("input_ids", "pixel_values", *(["attention_mask"] if kind == "clip" else []))
    return {name: getattr(batch, name) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_plain_peft_and_transformers_load_what_is_merged(family, runs, folders, tmp_path):
    model, batch, images, texts = uniform_features(runs[family])
    shared = [f"run={runs[family]}", UNIFORM, "verify=false", "fidelity=false"]
    merge([*shared, f"out={tmp_path / 'adapter'}"])
    merge([*shared, f"out={tmp_path / 'whole'}", "merged=true"])
    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(folders[family]), tmp_path / "adapter").eval()
    whole = AutoModel.from_pretrained(tmp_path / "whole").eval()
    for plain in (adapted, whole):
        with torch.no_grad():
            found = plain(**plain_inputs(batch, family))
        torch.testing.assert_close(found.image_embeds, images, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.text_embeds, texts, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["clip"])
def test_an_export_is_verified_in_a_fresh_process(family, runs, tmp_path):
    merge([f"run={runs[family]}", f"out={tmp_path / 'adapter'}", "fidelity=false"])
    report = json.loads((tmp_path / "adapter" / "export_report.json").read_text())
    assert report["verified"] and report["comparisons"]["written"]["max_abs_logit_diff"] < 1e-5
    assert report["comparisons"]["live_mixture"]["max_abs_logit_diff"] < 1e-5
    assert "routed_model" in report["comparisons"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_plain_peft_loads_a_single_expert(family, runs, folders):
    model, batch, _, _ = uniform_features(runs[family])
    chosen = torch.tensor([float(name == "drawings") for name in model.bank.names])
    gates = chosen.expand(4, 1, -1)
    with torch.no_grad():
        images = model.image_features(batch, gates)
        expert = step_folder(runs[family]) / "experts" / "drawings"
        plain = PeftModel.from_pretrained(AutoModel.from_pretrained(folders[family]), expert).eval()
        found = plain(**plain_inputs(batch, family)).image_embeds
    torch.testing.assert_close(found, images, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_plain_open_clip_loads_the_merged_checkpoint_under_its_original_keys(runs, folders, tmp_path):
    _, batch, images, texts = uniform_features(runs["open_clip"])
    merge([f"run={runs['open_clip']}", UNIFORM, "merged=true", f"out={tmp_path / 'whole'}"])
    original = load_file(folders["open_clip"] / "open_clip_model.safetensors")
    written = load_file(tmp_path / "whole" / "open_clip_model.safetensors")
    assert {key: value.shape for key, value in written.items()} == {key: value.shape for key, value in original.items()}
    changed = {key for key in written if not torch.equal(written[key], original[key])}
    assert any(key.endswith("attn.in_proj_weight") for key in changed)
    assert all("attn" in key or "mlp" in key for key in changed)
    plain = open_clip.create_model(f"local-dir:{tmp_path / 'whole'}").eval()
    with torch.no_grad():
        found = plain.encode_image(batch.pixel_values, normalize=True)
        torch.testing.assert_close(found, images, atol=1e-5, rtol=0)
        found = plain.encode_text(batch.input_ids, normalize=True)
        torch.testing.assert_close(found, texts, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_an_adapter_for_open_clip_says_who_can_load_it(runs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        merge([f"run={runs['open_clip']}", f"out={tmp_path / 'adapter'}"])
    assert "plain PEFT cannot put an adapter into open_clip's packed" in capsys.readouterr().err
