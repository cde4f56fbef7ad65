"""One plain PEFT LoRA folder, adapter_config.json beside adapter_model.safetensors, read and written strictly.

Keys are `base_model.model.<site>.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank]; a site is the path of a
linear layer inside the base. The update is scaling * B A, with scaling alpha / rank or, for rsLoRA, alpha / sqrt(rank),
both per site by PEFT's patterns. What else PEFT could mean (DoRA, biases, whole modules) is refused with the reason.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moa.files.atomic import atomic_folder, write_json
from moa.files.peft_config import (
    CONFIG_FILE,
    LORA,
    NARROWING,
    REFUSED_SETTINGS,
    SPARSE,
    check_config,
    is_named,
    read_config,
    rename_config,
    site_rank,
    site_scaling,
    suffixes,
)
from moa.files.spelling import match_spelling, nearest

WEIGHTS_FILE = "adapter_model.safetensors"
STATISTICS_FILE = "stats.safetensors"  # beside it, where somebody asked for it: moa/statistics/stored.py
PREFIX = "base_model.model."
PLACES = ".shira_indices"  # integers
FINGERPRINT = "base_fingerprint"  # in the metadata of the weights' file
KEY = re.compile(r"base_model\.model\.(?P<site>.+)\.lora_[AB]\.weight")
SPARSE_KEY = re.compile(r"base_model\.model\.(?P<site>.+)\.shira_(weight|indices)")

# Keys that are no factors, by what gives them away, and why they are there.
STRAY_KEYS = {
    r"\.lora_magnitude_vector": f"use_dora: {REFUSED_SETTINGS['use_dora']}",
    r"\.lora_B\.bias$": f"lora_bias: {REFUSED_SETTINGS['lora_bias']}",
    r"\.lora_embedding_": "LoRA on an embedding",
    r"\.base_layer\.": "PEFT saved lm_head beside its LoRA; save_pretrained(FOLDER, save_embedding_layers=False)",
    r"\.lora_[AB]\.\w+\.weight$": (
        "an adapter's name stands in the key, so that this is a model's state_dict(); save it by PEFT's "
        "save_pretrained(FOLDER), or leave the name out of the keys"
    ),
    r"\.lora_[AB]\.weight$": (
        f"it does not begin with {PREFIX}; save it by PEFT's save_pretrained(FOLDER), or add that to the keys"
    ),
    "": f"modules_to_save? {REFUSED_SETTINGS['modules_to_save']}",
}
NOT_GATHERED = (
    "DeepSpeed ZeRO-3 leaves such a file where the weights were not gathered; save it again inside "
    "deepspeed.zero.GatheredParameters, or with stage3_gather_16bit_weights_on_model_save"
)
Tensors = Mapping[str, Shaped[Tensor, "..."]]
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class ExpertHeader:
    """What an expert's folder holds, from its config and the file's header: no weight is loaded."""

    path: Path
    config: dict[str, Any]
    ranks: dict[str, int]  # site -> rank
    shapes: dict[str, tuple[int, int]]  # site -> (out, in)
    spelled: dict[str, str]  # site -> as the file spells it
    base_fingerprint: str | None = None  # of the base that it was trained on, if recorded

    @property
    def weights_file(self) -> Path:
        return self.path / WEIGHTS_FILE


def base_reference(name: str) -> str:
    """What `base_model_name_or_path` says of a base: a hub name, or a folder's whole path, so that PEFT finds it."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def site_keys(site: str) -> tuple[str, str]:
    """The PEFT keys of a site's lora_A and lora_B."""
    return f"{PREFIX}{site}.lora_A.weight", f"{PREFIX}{site}.lora_B.weight"


def sparse_keys(site: str) -> tuple[str, str]:
    """PEFT's keys of a sparse update: values, and rows and columns of the weight."""
    return f"{PREFIX}{site}.shira_weight", f"{PREFIX}{site}.shira_indices"


def keys_of(config: Mapping[str, Any], site: str) -> tuple[str, ...]:
    return sparse_keys(site) if config["peft_type"] == SPARSE else site_keys(site)


def read_header(path: str | Path, peft_type: str = LORA) -> ExpertHeader:
    """Check everything about an expert's folder that needs no weights; ValueError names the file and the rule."""
    folder = Path(path)
    config = read_config(folder, peft_type)
    shapes, metadata = _read_shapes(folder / WEIGHTS_FILE)
    ranks, sizes = _check_keys(folder / WEIGHTS_FILE, shapes, config)
    _check_sites(folder / CONFIG_FILE, config, ranks)
    return ExpertHeader(folder, config, ranks, sizes, {site: site for site in ranks}, metadata.get(FINGERPRINT))


def read_tensors(header: ExpertHeader) -> dict[str, Tensor]:
    """All tensors by PEFT key, as stored; ValueError for values that are not finite."""
    sites = (read_site(header, site) for site in header.ranks)
    return {key: tensor for tensors in sites for key, tensor in tensors.items()}


def read_site(header: ExpertHeader, site: str) -> dict[str, Tensor]:
    """One site's lora_A and lora_B, or values, by PEFT key, as stored; ValueError where one is not finite."""
    stored = zip(keys_of(header.config, site), keys_of(header.config, header.spelled[site]), strict=True)
    with safe_open(header.weights_file, framework="pt") as file:
        tensors = {key: file.get_tensor(own) for key, own in stored}
    for key, tensor in tensors.items():
        if not all_finite(tensor):
            rows = (broken := ~torch.isfinite(tensor)).view(len(tensor), -1).any(1).nonzero().flatten().tolist()
            what = f"{int(broken.sum())} NaN or infinite values, in {len(rows)} rows, first {rows[0]}"
            raise ValueError(f"{header.weights_file}: {key} has {what}")
    return tensors


def is_zero(header: ExpertHeader, site: str) -> bool:
    """Whether a site's update is zero, as it is where no gradient ever came."""
    return not all(tensor.any() for tensor in read_site(header, site).values())


def digest(config: Mapping[str, Any], sites: Iterable[str], read: Callable[[str], Iterable[Tensor]]) -> str:
    """Of an expert's factors as they are stored, and of their scaling; `read` gives a site's factors."""
    found = hashlib.sha256()
    for site in sorted(sites):
        found.update(f"{site} {site_scaling(config, site)}".encode())
        for factor in read(site):
            found.update(factor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; by the sum, which is several times faster, wherever that is finite."""
    total = tensor.sum(dtype=torch.float32)
    return bool(total.isfinite()) or bool(torch.isfinite(tensor).all())


def fit_to_base(header: ExpertHeader, base_shapes: Mapping[str, tuple[int, int]]) -> ExpertHeader:
    """The header with its sites as the base spells them; ValueError for a site that is missing or has another shape."""
    names = match_spelling(header.ranks, base_shapes)
    for site, shape in header.shapes.items():
        found = base_shapes.get(names.get(site, site))
        if found is None or tuple(found) != shape:
            near = ", ".join(nearest(site, base_shapes)[:2])
            what = f"is {list(found)} there" if found else "is not there"
            hint = f" (nearest: {near})" if near and not found else ""
            raise ValueError(
                f"{header.weights_file}: made for another base: site {site} is [out, in] {list(shape)} in "
                f"the adapter, and {what}{hint}; use the base that it was trained on, or rename its keys"
            )
    return rename_sites(header, names)


def rename_sites(header: ExpertHeader, names: Mapping[str, str]) -> ExpertHeader:
    """The header with other names for its sites, and a config that means the same under them."""
    if all(site == name for site, name in names.items()):
        return header
    if len(set(names.values())) < len(names):
        raise ValueError(f"{header.weights_file}: two of its sites are one layer, in two spellings")
    return _with_sites(header, names, rename_config(header.config, names))


def keep_sites(header: ExpertHeader, sites: Sequence[str]) -> ExpertHeader:
    config = {key: value for key, value in header.config.items() if key not in NARROWING}
    return _with_sites(header, {site: site for site in sites}, {**config, "target_modules": list(sites)})


def _with_sites(header: ExpertHeader, names: Mapping[str, str], config: dict[str, Any]) -> ExpertHeader:
    def named(values: Mapping[str, Any]) -> dict[str, Any]:
        return {names[site]: value for site, value in values.items() if site in names}

    own: dict[str, Any] = {key: named(getattr(header, key)) for key in ("ranks", "shapes", "spelled")}
    return replace(header, config=config, **own)


def check_tensors(
    source: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], peft_type: str = LORA
) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """Site -> rank and site -> (out, in) of an expert in memory; ValueError naming `source`."""
    check_config(config, source, peft_type)
    for key, value in tensors.items():
        if value.dtype not in FLOATS.values() and not key.endswith(PLACES):
            raise ValueError(_not_float(source, key, str(value.dtype)))
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    ranks, sizes = _check_keys(source, shapes, config)
    _check_sites(source, config, ranks)
    if broken := sorted(key for key, tensor in tensors.items() if not all_finite(tensor)):
        raise ValueError(f"{source}: {broken[0]} has NaN or infinite values; nothing was written")
    return ranks, sizes


def save_expert(
    path: str | Path, tensors: Tensors, config: Mapping[str, Any], *, base_fingerprint: str | None = None
) -> None:
    """Write one expert, whole or not at all, for plain `PeftModel.from_pretrained`; what is read is the same bits.

    `config` needs r, lora_alpha and target_modules. ValueError where reading would refuse.
    """
    with atomic_folder(path) as temporary:
        write_expert(temporary, tensors, config, name=path, base_fingerprint=base_fingerprint)


def write_expert(
    folder: Path, tensors: Tensors, config: Mapping[str, Any], *, name: str | Path, base_fingerprint: str | None = None
) -> None:
    """The two files of an expert into a folder that exists; `name` stands in error messages."""
    full = {"peft_type": LORA, "inference_mode": True, **config}
    full = full if full["peft_type"] == SPARSE else {"bias": "none", **full}
    full = {key: sorted(value) if isinstance(value, set) else value for key, value in full.items()}
    check_tensors(name, tensors, full, full["peft_type"])
    write_json(folder / CONFIG_FILE, full)
    # clones: layers may have one factor in common, and safetensors writes no memory twice
    ready = {key: value.detach().cpu().contiguous().clone() for key, value in sorted(tensors.items())}
    metadata = {"format": "pt", **({FINGERPRINT: base_fingerprint} if base_fingerprint else {})}
    save_file(ready, folder / WEIGHTS_FILE, metadata=metadata)
    sort_metadata(folder / WEIGHTS_FILE)


def sort_metadata(file: Path) -> None:
    """Safetensors writes its metadata in a random order; sorted, equal experts are equal files."""
    with file.open("r+b") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size, f"{file}: its header is not compact JSON"
        handle.seek(8)
        handle.write(text)


def _read_shapes(file: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by key, and the metadata."""
    if not file.is_file():
        pickled = file.with_name("adapter_model.bin")
        hint = f"; {pickled.name} is a pickle, and is not opened" if pickled.exists() else ""
        raise ValueError(f"{file}: missing{hint}")
    shapes = {}
    try:
        with safe_open(file, framework="pt") as handle:
            for key in list(handle.keys()):
                entry = handle.get_slice(key)
                if entry.get_dtype() not in FLOATS and not key.endswith(PLACES):
                    raise ValueError(_not_float(file, key, entry.get_dtype()))
                shapes[key] = tuple(entry.get_shape())
            return shapes, handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not readable as safetensors ({error}); truncated?") from None


def _not_float(source: str | Path, key: str, dtype: str) -> str:
    return f"{source}: {key} is stored as {dtype}; factors are {', '.join(FLOATS)}: save it as one of these"


def _check_keys(
    source: str | Path, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """Site -> rank and site -> (out, in), of values none: how many there must be, the layer decides."""
    if config["peft_type"] != SPARSE:
        return _check_pairs(source, shapes)
    matches = {key: SPARSE_KEY.fullmatch(key) for key in shapes}
    if stray := sorted(key for key, match in matches.items() if not match):
        raise ValueError(f"{source}: {len(stray)} keys are not of a sparse update, first {stray[0]}")
    sites = dict.fromkeys(match["site"] for match in matches.values() if match)
    for site in sites:
        values, places = (shapes.get(key, ()) for key in sparse_keys(site))
        if len(values) != 1 or places != (2, *values):
            rule = f"shira_weight {list(values)} and shira_indices {list(places)} must be [number] and [2, number]"
            raise ValueError(f"{source}: at {site} {rule}")
    return dict.fromkeys(sites, config["r"]), {}


def _check_pairs(
    source: str | Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """Site -> rank and site -> (out, in), where every key is one of a fitting lora_A, lora_B pair."""
    matches = {key: KEY.fullmatch(key) for key in shapes}
    if not shapes:
        raise ValueError(f"{source}: holds no tensors; {NOT_GATHERED}")
    if stray := sorted(key for key, match in matches.items() if not match):
        reason = next(text for sign, text in STRAY_KEYS.items() if re.search(sign, stray[0]))
        raise ValueError(f"{source}: {len(stray)} keys are no factors of a linear layer, first {stray[0]} ({reason})")
    ranks, sizes = {}, {}
    for site in dict.fromkeys(match["site"] for match in matches.values() if match):
        if missing := [key for key in site_keys(site) if key not in shapes]:
            raise ValueError(f"{source}: {missing[0]} is missing, though its partner is there")
        a, b = (shapes[key] for key in site_keys(site))
        if 0 in (*a, *b):
            raise ValueError(f"{source}: {site} is empty; {NOT_GATHERED}")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise ValueError(
                f"{source}: at {site} lora_A {list(a)} and lora_B {list(b)} must be [rank, in] and [out, rank]"
            )
        ranks[site], sizes[site] = a[0], (b[0], a[1])
    return ranks, sizes


def _check_sites(source: str | Path, config: Mapping[str, Any], ranks: Mapping[str, int]) -> None:
    """The tensors' sites and ranks are those that the config names."""
    for site, rank in ranks.items():
        if rank != (promised := site_rank(config, site)):
            raise ValueError(f"{source}: {site} has rank {rank}, but its config says {promised}")
    targets = config["target_modules"]
    if isinstance(targets, str):
        strays = [s for s in ranks if targets != "all-linear" and not is_named(targets, s)]
    else:
        known = {suffix for site in ranks for suffix in suffixes(site)}
        # Bare names that this base lacks (`qkv_proj`) are a habit of PEFT users; paths are not.
        if idle := [target for target in targets if "." in target and target not in known]:
            raise ValueError(f"{source}: {len(idle)} target_modules lack tensors, first {idle[0]}")
        strays = [site for site in ranks if not is_named(targets, site)]
    if strays:
        raise ValueError(f"{source}: {len(strays)} sites are not in target_modules: {strays[0]}")
