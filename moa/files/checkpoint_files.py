"""The weight files of a local checkpoint, and which of their keys a module's path means."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moa.cli.settings import expanded
from moa.files.peft import FLOATS
from moa.files.peft_config import read_json_object
from moa.files.spelling import match_spelling, nearest, signature

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class BaseFiles:
    """The weight files of a local checkpoint: which file holds a key, and its header entry."""

    folder: Path
    files: dict[str, str]  # key -> file name
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    config: dict[str, Any]


def config_parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """A config and those inside it, such as of the language model and the vision tower."""
    return [config, *(value for value in config.values() if isinstance(value, dict))]


def read_base(folder: str | Path, what: str = "base") -> BaseFiles:
    """The keys of a local safetensors checkpoint, from headers alone; ValueError names `what` it is to the user."""
    folder = Path(folder)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{what}: {folder} has no config.json; it must be a local checkpoint folder")
    config = read_json_object(config_file)
    for quantised in filter(None, (part.get("quantization_config") for part in config_parts(config))):
        method = isinstance(quantised, dict) and quantised.get("quant_method") or "some method"
        raise ValueError(
            f"{what}: {config_file}: quantization_config says that its weights are packed by {method}, so no update "
            "can be added to them on a CPU; give base= the weights it was made from, or write an adapter for it "
            "with verify=false"
        )
    files, shapes, dtypes = {}, {}, {}
    for name in weight_files(folder, what):
        try:
            with safe_open(folder / name, framework="pt") as handle:
                for key in list(handle.keys()):
                    entry = handle.get_slice(key)
                    files[key], shapes[key] = name, tuple(entry.get_shape())
                    dtypes[key] = FLOATS.get(entry.get_dtype(), torch.uint8)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{what}: {folder / name} is not readable ({error})") from None
    return BaseFiles(folder=folder, files=files, shapes=shapes, dtypes=dtypes, config=config)


def local_base(name: str, what: str = "base") -> Path:
    """The folder of a base: itself, or what the hub has under this name; ValueError names `what` it is to the user."""
    folder = Path(expanded(name))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{what}: {name} has no config.json; it must be a model's folder")
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"{what}: {name} is not a folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pt", "*.h5", "*.msgpack"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(f"{what}: {name} is not a folder, nor on the hub ({error})") from None


def match_sites(sites: Mapping[str, tuple[int, int]], base: BaseFiles) -> dict[str, str]:
    """Site -> key of its weight on disk; ValueError as of `match_parameters`, and for a weight tied to another."""
    tied = any(part.get("tie_word_embeddings") for part in config_parts(base.config))
    for site in sites:
        if tied and site.rpartition(".")[2] in ("lm_head", "embed_tokens"):
            raise ValueError(f"site {site}: the base ties it to another weight, which would change")
    found = match_parameters({f"{site}.weight": shape for site, shape in sites.items()}, base)
    return {site: found[f"{site}.weight"] for site in sites}


def match_parameters(parameters: Mapping[str, tuple[int, ...]], base: BaseFiles) -> dict[str, str]:
    """Name of a parameter in the model -> its key on disk, [out, in] or stored as [in, out].

    transformers renames on loading (spelling.py), but keeps the numbers, the order of words and the end of a path. So
    the key is this name in another spelling, or else shares the longest sequence of words, its numbers and shape.
    """
    spelled = match_spelling(parameters, base.files)
    by_end: dict[tuple[str, ...], list[str]] = {}
    for key in base.files:
        by_end.setdefault(signature(key), []).append(key)
    found: dict[str, str] = {}
    for name, shape in parameters.items():
        known = by_end.get(signature(name), [])
        best = [spelled[name]] if name in spelled else nearest(name, known)
        if len(best) != 1:
            fits = "no weight fits" if not best else f"{best} fit equally"
            raise ValueError(f"{name}: {fits} this name in the base {base.folder}")
        key = best[0]
        if base.shapes[key] not in (shape, shape[::-1]):
            raise ValueError(
                f"{name}: made for another base: it is {list(shape)}, and "
                f"{list(base.shapes[key])} at {key} of {base.folder}"
            )
        found[name] = key
    if shared := [key for key, count in Counter(found.values()).items() if count > 1]:
        names = [name for name, key in found.items() if key == shared[0]]
        raise ValueError(f"{names} all fit the one weight {shared[0]} of {base.folder}")
    return found


def weight_files(folder: Path, what: str = "base") -> list[str]:
    """The safetensors files that transformers reads: one file, else those of the index."""
    if (folder / WEIGHTS_FILE).is_file():
        return [WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        found = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
        pickled = f"; {found[0]} is a pickle, and is not opened: save it as safetensors" if found else ""
        raise ValueError(f"{what}: {folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}{pickled}")
    where = read_json_object(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{what}: {index}: weight_map must map keys to file names")
    for key, name in where.items():
        if not isinstance(name, str) or Path(name).name != name or not name:
            raise ValueError(f"{what}: {index}: weight_map.{key} must name a file beside it, got {name!r}")
    return sorted(set(where.values()))
