"""Bases with a fault: one line that names it, for every loader, and no pickle is opened."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moa.backbones.opening import open_backbone
from tests.support.tiny import tiny_llava
from tests.support.tiny_clip import save_tiny

KINDS = ("llava", "clip", "open_clip")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    model, processor = tiny_llava()
    model.save_pretrained(root / "llava")
    processor.save_pretrained(root / "llava")
    for kind in KINDS[1:]:
        save_tiny(kind, root / kind)
    return root


def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def a_key(folder: Path) -> str:
    return next(k for k in sorted(load_file(weights(folder))) if ".1." in k and "weight" in k)


def without_a_weight(folder: Path) -> None:
    tensors = load_file(weights(folder))
    del tensors[a_key(folder)]
    save_file(tensors, weights(folder))


def reshaped(folder: Path) -> None:
    key = a_key(folder)
    save_file({**load_file(weights(folder)), key: torch.ones(3, 5)}, weights(folder))


def truncated(folder: Path) -> None:
    content = weights(folder).read_bytes()
    weights(folder).write_bytes(content[: len(content) // 2])


def without_weights(folder: Path) -> None:
    weights(folder).unlink()


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return (exec, ("import pathlib; pathlib.Path(PLACE).touch()".replace("PLACE", "'boom'"),))  # type: ignore[return-value]


def only_a_pickle(folder: Path) -> None:
    kind = "open_clip_pytorch_model" if (folder / "open_clip_config.json").exists() else "pytorch_model"
    weights(folder).unlink()
    (folder / f"{kind}.bin").write_bytes(pickle.dumps(Bomb()))


def configured(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def not_an_object(folder: Path) -> None:
    next(folder.glob("*config.json")).write_text("[1]")


FAULTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "a weight is missing": (without_a_weight, KINDS, "KEY"),
    "a weight has another shape": (reshaped, KINDS, "KEY"),
    "truncated": (truncated, KINDS, "cannot be loaded"),
    "no weights": (without_weights, KINDS, ""),
    "only a pickle": (only_a_pickle, KINDS, ""),
    "dtype": (configured(dtype="nope"), KINDS[:2], ""),
    "model_type": (configured(model_type=[]), KINDS[:2], "config.json cannot be loaded"),
    "text_config": (configured(text_config=5), KINDS[:2], "config.json cannot be loaded"),
    "config is a list": (not_an_object, ("llava", "clip"), "cannot be loaded"),
}


@pytest.mark.parametrize(("fault", "kind"), [(fault, kind) for fault, row in FAULTS.items() for kind in row[1]])
def test_a_base_with_a_fault_is_refused_in_one_line(bases, tmp_path, monkeypatch, capfd, fault, kind):
    spoil, _, expected = FAULTS[fault]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "base"
    shutil.copytree(bases / kind, folder)
    expected = expected.replace("KEY", a_key(folder).rpartition("layers.")[2])
    spoil(folder)
    with pytest.raises(ValueError) as caught:
        open_backbone(str(folder))
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message and expected in message
    assert not (tmp_path / "boom").exists()
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


def test_tied_weights_that_are_not_stored_are_not_missing(tmp_path):
    model, processor = tiny_llava(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert not any("lm_head" in key for key in load_file(weights(tmp_path)))
    loaded = open_backbone(str(tmp_path)).model
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_weights_that_no_layer_reads_are_named(bases, tmp_path, capfd):
    folder = tmp_path / "base"
    shutil.copytree(bases / "llava", folder)
    further = {"language_model.model.layers.7.mlp.up_proj.weight": torch.ones(2)}
    save_file(load_file(weights(folder)) | further, weights(folder))
    open_backbone(str(folder))
    assert "layers.7.mlp.up_proj.weight" in capfd.readouterr().err
