"""The fingerprint of a base: the same however a checkpoint is stored, another for every change of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moa.backbones.fingerprint
from moa.backbones.fingerprint import base_fingerprint
from tests.support.tiny import tiny_llava
from tests.support.tiny_clip import save_tiny

Tensors = dict[str, Tensor]
KEY = "language_model.model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fingerprint") / "base"
    tiny_llava()[0].save_pretrained(folder)
    return folder


@pytest.fixture(params=["whole", "sampled"], autouse=True)
def reading(request, monkeypatch):
    if request.param == "sampled":
        monkeypatch.setattr(moa.backbones.fingerprint, "WHOLE", 0)
        monkeypatch.setattr(moa.backbones.fingerprint, "BLOCK", 64)


def rewritten(base: Path, folder: Path, change: Callable[[Tensors], Tensors], **config: object) -> Path:
    shutil.copytree(base, folder)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, **config}))
    return folder


def today(key: str) -> str:
    """The spelling of transformers 4.52 and later, in memory."""
    if key.startswith("language_model.lm_head"):
        return key.removeprefix("language_model.")
    key = key.replace("language_model.model.", "language_model.")
    return f"model.{key}".replace("vision_tower.vision_model.", "vision_tower.")


def in_place(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, key: change(tensors[key])}


def noisy(tensor: Tensor) -> Tensor:
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    return tensor + 1e-3 * tensor.std() * noise


CHANGES: dict[str, Callable[[Tensors], Tensors]] = {
    "noise": in_place(KEY, noisy),
    "scale": in_place(KEY, lambda t: t * 1.5),
    "sign": in_place(KEY, lambda t: -t),
    "dtype": in_place(KEY, lambda t: t.bfloat16()),
    "shape": in_place(KEY, lambda t: t.reshape(-1)),
    "missing": lambda tensors: {k: t for k, t in tensors.items() if k != KEY},
    "further": lambda tensors: {**tensors, "language_model.model.layers.9.x": torch.ones(2)},
    "swapped": lambda tensors: {
        **tensors,
        KEY: tensors[KEY.replace("up_proj", "gate_proj")],
        KEY.replace("up_proj", "gate_proj"): tensors[KEY],
    },
    "one bias": in_place("multi_modal_projector.linear_1.bias", lambda t: t + 1e-3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_shows(base, tmp_path, change):
    assert KEY in load_file(base / "model.safetensors")
    other = rewritten(base, tmp_path / "other", CHANGES[change])
    assert base_fingerprint(other) != base_fingerprint(base)


def test_a_config_that_computes_something_else_shows_and_one_that_does_not_is_the_same(base, tmp_path):
    own = base_fingerprint(base)
    for number, (changes, same) in enumerate([
        ({"vision_feature_layer": -1}, False),
        ({"projector_hidden_act": "relu"}, False),
        ({"transformers_version": "4.40.0", "torch_dtype": "bfloat16", "_name_or_path": "x"}, True),
    ]):  # fmt: skip
        other = rewritten(base, tmp_path / str(number), dict, **changes)
        assert (base_fingerprint(other) == own) is same, changes


def test_spelling_shards_and_the_folders_name_do_not_show(base, tmp_path):
    own = base_fingerprint(base)
    renamed = rewritten(base, tmp_path / "renamed", lambda ts: {today(k): t for k, t in ts.items()})
    assert load_file(renamed / "model.safetensors").keys().isdisjoint({KEY})
    assert base_fingerprint(renamed) == own
    tiny_llava()[0].save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    assert base_fingerprint(tmp_path / "sharded") == own


def test_a_stored_copy_of_tied_embeddings_does_not_show_and_another_lm_head_does(tmp_path):
    tiny_llava(tie_word_embeddings=True)[0].save_pretrained(tmp_path / "base")
    own = base_fingerprint(tmp_path / "base")
    embeddings, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    copy = rewritten(tmp_path / "base", tmp_path / "copy", lambda ts: {**ts, head: ts[embeddings].clone()})
    assert base_fingerprint(copy) == own
    other = rewritten(tmp_path / "base", tmp_path / "other", lambda ts: {**ts, head: ts[embeddings] + 1})
    assert base_fingerprint(other) != own


@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_dual_encoders_have_one_too(tmp_path, kind):
    folder = save_tiny(kind, tmp_path / "base")
    own = base_fingerprint(folder)
    if kind == "open_clip":
        assert base_fingerprint(f"open_clip:{folder}") == own
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("mlp.fc1.weight") or k.endswith("c_fc.weight"))
    save_file({**tensors, key: noisy(tensors[key])}, file)
    assert base_fingerprint(folder) != own
