"""scripts.align and scripts.repair: from two CLIP folders to one, as a user goes."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor

from moa.merging.align.clip import similarities
from moa.merging.checkpoints.full import merge_checkpoints
from scripts import align, repair
from tests.support.networks import NAMES, clip, drawings, layers_of
from tests.support.tiny import ClipImageProcessor, tiny_llava, tiny_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two CLIPs of different seeds, and a few pictures with captions."""
    folder = tmp_path_factory.mktemp("clips")
    tokenizer = tiny_tokenizer()
    pixels = ClipImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    for seed, name in enumerate("ab"):
        clip(seed, vocab=len(tokenizer)).save_pretrained(folder / name)
        CLIPProcessor(pixels, tokenizer).save_pretrained(folder / name)
    rows = []
    for index, picture in enumerate(drawings(NAMES[:40], 1, 24, seed=0)[0]):
        array = (picture.permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(array).save(folder / f"{index}.png")
        caption = {"image": f"{index}.png", "question": "name it", "answers": [NAMES[index]]}
        rows.append(json.dumps({**caption, "task": "caption"}))
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return folder


def settings(world, out, **more):
    return [f"model={world / 'b'}", f"to={world / 'a'}", f"out={out}", *(f"{k}={v}" for k, v in more.items())]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["weight_matching", "ot", "activations"])
def test_the_aligned_checkpoint_computes_the_same_in_another_frame(world, tmp_path, method, capsys):
    data = {"data": world / "captions.jsonl"} if method == "activations" else {}
    align.main(settings(world, tmp_path / "out", method=method, **data))
    before, after = (CLIPModel.from_pretrained(f).eval() for f in (world / "b", tmp_path / "out"))
    torch.testing.assert_close(similarities(after), similarities(before), rtol=1e-4, atol=1e-4)
    moved = load_file(tmp_path / "out" / "model.safetensors")
    same = [key for key, t in before.state_dict().items() if torch.equal(moved[key], t)]
    assert "logit_scale" in same and not [key for key in same if key.endswith("weight") and "norm" not in key]
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert report["cosine_after"] > report["cosine_before"]
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert "similarities on a probe: largest difference" in capsys.readouterr().out


@pytest.mark.slow
def test_align_merge_repair_is_a_whole_path(world, tmp_path):
    a, b, merged, fixed = world / "a", tmp_path / "b", tmp_path / "merged", tmp_path / "fixed"
    align.main(settings(world, b))
    merge_checkpoints(merged, {"a": a, "b": b}, a)
    parts = [load_file(folder / "model.safetensors") for folder in (a, b, merged)]
    for key, tensor in parts[2].items():
        torch.testing.assert_close(tensor, (parts[0][key] + parts[1][key]) / 2)
    data = world / "captions.jsonl"
    repair.main([f"model={merged}", f"endpoints=[{a},{b}]", f"data={data}", f"out={fixed}"])
    model = CLIPModel.from_pretrained(fixed).eval()
    reset = load_file(fixed / "model.safetensors")
    for layer in layers_of(model):
        assert not torch.equal(reset[f"{layer}.weight"], parts[2][f"{layer}.weight"])
    kept = {key for key, tensor in reset.items() if torch.equal(tensor, parts[2][key])}
    assert kept == reset.keys() - {f"{n}.{part}" for n in layers_of(model) for part in ("weight", "bias")}


def refused(script, arguments, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments)
    return capsys.readouterr().err


def test_what_cannot_be_aligned_is_said(world, tmp_path, capsys):
    model, _ = tiny_llava()
    model.save_pretrained(tmp_path / "llava")
    said = refused(align, [f"model={tmp_path / 'llava'}", f"to={world / 'a'}", f"out={tmp_path / 'o'}"], capsys)
    assert "is a 'llava'; only a 'clip' can be aligned" in said
    clip(0, width=16, vocab=400).save_pretrained(tmp_path / "narrow")
    said = refused(align, [f"model={tmp_path / 'narrow'}", f"to={world / 'a'}", f"out={tmp_path / 'o'}"], capsys)
    assert "in A and" in said and "equal widths" in said
    assert "data: goes with method=activations" in refused(
        align, settings(world, tmp_path / "o", method="activations"), capsys
    )
    assert "endpoints: two or more" in refused(
        repair, [f"model={world / 'a'}", f"data={world / 'captions.jsonl'}", f"out={tmp_path / 'o'}"], capsys
    )
    (tmp_path / "bare.jsonl").write_text(
        json.dumps({"image": str(world / "0.png"), "question": "?", "task": "caption"})
    )
    bare = settings(world, tmp_path / "o", method="activations", data=tmp_path / "bare.jsonl")
    assert "bare.jsonl:1 has no caption" in refused(align, bare, capsys)
    assert not (tmp_path / "o").exists()
