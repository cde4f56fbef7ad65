"""A merged folder on disk: its shards, index, the files of the base beside them, and its report and card."""

import json
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moa.backbones.fingerprint import base_fingerprint
from moa.card import CARD, REPORT_FILE, Card
from moa.cli.command import note
from moa.files.atomic import atomic_folder, write_file, write_json
from moa.files.checkpoint_files import FLOATS, INDEX_FILE, BaseFiles, config_parts

MANIFEST = "manifest.json"
# Of a base: what loads it, and its license. Not its weights, card, recipe, logs or reports, which are about the base.
COPIED = re.compile(
    r"(?!adapter_).*config\.json|.*(tokenizer|tokens|processor).*\.json|(vocab|merges)\..*|chat_template\..*"
    r"|tekken\.json|.*\.(jinja|model|spm|tiktoken)|(licen[cs]e|notice|use_policy).*",
    re.IGNORECASE,
)
NAMES = {dtype: name for name, dtype in FLOATS.items()}
ALIGNMENT = 8  # of the data, as readers that map the file expect
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def write_weights(
    out: Path,
    files: BaseFiles,
    tensors: Callable[[Sequence[str]], Iterator[tuple[str, Iterable[Tensor]]]],
    cast: torch.dtype | None,
    max_shard_gb: float,
    origin: Callable[[str], tuple[Path, str]] | None = None,
) -> None:
    """All keys of `files` in shards, as transformers names them: `tensors(keys)` has each key's blocks of rows."""
    shards = plan_shards(files, cast, max_shard_gb * 1e9)
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = ["model.safetensors"] if count == 1 else names
    for name, keys in zip(names, shards, strict=True):
        write_shard(out / name, files, keys, tensors(keys), cast, origin)
    if count > 1:
        where = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        total = sum(_bytes(files, key, cast) for key in files.files)
        write_json(out / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": where})


def write_checkpoint(
    out: str | Path,
    files: BaseFiles,
    tensors: Callable[[Sequence[str]], Iterator[tuple[str, Iterable[Tensor]]]],
    report: Mapping[str, Any],
    manifest: Mapping[str, Any],
    card: Mapping[str, Any],
    *,
    cast: torch.dtype | None = None,
    max_shard_gb: float = 5.0,
    origin: Callable[[str], tuple[Path, str]] | None = None,
) -> None:
    """A folder of all keys of `files`, with what else its base has; `origin` as in `write_shard`."""
    about = {"name": Path(out).name, "kind": "checkpoint", "base": str(files.folder)}
    about["fingerprint"] = base_fingerprint(files.folder)
    with atomic_folder(out) as folder:
        write_weights(folder, files, tensors, cast, max_shard_gb, origin=origin)
        copy_other_files(files.folder, folder, cast)
        if origin is not None:  # layers from elsewhere have a config of their own
            write_json(folder / "config.json", files.config)
        write_report(folder, {"kind": "checkpoint", **report}, {MANIFEST: manifest}, {**about, **card})


def plan_shards(source: BaseFiles, cast: torch.dtype | None, max_bytes: float) -> list[list[str]]:
    """Keys in the base's order, cut where a shard would grow past the limit."""
    shards: list[list[str]] = [[]]
    size = 0
    for key in source.files:
        nbytes = _bytes(source, key, cast)
        if shards[-1] and size + nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += nbytes
    return shards


def _bytes(source: BaseFiles, key: str, cast: torch.dtype | None) -> int:
    dtype = source.dtypes[key]
    width = (cast if cast and dtype.is_floating_point else dtype).itemsize
    return width * torch.Size(source.shapes[key]).numel()


def copy_other_files(source: Path, out: Path, cast: torch.dtype | None) -> None:
    """What `COPIED` matches of a base; a link that leads out of its folder (on the hub: the model's) is noted."""
    root = source.resolve()
    root = root.parent.parent if root.parent.name == "snapshots" else root
    for file in sorted(source.iterdir()):
        if not file.is_file() or not COPIED.fullmatch(file.name):
            continue
        if file.resolve().is_relative_to(root):
            shutil.copyfile(file, out / file.name)
        else:
            note(f"warning: base: {file} is a link out of its folder, and is not copied")
    if cast is not None:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        for part in config_parts(config):
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = dtype_name(cast)
        config["dtype"] = dtype_name(cast)
        write_json(out / "config.json", config)


def copy_processor(source: Path, out: Path) -> None:
    if not source.is_dir():
        raise ValueError(f"processor: {source} is not a folder")
    for file in sorted(source.iterdir()):
        if file.is_file() and COPIED.fullmatch(file.name) and file.name != "config.json":
            shutil.copyfile(file, out / file.name)


def check_out(out: str | Path, inputs: Iterable[str | Path] = (), report: str = REPORT_FILE) -> None:
    """ValueError where writing `out` would replace an input, or a folder without the report of an earlier export."""
    folder = Path(out)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / report).is_file():
        raise ValueError(f"out: {out} holds other things; only a folder with {report} is replaced")
    for given in map(Path, inputs):
        if folder.resolve() in (given.resolve(), *given.resolve().parents):
            raise ValueError(f"out: {out} would replace {given}, which is merged; name another")


def write_report(folder: Path, report: Mapping[str, Any], files: Mapping[str, Any], card: Mapping[str, Any]) -> None:
    """Card, report and further files: records for JSON, or functions of a path to write to and the report."""
    for name, value in files.items():
        if callable(value):
            value(folder / name, report)
        else:
            write_json(folder / name, value)
    write_file(folder / CARD, Card(**card).text())
    write_json(folder / REPORT_FILE, report)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_shard(
    path: Path,
    source: BaseFiles,
    keys: Sequence[str],
    tensors: Iterable[tuple[str, Iterable[Tensor]]],
    cast: torch.dtype | None = None,
    origin: Callable[[str], tuple[Path, str]] | None = None,
) -> int:
    """Write `tensors`, which come in the order of `keys`, each in blocks of its rows; returns their bytes.

    The library's own writer wants all of them in memory at once. The file has the header's length in 8 bytes, the
    header as JSON with every tensor's dtype, shape and place, and the data.
    `cast` is the dtype of floating tensors; None: each its own. `origin` gives the file and key of a tensor like it.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in keys:
        file_of, own = origin(key) if origin else (source.folder / source.files[key], key)
        with safe_open(file_of, framework="pt") as handle:
            entry = handle.get_slice(own)
            name, shape = entry.get_dtype(), entry.get_shape()
            like = FLOATS.get(name) or handle.get_tensor(own).dtype
            width = like.itemsize
        if cast is not None and name in FLOATS:
            name, width = NAMES[cast], cast.itemsize
        start, end = end, end + width * torch.Size(shape).numel()
        header[key] = {"dtype": name, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, (found, blocks) in zip(keys, tensors, strict=True):
            if key != found:
                raise AssertionError(f"{found} came where {key} was due")
            for block in blocks:
                file.write(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if file.tell() != 8 + len(text) + end:
            raise AssertionError(f"{path}: the tensors are not those of the header")
    return end
