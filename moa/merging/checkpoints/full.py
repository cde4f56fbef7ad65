"""Whole checkpoints of one base, merged tensor by tensor from shards to shards.

What a method sees are the differences from the base, in blocks of rows read from the files, so that memory is a block
of every model and one tensor of the result. The manifest has each key's line: which rule it met, and what came out.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moa.backbones.fingerprint import computing
from moa.files.checkpoint_files import FLOATS, BaseFiles, read_base
from moa.files.peft import all_finite
from moa.files.spelling import match_spelling
from moa.merging.export import folder as export_folder
from moa.merging.methods.method import import_function
from moa.merging.methods.stack import BLOCK_VALUES, Stack
from moa.merging.methods.table import check_options, find_method
from moa.merging.settings import Rules
from moa.merging.site_plan import find_depths
from moa.merging.weights import Weights, weight_row

COMPUTE = torch.float32


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint, by the base's spelling of its keys."""

    files: BaseFiles
    keys: dict[str, str]  # key of the base -> its own


@dataclass(frozen=True, kw_only=True)
class Inputs:
    base: BaseFiles
    models: dict[str, Model]  # by name
    kept: dict[str, str]  # key -> why the base's own tensor is written
    dropped: dict[str, list[str]]  # key -> the models whose tensor goes nowhere


def merge_checkpoints(
    out: str | Path,
    models: Mapping[str, str | Path],
    base: str | Path,
    *,
    method: str = "linear",
    options: Mapping[str, Any] | None = None,
    weights: Weights | None = None,
    rules: Rules | None = None,
    dtype: str = "auto",
    max_shard_gb: float = 5.0,
    on_key: Callable[[str], None] = lambda key: None,
) -> dict[str, Any]:
    """The base plus the merged differences of the models, in the base's layout; returns the manifest.

    `models` are checkpoint folders by name, and `weights` go by these names. Methods work on the dense differences;
    those on factors have no meaning here. Integer tensors are the base's. Raises ValueError for inputs that do not
    fit together and no rule covers, and then writes nothing.
    """
    export_folder.check_out(out)
    row = find_method(method)
    if row.joint:
        raise ValueError(f"method: {method} works on LoRA factors, which checkpoints do not have")
    if row.reads_inputs:
        raise ValueError(f"method: {method} reads statistics of inputs, which lie beside adapters, not checkpoints")
    settings = check_options(method, options or {})
    inputs = open_inputs(models, base, rules or Rules())
    chosen = weight_row([*inputs.models], weights, row.weights).to(COMPUTE)
    depths = find_depths(tuple(inputs.base.files))
    changed = dict.fromkeys(key for key in inputs.base.files if key not in inputs.kept)
    if row.prepare:
        stacks = (difference_stack(inputs, key, depths[key]) for key in changed)
        settings["shared"] = import_function(f"methods.{row.prepare}")(stacks, **settings)
    cast = None if dtype == "auto" else export_folder.DTYPES[dtype]

    def update(key: str) -> Tensor:
        return row.function(difference_stack(inputs, key, depths[key]), chosen, **settings)

    results = partial(updated, inputs.base, changed=changed, update=update, cast=cast, on_key=on_key)
    manifest, share = _manifest(inputs, method), dict(zip(inputs.models, chosen.tolist(), strict=True))
    report = {"method": method, "options": dict(options or {}), "weights": share, "dtype": dtype}
    text = f"{len(models)} checkpoints of one base merged by `{method}`, tensor by tensor."
    card = {"about": text, "rows": [(name, f"{share[name]:.4g}", str(folder)) for name, folder in models.items()]}
    size: dict[str, Any] = {"cast": cast, "max_shard_gb": max_shard_gb}
    export_folder.write_checkpoint(out, inputs.base, results, report, manifest, card, **size)
    return manifest


def open_inputs(models: Mapping[str, str | Path], base: str | Path, rules: Rules) -> Inputs:
    """The headers of all inputs, and which keys a rule takes out; ValueError where none does."""
    if not models:
        raise ValueError("models: names none")
    root = read_base(base)
    opened = {name: _open_model(name, folder, root) for name, folder in models.items()}
    floating = {key for key, dtype in root.dtypes.items() if dtype.is_floating_point}
    kept = {key: "not floating: the base's" for key in root.files if key not in floating}
    dropped: dict[str, list[str]] = {}
    for name, model in opened.items():
        _check_rule(name, "missing", [key for key in root.files if key not in model.keys], rules)
        _check_floats(name, model, root)
        _check_config(name, model, root, rules.config)
        shapes = {key: model.files.shapes[own] for key, own in model.keys.items()}
        odd = [key for key in root.files if shapes.get(key, root.shapes[key]) != root.shapes[key]]
        _check_rule(name, "shape", odd, rules)
        kept |= dict.fromkeys(odd, f"shape differs in {name}: the base's")
        extra = sorted(model.files.files.keys() - set(model.keys.values()))
        _check_rule(name, "extra", extra, rules)
        for key in extra:
            dropped.setdefault(key, []).append(name)
    for key in root.files:
        if not any(key in model.keys for model in opened.values()):
            kept.setdefault(key, "missing in every model: the base's")
    if kept.keys() == root.files.keys():
        raise ValueError(
            f"base: {root.folder}: no weight would be merged: {kept[next(iter(kept))]} (and {len(kept) - 1} others); "
            f"weights must be stored as {', '.join(FLOATS)}"
        )
    return Inputs(base=root, models=opened, kept=kept, dropped=dropped)


def _open_model(name: str, folder: str | Path, base: BaseFiles) -> Model:
    """ValueError for a folder that shares so few keys with the base that it is hardly a model of it."""
    files = read_base(folder, f"models.{name}")
    # DistributedDataParallel puts `module.` before every key; a key that is the base's as it is comes first.
    stripped = {key.removeprefix("module."): key for key in files.files}
    stripped |= {key: key for key in files.files if key in base.files}
    matched = match_spelling(base.files, stripped)
    model = Model(files=files, keys={key: stripped[own] for key, own in matched.items()})
    if 2 * len(model.keys) < len(base.files):
        raise ValueError(
            f"models.{name}: {folder} shares {len(model.keys)} of the {len(base.files)} keys of the base "
            f"{base.folder}, such as {next(iter(files.files))} there and {next(iter(base.files))} here; "
            "base= must be the checkpoint that the model was trained from"
        )
    return model


def _check_floats(name: str, model: Model, base: BaseFiles) -> None:
    """ValueError for packed weights, whose numbers mean nothing without their scales."""
    floating = [own for key, own in model.keys.items() if base.dtypes[key].is_floating_point]
    if packed := [own for own in floating if not model.files.dtypes[own].is_floating_point]:
        raise ValueError(
            f"models.{name}: {packed[0]} is not stored as {', '.join(FLOATS)} and is so in the base (and "
            f"{len(packed) - 1} others); save the model in one of these"
        )


def _check_config(name: str, model: Model, base: BaseFiles, rule: str) -> None:
    """ValueError for another architecture, or a value by which the model computes otherwise than the base.

    A key that only one of them has is not a difference: versions of transformers store more or fewer defaults.
    """
    where = f"models.{name}: config.json has"
    kinds = [files.config.get("model_type") for files in (base, model.files)]
    if None not in kinds and kinds[0] != kinds[1]:
        raise ValueError(
            f"{where} model_type {kinds[1]!r}, and that of the base {base.folder} {kinds[0]!r}; "
            "base= must be the checkpoint that the model was trained from"
        )
    odd = next(differences(computing(base.config), computing(model.files.config)), None)
    if odd is not None and rule == "error":
        key, wanted, found = odd
        raise ValueError(
            f"{where} {key}={found!r}, and that of the base {base.folder} {wanted!r}, which the result would get; "
            "rules.config=base accepts that"
        )


def differences(one: Any, other: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value of the one, of the other) of what two configs both have and hold otherwise."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in (name for name in one if name in other):
            yield from differences(one[name], other[name], f"{key}.{name}".lstrip("."))
    elif one != other:
        yield key, one, other


# rule -> what is wrong with a key, and what to do about it
WAYS = {
    "missing": ("is missing", "base takes the base's"),
    "shape": ("has another shape than the base's", "base keeps the base's"),
    "extra": ("is not in the base", "drop leaves it out"),
}


def _check_rule(name: str, rule: str, keys: Sequence[str], rules: Rules) -> None:
    if keys and getattr(rules, rule) == "error":
        what, way = WAYS[rule]
        others = f" (and {len(keys) - 1} others)" if len(keys) > 1 else ""
        raise ValueError(f"models.{name}: {keys[0]} {what}{others}; rules.{rule}={way}")


def difference_stack(inputs: Inputs, key: str, depth: float) -> Stack:
    """The models' differences from the base at one key, as matrices; vectors are one row."""
    shape = inputs.base.shapes[key]
    rows = shape[0] if len(shape) > 1 else 1
    cols = torch.Size(shape[1:] if len(shape) > 1 else shape).numel()
    base = mapped(inputs.base, key).view(rows, cols)
    having = {
        index: (f"models.{name}", model.files, model.keys[key])
        for index, (name, model) in enumerate(inputs.models.items())
        if key in model.keys
    }
    opened = {i: mapped(files, own).view(rows, cols) for i, (_, files, own) in having.items()}

    def read(start: int, stop: int) -> Tensor:
        own = finite(base[start:stop].to(COMPUTE), "base", inputs.base, key)
        block = torch.zeros(len(inputs.models), *own.shape, dtype=COMPUTE)
        for index, tensor in opened.items():
            torch.sub(finite(tensor[start:stop], *having[index]), own, out=block[index])
        return block

    names = tuple(inputs.models)
    ranks = (min(rows, cols),) * len(names)
    return Stack(site=key, experts=names, ranks=ranks, shape=(rows, cols), read=read, depth=depth)


def mapped(files: BaseFiles, key: str) -> Tensor:
    """A tensor on the disk: nothing is read before it is used, and its file stays mapped as long as it lives."""
    with safe_open(files.folder / files.files[key], framework="pt") as file:
        return file.get_tensor(key)


def finite(block: Tensor, what: str, files: BaseFiles, key: str) -> Tensor:
    """The block; ValueError naming the model, its file and key where a value is NaN or infinite."""
    if not all_finite(block):
        raise ValueError(f"{what}: {files.folder / files.files[key]}: {key} has NaN or infinite values")
    return block


def updated(
    base: BaseFiles,
    keys: Sequence[str],
    changed: Collection[str],
    update: Callable[[str], Tensor],
    cast: torch.dtype | None,
    on_key: Callable[[str], None] = lambda key: None,
) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """Each key with its tensor of the base, to which its update is added where it is `changed`."""
    for key in keys:
        own = mapped(base, key)
        if key in changed:
            yield key, added(key, own, update(key), cast or own.dtype)
        else:
            yield key, iter([own.to(cast) if cast and own.is_floating_point() else own])
        on_key(key)


def added(key: str, own: Tensor, merged: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """base + merged in the stored dtype, in blocks of rows; ValueError where a value is not finite, or does not fit."""
    own, step = own.view(merged.shape), max(1, BLOCK_VALUES // merged.shape[1])
    for start in range(0, len(merged), step):
        rows = slice(start, start + step)
        stored = merged[rows].add_(own[rows]).to(dtype)
        if not all_finite(stored):
            raise ValueError(f"{key}: the merge has values that are not finite, or do not fit in {dtype}")
        yield stored


def _manifest(inputs: Inputs, method: str) -> dict[str, Any]:
    """Key -> the rule it met, the models that have it, and the key that came out (none: dropped)."""
    lines: dict[str, dict[str, Any]] = {}
    for key in inputs.base.files:
        own = {name: model.keys[key] for name, model in inputs.models.items() if key in model.keys}
        lines[key] = {"rule": inputs.kept.get(key, method), "models": list(own), "output": key}
        if other := {name: spelled for name, spelled in own.items() if spelled != key}:
            lines[key]["spelled"] = other
    for key, names in inputs.dropped.items():
        lines[key] = {"rule": "extra: dropped", "models": names, "output": None}
    return lines
