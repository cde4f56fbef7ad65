"""A merge on disk: one plain PEFT adapter, or a whole checkpoint in the base's own layout.

A checkpoint is streamed from the base's files shard by shard, so that a model is never in memory whole. Every key of
the base comes out once, untouched unless a site changes it. `verify` reads the files before they take their name.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from moa.files.atomic import atomic_folder
from moa.files.checkpoint_files import match_parameters, match_sites, read_base
from moa.files.peft import base_reference, site_keys, write_expert
from moa.merging.adapters import Expert
from moa.merging.export.folder import (
    DTYPES,
    check_out,
    copy_other_files,
    copy_processor,
    dtype_name,
    write_report,
    write_weights,
)
from moa.merging.merge import Merged
from moa.merging.report.console import comparison_lines

BASE = "base_model_name_or_path"
ABOUT = {
    "adapter": "LoRA experts merged into one adapter, which plain PEFT loads.",
    "checkpoint": "LoRA experts merged into their base, as a checkpoint that plain transformers loads.",
}
# (folder, what its files now mean) -> the report's part on the check
Verify = Callable[[Path, "Written"], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Written:
    """What an export stored, for a reference computation that rounds as the files do."""

    deltas: dict[str, Callable[[], Float[Tensor, "out in"]]]  # site -> dense update, made on call
    num_keys: int
    is_float32: bool  # nothing was rounded to a narrower dtype
    is_adapter: bool = False
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # site -> of its whole weight
    cast: torch.dtype | None = None  # of all other floating tensors; None: as the base has them
    replaced: dict[str, torch.dtype] = field(default_factory=dict)  # parameters stored anew


def export_adapter(
    out: str | Path,
    merged: Merged,
    experts: Sequence[Expert],
    *,
    base: str | None = None,
    dtype: str = "auto",
    verify: Verify | None = None,
    **about: Any,
) -> dict[str, Any]:
    """One PEFT adapter, scaling exactly 1, with its report and card; returns the report.

    `dtype` "auto" is the widest of the experts'. `about` are `report`, which is joined to the export's, `files` of
    `write_report`, and `card`, further fields of `Card`. Raises as `verify` does.
    """
    check_out(out)
    stored = stored_dtype(experts, dtype)
    tensors = tensors_of(merged, stored)
    written = Written(
        deltas={site: _product(*(tensors[key] for key in site_keys(site))) for site in merged},
        num_keys=len(tensors),
        is_float32=stored == torch.float32,
        is_adapter=True,
    )
    config = adapter_config(merged, experts, base)
    report = {"kind": "adapter", "dtype": dtype_name(stored), "keys_written": len(tensors)}
    card = {"base": config[BASE], "rows": rows_of(experts, merged)} | about.pop("card", {})
    with atomic_folder(out) as folder:
        write_expert(folder, tensors, config, name=out, base_fingerprint=card.get("fingerprint"))
        return _finish(folder, Path(out).name, report, card, written, verify, **about)


def export_checkpoint(
    out: str | Path,
    merged: Merged,
    experts: Sequence[Expert],
    *,
    base: str | Path,
    dtype: str = "auto",
    max_shard_gb: float = 5.0,
    processor: str | Path | None = None,
    replaced: Mapping[str, Tensor] | None = None,
    verify: Verify | None = None,
    **about: Any,
) -> dict[str, Any]:
    """The base with the merged update in its weights, in the base's layout; returns the report.

    `dtype` "auto" keeps every tensor's own. `processor` is a folder whose processor and tokenizer files replace the
    base's; `replaced` are whole parameters that do, such as a trained projector, by their names in the model; `about`
    as for an adapter. Raises ValueError for a base without a fitting weight for a site, for a quantised base, and for
    a site whose weight the base ties to another one.
    """
    check_out(out)
    source, replaced = read_base(base), replaced or {}
    sizes = {site: (len(r.lora_b), r.lora_a.shape[1]) for site, r in merged.items()}
    targets = match_sites(sizes, source)
    renamed = match_parameters({name: tuple(t.shape) for name, t in replaced.items()}, source)
    cast = None if dtype == "auto" else DTYPES[dtype]
    written = Written(
        deltas={site: _product(r.lora_a, r.lora_b) for site, r in merged.items()},
        dtypes={site: cast or source.dtypes[key] for site, key in targets.items()},
        cast=cast,
        num_keys=len(source.files),
        replaced={name: cast or source.dtypes[key] for name, key in renamed.items()},
        is_float32=all((cast or d) == torch.float32 for d in source.dtypes.values()),
    )
    updates = {key: merged[site] for site, key in targets.items()}
    anew = {renamed[name]: tensor for name, tensor in replaced.items()}
    changed, transpose = {*updates, *anew}, bool(experts[0].config.get("fan_in_fan_out"))

    def tensors(keys: Sequence[str]) -> Iterator[tuple[str, list[Tensor]]]:
        for key in keys:
            with safe_open(source.folder / source.files[key], framework="pt") as handle:
                tensor = handle.get_tensor(key)
            stored = cast if cast and tensor.is_floating_point() else tensor.dtype
            tensor = anew.get(key, tensor)
            if key in updates:
                delta = updates[key].lora_b @ updates[key].lora_a
                # In the wide dtype of the algebra, and rounded once to what is stored.
                tensor = tensor.to(delta.dtype) + (delta.T if transpose else delta)
            tensor = tensor.to(stored).contiguous()
            if key in changed and not torch.isfinite(tensor).all():
                raise ValueError(f"dtype: {key} does not fit in {dtype_name(stored)}")
            yield key, [tensor]

    count = len(source.files)
    report = {"kind": "checkpoint", "dtype": dtype, "keys_written": count}
    report |= {"keys_changed": sorted(changed), "keys_of_base": count}
    card = {"base": str(base), "rows": rows_of(experts, merged)} | about.pop("card", {})
    with atomic_folder(out) as folder:
        write_weights(folder, source, tensors, cast, max_shard_gb)
        copy_other_files(source.folder, folder, cast)
        if processor is not None:
            copy_processor(Path(processor), folder)
        if set(read_base(folder).files) != set(source.files):
            raise AssertionError("the checkpoint's keys differ from the base's")
        return _finish(folder, Path(out).name, report, card, written, verify, **about)


def _finish(
    folder: Path,
    name: str,
    own: dict[str, Any],
    card: Mapping[str, Any],
    written: Written,
    verify: Verify | None,
    report: Mapping[str, Any] | None = None,
    files: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    full = {**own, **(report or {}), "verified": verify is not None}
    if verify is not None:
        full |= verify(folder, written)
    about = {"about": ABOUT[full["kind"]], "checks": comparison_lines(full)}
    write_report(folder, full, files or {}, {"name": name, "kind": full["kind"], **about, **card})
    return full


def tensors_of(merged: Merged, dtype: torch.dtype) -> dict[str, Tensor]:
    pairs = ((site_keys(s), (found.lora_a, found.lora_b)) for s, found in merged.items())
    return {k: v.to(dtype) for keys, both in pairs for k, v in zip(keys, both, strict=True)}


def rows_of(
    experts: Sequence[Expert], merged: Merged, folders: Sequence[str | Path] | None = None
) -> list[tuple[str, str, str]]:
    """The card's row of each expert: its name, its weight, its folder."""
    weights = torch.stack([site.weights for site in merged.values()])
    same = (weights == weights[0]).all(0).tolist()
    rows = zip(experts, weights[0].tolist(), same, folders or [""] * len(same), strict=True)
    return [(e.name, f"{w:.4g}" if s else "per site", str(folder)) for e, w, s, folder in rows]


def adapter_config(merged: Merged, experts: Sequence[Expert], base: str | None) -> dict[str, Any]:
    """A config of full paths with alpha == rank everywhere, patterns only where ranks differ."""
    ranks = {site: result.lora_a.shape[0] for site, result in merged.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT reads a pattern as the regular expression of a path's end: ^ and escapes make it a path.
    pattern = {f"^{re.escape(site)}": rank for site, rank in ranks.items() if rank != usual}
    configs = [expert.config for expert in experts]
    tasks = {config.get("task_type") for config in configs}
    bases = (config[BASE] for config in configs if config.get(BASE))
    return {
        "task_type": tasks.pop() if len(tasks) == 1 else None,
        BASE: base_reference(base) if base else next(bases, None),
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": sorted(ranks),
        "fan_in_fan_out": bool(configs[0].get("fan_in_fan_out")),
        "lora_dropout": 0.0,
        "use_rslora": False,
    }


def stored_dtype(experts: Sequence[Expert], dtype: str = "auto") -> torch.dtype:
    """What an adapter is written in: "auto" is the widest that an expert is stored in."""
    if dtype != "auto":
        return DTYPES[dtype]
    stored = (expert.read(next(iter(expert.ranks)))[0].dtype for expert in experts)
    return functools.reduce(torch.promote_types, stored)


def _product(lora_a: Tensor, lora_b: Tensor) -> Callable[[], Tensor]:
    return lambda: lora_b.double() @ lora_a.double()
