"""A merge on disk: one plain PEFT adapter, or a whole checkpoint in the base's own layout.

A checkpoint is streamed from the base's files shard by shard: every key of the base comes out once
under its own name, untouched unless a site changes it, so the key sets agree by construction and a
model is never in memory whole. What was written is handed to `verify` before it takes its name.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from moa.card import CARD, Card
from moa.cli.command import note
from moa.files.atomic import atomic_folder, write_file, write_json
from moa.files.checkpoint_files import (
    INDEX_FILE,
    BaseFiles,
    match_parameters,
    match_sites,
    read_base,
)
from moa.files.peft import base_reference, site_keys, write_expert
from moa.files.shards import write_shard
from moa.merging.adapters import Expert
from moa.merging.merge import MergedSite, update_shape
from moa.merging.report.console import comparison_lines

REPORT_FILE, BASE = "export_report.json", "base_model_name_or_path"
ABOUT = {
    "adapter": "LoRA experts merged into one adapter, which plain PEFT loads.",
    "checkpoint": "LoRA experts merged into their base, as a checkpoint that plain transformers loads.",
}
# Of a base: what loads it, and its license. Not its weights, card, recipe, logs or reports, which are about the base.
COPIED = re.compile(
    r"(?!adapter_).*config\.json|.*(tokenizer|tokens|processor).*\.json|(vocab|merges)\..*|chat_template\..*"
    r"|tekken\.json|.*\.(jinja|model|spm|tiktoken)|(licen[cs]e|notice|use_policy).*",
    re.IGNORECASE,
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# (folder, what its files now mean) -> the report's part on the check
Verify = Callable[[Path, "Written"], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Written:
    """What an export stored, for a reference computation that rounds as the files do."""

    deltas: dict[str, Callable[[], Float[Tensor, "out in"]]]  # site -> dense update, made on call
    dtypes: dict[str, torch.dtype]  # site -> stored dtype of the whole weight; none for an adapter
    cast: torch.dtype | None  # of all other floating tensors; None: as the base has them
    num_keys: int
    is_adapter: bool
    replaced: dict[str, torch.dtype]  # parameters stored anew, such as a trained projector's
    is_float32: bool  # nothing was rounded to a narrower dtype


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What differs from the base's files, by key on disk."""

    updates: dict[str, MergedSite]
    replaced: dict[str, Tensor]
    cast: torch.dtype | None
    transpose: bool  # the base stores [in, out]

    @property
    def keys(self) -> set[str]:
        return {*self.updates, *self.replaced}


def export_adapter(
    out: str | Path,
    merged: Mapping[str, MergedSite],
    experts: Sequence[Expert],
    *,
    base: str | None = None,
    dtype: str = "auto",
    report: Mapping[str, Any] | None = None,
    files: Mapping[str, Any] | None = None,
    card: Mapping[str, Any] | None = None,
    verify: Verify | None = None,
) -> dict[str, Any]:
    """One PEFT adapter, scaling exactly 1, with its report and card; returns the report.

    `dtype` "auto" is the widest of the experts'. `report` is joined to the export's, `files` are
    further files by name: records for JSON, or functions of a path to write to and the report; `card`
    are fields of `Card` that this function cannot know. Raises as `verify` does, and then writes nothing.
    """
    check_out(out)
    stored = stored_dtype(experts, dtype)
    tensors = {}
    for site, result in merged.items():
        key_a, key_b = site_keys(site)
        tensors[key_a], tensors[key_b] = result.lora_a.to(stored), result.lora_b.to(stored)
    written = Written(
        deltas={site: _product(*(tensors[key] for key in site_keys(site))) for site in merged},
        dtypes={},
        cast=None,
        num_keys=len(tensors),
        is_adapter=True,
        replaced={},
        is_float32=stored == torch.float32,
    )
    config = adapter_config(merged, experts, base)
    full = {"kind": "adapter", "dtype": _name(stored), "keys_written": len(tensors)}
    with atomic_folder(out) as temporary:
        made = {"name": Path(out).name, "kind": "adapter", "base": config[BASE], **(card or {})}
        own = made.get("fingerprint")
        write_expert(temporary, tensors, config, name=out, base_fingerprint=own)
        made.setdefault("rows", rows_of(experts, merged))
        return _finish(temporary, {**full, **(report or {})}, files or {}, made, written, verify)


def export_checkpoint(
    out: str | Path,
    merged: Mapping[str, MergedSite],
    experts: Sequence[Expert],
    *,
    base: str | Path,
    dtype: str = "auto",
    max_shard_gb: float = 5.0,
    processor: str | Path | None = None,
    replaced: Mapping[str, Tensor] | None = None,
    report: Mapping[str, Any] | None = None,
    files: Mapping[str, Any] | None = None,
    card: Mapping[str, Any] | None = None,
    verify: Verify | None = None,
) -> dict[str, Any]:
    """The base with the merged update in its weights, in the base's layout; returns the report.

    `dtype` "auto" keeps every tensor's own. `processor` is a folder whose processor and tokenizer
    files replace the base's; `replaced` are whole parameters that do, such as a trained projector,
    by their names in the model. Raises ValueError for a base without a fitting weight for a site, for
    a quantised base, and for a site whose weight the base ties to another one.
    """
    check_out(out)
    source = read_base(base)
    targets = match_sites({site: update_shape(result) for site, result in merged.items()}, source)
    replaced = replaced or {}
    renamed = match_parameters({name: tuple(t.shape) for name, t in replaced.items()}, source)
    cast = None if dtype == "auto" else DTYPES[dtype]
    written = Written(
        deltas={site: _product(r.lora_a, r.lora_b) for site, r in merged.items()},
        dtypes={site: cast or source.dtypes[key] for site, key in targets.items()},
        cast=cast,
        num_keys=len(source.files),
        is_adapter=False,
        replaced={name: cast or source.dtypes[key] for name, key in renamed.items()},
        is_float32=all((cast or d) == torch.float32 for d in source.dtypes.values()),
    )
    changes = Changes(
        updates={key: merged[site] for site, key in targets.items()},
        replaced={renamed[name]: tensor for name, tensor in replaced.items()},
        cast=cast,
        transpose=bool(experts[0].config.get("fan_in_fan_out")),
    )
    full = {"kind": "checkpoint", "dtype": dtype, "keys_written": len(source.files)}
    full |= {"keys_changed": sorted(changes.keys), "keys_of_base": len(source.files)}
    with atomic_folder(out) as temporary:
        _write_shards(temporary, source, changes, max_shard_gb)
        copy_other_files(source.folder, temporary, cast)
        if processor is not None:
            _copy_processor(Path(processor), temporary)
        if set(read_base(temporary).files) != set(source.files):
            raise AssertionError("the checkpoint's keys differ from the base's")
        made = {"name": Path(out).name, "kind": "checkpoint", "base": str(base), **(card or {})}
        made.setdefault("rows", rows_of(experts, merged))
        return _finish(temporary, {**full, **(report or {})}, files or {}, made, written, verify)


def rows_of(
    experts: Sequence[Expert],
    merged: Mapping[str, MergedSite],
    folders: Sequence[str | Path] | None = None,
) -> list[tuple[str, str, str]]:
    """The card's row of each expert: its name, its weight, its folder."""
    weights = torch.stack([site.weights for site in merged.values()])
    same = (weights == weights[0]).all(0).tolist()
    found = [
        f"{w:.4g}" if s else "per site" for w, s in zip(weights[0].tolist(), same, strict=True)
    ]
    names = [expert.name for expert in experts]
    return list(zip(names, found, map(str, folders or [""] * len(names)), strict=True))


def adapter_config(
    merged: Mapping[str, MergedSite], experts: Sequence[Expert], base: str | None
) -> dict[str, Any]:
    """A config of full paths with alpha == rank everywhere, patterns only where ranks differ."""
    ranks = {site: result.lora_a.shape[0] for site, result in merged.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT reads a pattern as the regular expression of a path's end: ^ and escapes make it a path.
    pattern = {f"^{re.escape(site)}": rank for site, rank in ranks.items() if rank != usual}
    configs = [expert.config for expert in experts]
    tasks = {config.get("task_type") for config in configs}
    bases = [config.get(BASE) for config in configs]
    return {
        "task_type": tasks.pop() if len(tasks) == 1 else None,
        BASE: base_reference(base) if base else next(filter(None, bases), None),
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": sorted(ranks),
        "fan_in_fan_out": bool(configs[0].get("fan_in_fan_out")),
        "lora_dropout": 0.0,
        "use_rslora": False,
    }


def _write_shards(
    out: Path,
    source: BaseFiles,
    changes: Changes,
    max_shard_gb: float,
) -> None:
    shards = plan_shards(source, changes.cast, max_shard_gb * 1e9)
    for name, keys in zip(shard_names(len(shards)), shards, strict=True):
        write_shard(out / name, source, keys, _changed_tensors(source, keys, changes), changes.cast)
    write_index(out, source, shards, changes.cast)


def shard_names(count: int) -> list[str]:
    """File names of the shards, as transformers looks for them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_index(
    out: Path, source: BaseFiles, shards: Sequence[Sequence[str]], cast: torch.dtype | None
) -> None:
    """Which key lies in which shard; nothing where there is one shard."""
    if len(shards) == 1:
        return
    names = shard_names(len(shards))
    where = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    total = sum(_bytes(source, key, cast) for key in source.files)
    write_json(out / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": where})


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


def _changed_tensors(
    source: BaseFiles, keys: Sequence[str], changes: Changes
) -> Iterator[tuple[str, list[Tensor]]]:
    for key in keys:
        with safe_open(source.folder / source.files[key], framework="pt") as handle:
            tensor = handle.get_tensor(key)
        floating = tensor.is_floating_point()
        dtype = changes.cast if changes.cast and floating else tensor.dtype
        tensor = changes.replaced.get(key, tensor)
        if key in changes.updates:
            delta = changes.updates[key].lora_b @ changes.updates[key].lora_a
            # In the wide dtype of the algebra, and rounded once to what is stored.
            tensor = tensor.to(delta.dtype) + (delta.T if changes.transpose else delta)
        stored = tensor.to(dtype).contiguous()
        if key in changes.keys and not torch.isfinite(stored).all():
            raise ValueError(f"dtype: {key} does not fit in {_name(dtype)}")
        yield key, [stored]


def copy_other_files(source: Path, out: Path, cast: torch.dtype | None) -> None:
    """Config, processor, tokenizer, templates and license of a base: what `COPIED` matches.

    A link that leads out of the base's folder (of the hub's cache: of the model's) is left out, with a note: what it
    names is not the base's to hand on.
    """
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
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = _name(cast)
        config["dtype"] = _name(cast)
        write_json(out / "config.json", config)


def _copy_processor(source: Path, out: Path) -> None:
    if not source.is_dir():
        raise ValueError(f"processor: {source} is not a folder")
    for file in sorted(source.iterdir()):
        if file.is_file() and COPIED.fullmatch(file.name) and file.name != "config.json":
            shutil.copyfile(file, out / file.name)


def check_out(out: str | Path, inputs: Iterable[str | Path] = ()) -> None:
    """ValueError where writing `out` would replace an input, or a folder that is no earlier export."""
    folder = Path(out)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / REPORT_FILE).is_file():
        raise ValueError(f"out: {out} holds other things; only an earlier export is replaced")
    for given in map(Path, inputs):
        if folder.resolve() in (given.resolve(), *given.resolve().parents):
            raise ValueError(f"out: {out} would replace {given}, which is merged; name another")


def _finish(
    folder: Path,
    report: dict[str, Any],
    files: Mapping[str, Any],
    card: Mapping[str, Any],
    written: Written,
    verify: Verify | None,
) -> dict[str, Any]:
    report["verified"] = verify is not None
    if verify is not None:
        report |= verify(folder, written)
    for name, value in files.items():
        if callable(value):
            value(folder / name, report)
        else:
            write_json(folder / name, value)
    made = {"about": ABOUT[report["kind"]], "checks": comparison_lines(report), **card}
    write_file(folder / CARD, Card(**made).text())
    write_json(folder / REPORT_FILE, report)
    return report


def stored_dtype(experts: Sequence[Expert], dtype: str = "auto") -> torch.dtype:
    """What an adapter is written in: "auto" is the widest that an expert is stored in."""
    if dtype != "auto":
        return DTYPES[dtype]
    stored = [expert.read(next(iter(expert.ranks)))[0].dtype for expert in experts]
    widest = stored[0]
    for other in stored[1:]:
        widest = torch.promote_types(widest, other)
    return widest


def _product(lora_a: Tensor, lora_b: Tensor) -> Callable[[], Tensor]:
    return lambda: lora_b.double() @ lora_a.double()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
