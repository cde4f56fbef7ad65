"""The weight files of a local checkpoint, and which of their keys a module's path means."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

# Words of a key that transformers adds and drops between its versions (renaming on load keeps the others).
RENAMED = {"model", "language_model"}
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class BaseFiles:
    """The weight files of a local checkpoint: which file holds a key, and its header entry."""

    folder: Path
    files: dict[str, str]  # key -> file name
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    config: dict[str, Any]


def read_base(folder: str | Path, what: str = "base") -> BaseFiles:
    """The keys of a local safetensors checkpoint, from headers alone.

    Raises ValueError naming `what` it is to the user, and the file.
    """
    folder = Path(folder)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ValueError(
            f"{what}: {folder} has no config.json; it must be a local checkpoint folder"
        )
    config = read_json_object(config_file)
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "some method")
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
    """The folder of a base: itself, or what the hub's cache (or the hub) has under this name.

    Raises ValueError naming `what` it is to the user.
    """
    folder = Path(name).expanduser()
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


def match_spelling(keys: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """Of keys that mean one weight, the first checkpoint's spelling -> the second's.

    A key that both have is the same weight. Of the others, those that are alike without the words by which versions
    of transformers differ, where just one of each checkpoint is.
    """
    own, theirs = set(keys), set(others)
    found = {key: key for key in own & theirs}
    left, right = (_by_plain_key(rest) for rest in (own - theirs, theirs - own))
    for plain, spelled in left.items():
        if len(spelled) == len(right.get(plain, [])) == 1:
            found[spelled[0]] = right[plain][0]
    return found


def _by_plain_key(keys: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(plain_key(key), []).append(key)
    return groups


def plain_key(key: str) -> str:
    """A key without the words by which versions of transformers differ."""
    key = key.replace("vision_tower.vision_model.", "vision_tower.")
    return ".".join(word for word in key.split(".") if word not in RENAMED)


def match_sites(sites: Mapping[str, tuple[int, int]], base: BaseFiles) -> dict[str, str]:
    """Site -> key of its weight on disk; the shape is [out, in], or [in, out] where stored so.

    Raises ValueError as `match_parameters` does, and for a weight that the base ties to another.
    """
    parts = (base.config, *(v for v in base.config.values() if isinstance(v, dict)))
    tied = any(part.get("tie_word_embeddings") for part in parts)
    for site in sites:
        if tied and site.rpartition(".")[2] in ("lm_head", "embed_tokens"):
            raise ValueError(f"site {site}: the base ties it to another weight, which would change")
    found = match_parameters({f"{site}.weight": shape for site, shape in sites.items()}, base)
    return {site: found[f"{site}.weight"] for site in sites}


def match_parameters(parameters: Mapping[str, tuple[int, ...]], base: BaseFiles) -> dict[str, str]:
    """Name of a parameter in the model -> its key on disk, where the path may be another.

    transformers renames on loading (`language_model.model.layers` on disk is
    `model.language_model.layers` in memory), but keeps the numbers, the order of the words and the
    end of a path. So the key is the one that shares the longest sequence of words with the name,
    has its numbers, end and shape; it must be one alone, and no two names may share it.
    """
    by_end: dict[tuple[str, ...], list[str]] = {}
    for key in base.files:
        by_end.setdefault(_signature(key), []).append(key)
    found: dict[str, str] = {}
    for name, shape in parameters.items():
        best = _best_keys(name, by_end.get(_signature(name), []))
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
    shared = [key for key, count in Counter(found.values()).items() if count > 1]
    if shared:
        names = [name for name, key in found.items() if key == shared[0]]
        raise ValueError(f"{names} all fit the one weight {shared[0]} of {base.folder}")
    return found


def _signature(key: str) -> tuple[str, ...]:
    """What renaming keeps: the numbers of a path, and its last two words (layer and `weight`)."""
    parts = key.split(".")
    return (*(part for part in parts if part.isdigit()), *parts[-2:])


def _best_keys(name: str, keys: Sequence[str]) -> list[str]:
    scores = {key: _common_words(name.split("."), key.split(".")) for key in keys}
    return [key for key, score in scores.items() if score == max(scores.values())]


def _common_words(one: Sequence[str], two: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(two) + 1)
    for word in one:
        above = row[:]
        for j, other in enumerate(two):
            row[j + 1] = above[j] + 1 if word == other else max(above[j + 1], row[j])
    return row[-1]


def weight_files(folder: Path, what: str = "base") -> list[str]:
    """The safetensors files that transformers reads: one file, else those of the index."""
    if (folder / WEIGHTS_FILE).is_file():
        return [WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        found = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
        pickled = f"; {found[0]} is a pickle, and is not opened: save it as safetensors" * bool(
            found
        )
        raise ValueError(f"{what}: {folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}{pickled}")
    where = read_json_object(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{what}: {index}: weight_map must map keys to file names")
    for key, name in where.items():
        if not isinstance(name, str) or Path(name).name != name or not name:
            raise ValueError(
                f"{what}: {index}: weight_map.{key} must name a file beside it, got {name!r}"
            )
    return sorted(set(where.values()))


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object; ValueError naming the file for any other."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: must hold a JSON object, got {type(found).__name__}")
    return found
