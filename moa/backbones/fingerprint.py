"""The fingerprint of a base model: the same for the same weights, however they are named, spelled or sharded.

    sha256( every tensor's name, dtype, shape and content; the config without what computes nothing )

A base of up to `WHOLE` bytes is read whole. Of a larger one each tensor is read at `BLOCKS` places that are evenly
spread: seconds for 70B, and a tensor that was scaled, replaced, trained or disturbed by noise shows.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moa.backbones.open_clip import files_of_open_clip, is_open_clip
from moa.files.checkpoint_files import local_base, weight_files
from moa.files.peft_config import read_json_object
from moa.files.spelling import plain

WHOLE = 1 << 28
BLOCKS, BLOCK = 16, 1 << 12
# Buffers that some versions store and all compute anew.
COMPUTED = ("position_ids", "inv_freq")
# Keys of config.json, at any depth, that do not change what the model computes.
COSMETIC = frozenset(
    (
        *("_name_or_path", "_commit_hash", "transformers_version", "architectures", "auto_map"),
        *("dtype", "torch_dtype", "use_cache", "initializer_range", "initializer_factor"),
        *("attention_dropout", "output_attentions", "output_hidden_states", "return_dict"),
    )
)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor, or a whole file that is not safetensors, as bytes begin to end of a file."""

    key: str
    kind: str  # dtype and shape
    file: Path
    begin: int
    end: int


def base_fingerprint(name: str | Path) -> str:
    """The fingerprint of a local folder, a hub name, or an open_clip name, as 32 hexadecimal digits. Raises ValueError
    for a base that is missing or not readable; no pickle is opened."""
    if is_open_clip(str(name)):
        files, config = files_of_open_clip(str(name))
    else:
        folder = local_base(str(name))
        files = [folder / file for file in weight_files(folder)]
        config = read_json_object(folder / "config.json")
    stored = [entry for file in files for entry in _entries(file)]
    whole = sum(entry.end - entry.begin for entry in stored) <= WHOLE
    rows = {(entry.key, entry.kind, _content(entry, whole)) for entry in stored}
    embeddings = {row[1:] for row in rows if row[0].endswith("embed_tokens.weight")}
    digest = sha256()
    for row in sorted(rows):
        if row[0] != "lm_head.weight" or row[1:] not in embeddings:  # a copy that some versions store beside them
            digest.update(repr(row).encode())
    digest.update(json.dumps(computing(config), sort_keys=True).encode())
    return digest.hexdigest()[:32]


def _entries(file: Path) -> Iterator[Stored]:
    if file.suffix != ".safetensors":  # open_clip's .bin and .pt: bytes, never unpickled
        yield Stored(key="file", kind=file.suffix, file=file, begin=0, end=file.stat().st_size)
        return
    try:
        with safe_open(file, framework="pt"):  # checks the header against the file's size
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"base: {file} is not readable ({error})") from None
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
    for key, entry in header.items():
        if key == "__metadata__" or key.endswith(COMPUTED):
            continue
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        kind = f"{entry['dtype']} {entry['shape']}"
        yield Stored(key=plain(key), kind=kind, file=file, begin=begin, end=end)


def _content(entry: Stored, whole: bool) -> str:
    digest, size = sha256(), entry.end - entry.begin
    with entry.file.open("rb") as handle:
        if whole or size <= BLOCKS * BLOCK:
            starts, width = range(0, max(size, 1), 1 << 22), 1 << 22
        else:
            starts = range(0, size - BLOCK + 1, (size - BLOCK) // (BLOCKS - 1))
            width = BLOCK
        for start in starts:
            handle.seek(entry.begin + start)
            digest.update(handle.read(min(width, size - start)))
    return digest.hexdigest()


def computing(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: computing(value) for key, value in config.items() if key not in COSMETIC}
    return config
