"""Passthrough: slices of layers from one or several checkpoints, stacked into one of another depth.

As mergekit's `passthrough` (depth up-scaling, "frankenmerges"). All that is not a layer of the stack (embeddings, last
norm, head, other towers) is the first slice's model's. Tensors go from file to file one at a time.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from moa.files.checkpoint_files import BaseFiles, read_base
from moa.merging.export.folder import check_out, write_checkpoint
from moa.merging.settings import Slice

Models = Mapping[str, BaseFiles]  # as the user named them
Origins = dict[str, tuple[str, str]]  # key of the result -> model, key there
DEPTH, KINDS = "num_hidden_layers", "layer_types"  # keys of a config
LAYER = re.compile(r"(?P<stack>.+?)\.(?P<index>\d+)\.(?P<rest>.+)")


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """The checkpoint to be: its headers and config, and where each tensor comes from."""

    slices: Sequence[Slice]
    models: Models
    files: BaseFiles
    origins: Origins


def plan_stack(slices: Sequence[Slice], stack: str | None = None) -> Stacked:
    """What the slices make, from headers alone.

    `stack` is the path of the layers (`model.layers`), needed only where a model has several. Raises ValueError for
    layers that a model lacks, and for slices whose layers differ in tensors, shapes or dtypes.
    """
    if not slices:
        raise ValueError("slices: names none; give [{model: FOLDER, layers: [start, stop]}, ...]")
    models = {part.model: read_base(part.model) for part in slices}
    first = models[slices[0].model]
    path = stack or find_stack(first)
    origins = _origins(models, slices, path)
    tables: dict[str, Any] = {
        name: {key: getattr(models[model], name)[own] for key, (model, own) in origins.items()}
        for name in ("files", "shapes", "dtypes")
    }
    files = replace(first, config=stacked_config(models, slices, path), **tables)
    return Stacked(slices=slices, models=models, files=files, origins=origins)


def write_stack(
    out: str | Path, stacked: Stacked, *, max_shard_gb: float = 5.0, on_key: Callable[[str], None] = lambda key: None
) -> dict[str, Any]:
    """Write the stacked checkpoint; returns the manifest: key -> model, key there."""
    check_out(out)
    manifest = {key: {"model": model, "key": own} for key, (model, own) in stacked.origins.items()}
    slices = [{"model": part.model, "layers": list(part.layers)} for part in stacked.slices]

    def tensors(keys: Sequence[str]) -> Iterator[tuple[str, list[Tensor]]]:
        for key in keys:
            file, own = place(key)
            with safe_open(file, framework="pt") as handle:
                yield key, [handle.get_tensor(own)]
            on_key(key)

    def place(key: str) -> tuple[Path, str]:
        model, own = stacked.origins[key]
        return stacked.models[model].folder / stacked.models[model].files[own], own

    report = {"method": "passthrough", "slices": slices}
    rows = [
        (f"slice {number}", f"layers {part.layers[0]} to {part.layers[1] - 1}", part.model)
        for number, part in enumerate(stacked.slices)
    ]
    text = "Layers of checkpoints stacked into a model of another depth; it needs training."
    card = {"about": text, "rows": rows}
    write_checkpoint(out, stacked.files, tensors, report, manifest, card, max_shard_gb=max_shard_gb, origin=place)
    return manifest


def find_stack(files: BaseFiles) -> str:
    """The one stack of layers that a model has; ValueError naming all where there are more."""
    stacks = sorted({match["stack"] for key in files.files if (match := LAYER.fullmatch(key))})
    deep = [stack for stack in stacks if depth_of(files, stack) > 1] or stacks
    if len(deep) != 1:
        raise ValueError(f"stack: {files.folder} has {deep or 'no numbered layers'}; name one")
    return deep[0]


def depth_of(files: BaseFiles, stack: str) -> int:
    found = [m for key in files.files if (m := LAYER.fullmatch(key)) and m["stack"] == stack]
    if not found:
        raise ValueError(f"stack: {files.folder} has no layers at {stack}")
    return 1 + max(int(match["index"]) for match in found)


def _origins(models: Models, slices: Sequence[Slice], stack: str) -> Origins:
    """The layers in the place where the first model has them."""
    first = slices[0].model
    layers = _stacked(models, slices, stack)
    origins: Origins = {}
    for key in models[first].files:
        match = LAYER.fullmatch(key)
        if match and match["stack"] == stack:
            origins |= layers  # all at the first layer's place; again is no change
        else:
            origins[key] = first, key
    return origins


def _stacked(models: Models, slices: Sequence[Slice], stack: str) -> Origins:
    layers: Origins = {}
    pattern: dict[str, Any] | None = None
    number = 0
    for part in slices:
        files = models[part.model]
        depth = depth_of(files, stack)
        if part.layers[1] > depth:
            raise ValueError(f"slices: {part.model} has layers 0 to {depth - 1} at {stack}, not {list(part.layers)}")
        for index in range(*part.layers):
            prefix = f"{stack}.{index}."
            own = {key.removeprefix(prefix): key for key in files.files if key.startswith(prefix)}
            shape = {rest: (files.shapes[key], files.dtypes[key]) for rest, key in own.items()}
            pattern = pattern or shape
            if shape != pattern:
                odd = sorted(k for k in {*shape, *pattern} if shape.get(k) != pattern.get(k))
                raise ValueError(
                    f"slices: {prefix}{odd[0]} of {part.model} is {shape.get(odd[0], 'missing')}, in the first "
                    f"layer taken it is {pattern.get(odd[0], 'missing')}; stacked layers must be alike"
                )
            for rest, key in own.items():
                layers[f"{stack}.{number}.{rest}"] = part.model, key
            number += 1
    return layers


def stacked_config(models: Models, slices: Sequence[Slice], stack: str) -> dict[str, Any]:
    """The first model's config with the new depth, and with each layer's own kind where layers have kinds."""
    config = models[slices[0].model].config
    parts = "vision_config" in config and "text_config" in config
    name = ("vision_config" if "vision" in stack else "text_config") if parts else None
    part = config[name] if name else config
    depth = depth_of(models[slices[0].model], stack)
    if part.get(DEPTH, depth) != depth:
        raise ValueError(f"stack: {stack} has {depth} layers, but {name or 'the config'} has {part[DEPTH]}")
    changes: dict[str, Any] = {DEPTH: sum(p.layers[1] - p.layers[0] for p in slices)}
    if part.get(KINDS):
        own = {key: f.config[name] if name else f.config for key, f in models.items()}
        changes[KINDS] = [own[p.model][KINDS][index] for p in slices for index in range(*p.layers)]
    if not name:
        return {**config, **changes}
    # Older CLIP configs hold a part twice, and the copy wins when transformers loads it.
    copies = [key for key in (name, f"{name}_dict") if isinstance(config.get(key), dict)]
    return {**config, **{key: {**config[key], **changes} for key in copies}}
