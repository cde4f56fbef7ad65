"""One plain PEFT LoRA folder, read and written strictly.

It is adapter_config.json beside adapter_model.safetensors.
Keys are `base_model.model.<site>.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank]; a site
is the path of a linear layer inside the base. The update is scaling * B A, with scaling alpha / rank
or, for rsLoRA, alpha / sqrt(rank); rank and alpha may differ per site by PEFT's patterns. What else
PEFT could mean (DoRA, biases, whole modules, base-changing initialisations) is refused with the
reason, never dropped.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moa.atomic import atomic_folder, write_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = re.compile(r"base_model\.model\.(?P<site>.+)\.lora_[AB]\.weight")

# Settings that this file understands, or that change nothing about a trained adapter. Any other one
# that is set is refused: PEFT grows variants, and a variant read as plain LoRA is silently wrong.
KNOWN_SETTINGS = frozenset(
    (
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
        *("revision", "inference_mode", "r", "lora_alpha", "target_modules", "exclude_modules"),
        *("lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "init_lora_weights"),
        *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
        *("megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying"),
        "runtime_config",
    )
)
WHOLE_CHECKPOINT = (
    "; PEFT's merge_and_unload() writes it into its base exactly, and scripts/merge.py merges "
    "such checkpoints (models=[A,B] base=BASE)"
)
REFUSED_SETTINGS = {
    "use_dora": "DoRA rescales the rows of W + BA, so its update is no low-rank product"
    + WHOLE_CHECKPOINT,
    "lora_bias": "a bias on lora_B is no low-rank update of the weight" + WHOLE_CHECKPOINT,
    "modules_to_save": "whole modules lie beside the factors, and would be dropped"
    + WHOLE_CHECKPOINT,
    "trainable_token_indices": "trained embedding rows lie beside the factors, and are dropped",
    "target_parameters": "its factors sit on raw parameters and not on linear layers",
    "layer_replication": "it repeats layers of the base, so a site names several weights",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only",
}
# Keys that give such an adapter away where its config does not.
STRAY_KEYS = {
    ".lora_magnitude_vector": f" (use_dora: {REFUSED_SETTINGS['use_dora']})",
    ".lora_B.bias": f" (lora_bias: {REFUSED_SETTINGS['lora_bias']})",
    ".lora_embedding_": " (LoRA on an embedding)",
    "": f" (modules_to_save? {REFUSED_SETTINGS['modules_to_save']})",
}
# pissa, olora, corda, loftq and lora_ga subtract from the base's weights when they start.
BASE_KEEPING_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, kw_only=True)
class ExpertHeader:
    """What an expert's folder holds, from its config and the file's header: no weight is loaded."""

    path: Path
    config: dict[str, Any]
    ranks: dict[str, int]  # site -> rank
    shapes: dict[str, tuple[int, int]]  # site -> (out, in)

    @property
    def weights_file(self) -> Path:
        return self.path / WEIGHTS_FILE


def site_keys(site: str) -> tuple[str, str]:
    """The PEFT keys of a site's lora_A and lora_B."""
    return f"{PREFIX}{site}.lora_A.weight", f"{PREFIX}{site}.lora_B.weight"


def site_rank(config: Mapping[str, Any], site: str) -> int:
    """The rank that the config promises for a site: `rank_pattern`'s first match, else `r`."""
    return _by_pattern(config.get("rank_pattern"), site, config["r"])


def site_scaling(config: Mapping[str, Any], site: str) -> float:
    """The factor before B A at a site: alpha / rank, or alpha / sqrt(rank) with `use_rslora`."""
    rank = site_rank(config, site)
    alpha = _by_pattern(config.get("alpha_pattern"), site, config.get("lora_alpha", 8))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def read_header(path: str | Path) -> ExpertHeader:
    """Check everything about an expert's folder that needs no weights.

    Raises ValueError naming the file and the rule: a missing or unreadable file, an adapter that is
    no plain LoRA, a key without its partner, a target without tensors, ranks unlike the config's.
    """
    folder = Path(path)
    config = read_config(folder)
    ranks, sizes = _check_pairs(folder / WEIGHTS_FILE, _tensor_shapes(folder / WEIGHTS_FILE))
    _check_sites(folder, config, ranks)
    return ExpertHeader(path=folder, config=config, ranks=ranks, shapes=sizes)


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json as a dict, refused with the reason where it is no plain LoRA."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{file}: missing; an expert is a folder of {CONFIG_FILE}, {WEIGHTS_FILE}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: must hold a JSON object, got {type(config).__name__}")
    check_config(config, file)
    return config


def check_config(config: Mapping[str, Any], source: str | Path) -> None:
    """Raise ValueError naming `source` and the setting unless the config is a plain LoRA's."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{source}: peft_type must be LORA, got {config.get('peft_type')!r}")
    for key, reason in REFUSED_SETTINGS.items():
        if config.get(key):
            raise ValueError(f"{source}: {key}={config[key]!r} is not supported: {reason}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{source}: bias={config['bias']!r} is not supported: it would be dropped")
    if config.get("init_lora_weights", True) not in BASE_KEEPING_INITS:
        raise ValueError(
            f"{source}: init_lora_weights={config['init_lora_weights']!r} changes the base, so the "
            "factors alone are not the update; convert it with PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )
    unknown = sorted(key for key, value in config.items() if value and key not in KNOWN_SETTINGS)
    if unknown:
        raise ValueError(f"{source}: unknown settings may change what it computes: {unknown}")
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise ValueError(f"{source}: r must be a positive integer, got {config.get('r')!r}")
    if not config.get("target_modules"):
        raise ValueError(f"{source}: target_modules is empty, so the adapter has no sites")


def read_expert(
    path: str | Path, *, base_shapes: Mapping[str, tuple[int, int]] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read one PEFT folder whole: (tensors by PEFT key, as stored; config).

    `base_shapes` (site -> (out, in) of the base's linear layers) refuses an adapter of another base.
    Raises ValueError as `read_header` does, and for values that are not finite.
    """
    header = read_header(path)
    if base_shapes is not None:
        check_base(header, base_shapes)
    sites = (read_site(header, site) for site in header.ranks)
    return {key: tensor for tensors in sites for key, tensor in tensors.items()}, header.config


def read_site(header: ExpertHeader, site: str) -> dict[str, Tensor]:
    """One site's lora_A and lora_B by PEFT key, as stored; ValueError where one is not finite."""
    with safe_open(header.weights_file, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in site_keys(site)}
    for key, tensor in tensors.items():
        if not all_finite(tensor):
            broken = ~torch.isfinite(tensor)
            rows = broken.any(1).nonzero().flatten().tolist()
            raise ValueError(
                f"{header.weights_file}: {key} has {int(broken.sum())} NaN or infinite values, "
                f"in {len(rows)} rows, first {rows[0]}"
            )
    return tensors


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; by the sum, which is several times faster, wherever that is finite."""
    total = tensor.sum(dtype=torch.float32)
    return bool(total.isfinite()) or bool(torch.isfinite(tensor).all())


def is_target(config: Mapping[str, Any], site: str) -> bool:
    """Whether `target_modules` names the site, so that a base which has it gives it factors.

    False where other settings decide too (exclude_modules, layers_to_transform, "all-linear").
    """
    targets = config["target_modules"]
    narrowed = config.get("exclude_modules") or config.get("layers_to_transform") is not None
    if narrowed or targets == "all-linear":
        return False
    return _names(targets, site)


def _names(targets: str | Sequence[str], site: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, site) is not None
    return not _suffixes(site).isdisjoint(targets)


def check_base(header: ExpertHeader, base_shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise ValueError where a site is missing in the base, or has another shape there."""
    for site, shape in header.shapes.items():
        found = base_shapes.get(site)
        if found is None or tuple(found) != shape:
            what = "is not there" if found is None else f"is {list(found)} there"
            raise ValueError(
                f"{header.path}: made for another base: site {site} is [out, in] {list(shape)} in "
                f"the adapter, and {what}"
            )


def check_tensors(
    source: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """Site -> rank and site -> (out, in) of an expert in memory; ValueError naming `source`."""
    check_config(config, source)
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    ranks, sizes = _check_pairs(source, shapes)
    _check_sites(source, config, ranks)
    broken = sorted(key for key, tensor in tensors.items() if not all_finite(tensor))
    if broken:
        raise ValueError(f"{source}: {broken[0]} has NaN or infinite values; nothing was written")
    return ranks, sizes


def save_expert(
    path: str | Path, tensors: Mapping[str, Shaped[Tensor, "_ _"]], config: Mapping[str, Any]
) -> None:
    """Write one expert for plain `PeftModel.from_pretrained`; `read_expert` returns the same bits.

    The folder appears whole or not at all, and replaces an older one. `config` needs r, lora_alpha
    and target_modules. Raises ValueError, and writes nothing, where `read_expert` would refuse.
    """
    with atomic_folder(path) as temporary:
        write_expert(temporary, tensors, config, name=path)


def write_expert(
    folder: Path,
    tensors: Mapping[str, Shaped[Tensor, "_ _"]],
    config: Mapping[str, Any],
    *,
    name: str | Path,
) -> None:
    """The two files of an expert into a folder that exists; `name` stands in error messages."""
    full = {"peft_type": "LORA", "bias": "none", "inference_mode": True, **config}
    full = {key: sorted(value) if isinstance(value, set) else value for key, value in full.items()}
    check_tensors(name, tensors, full)
    write_json(folder / CONFIG_FILE, full)
    ready = {key: value.detach().cpu().contiguous() for key, value in sorted(tensors.items())}
    save_file(ready, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _by_pattern(patterns: Mapping[str, Any] | None, site: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches, as a regular expression, the site or a suffix."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", site):
            return value
    return default


def _tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    if not file.is_file():
        pickled = file.with_name("adapter_model.bin")
        hint = f"; {pickled.name} is a pickle, and is not opened" if pickled.exists() else ""
        raise ValueError(f"{file}: missing{hint}")
    try:
        with safe_open(file, framework="pt") as handle:
            return {k: tuple(handle.get_slice(k).get_shape()) for k in list(handle.keys())}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not readable as safetensors ({error}); truncated?") from None


def _check_pairs(
    source: str | Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """Site -> rank and site -> (out, in), where every key is one of a fitting lora_A, lora_B pair."""
    matches = {key: KEY.fullmatch(key) for key in shapes}
    stray = sorted(key for key, match in matches.items() if not match)
    if stray or not shapes:
        first = f"{len(stray)} keys are no factors of a linear layer, first {''.join(stray[:1])}"
        reason = next((text for end, text in STRAY_KEYS.items() if end in "".join(stray[:1])), "")
        raise ValueError(f"{source}: {first + reason if stray else 'holds no tensors'}")
    ranks, sizes = {}, {}
    for site in dict.fromkeys(match["site"] for match in matches.values() if match):
        missing = [key for key in site_keys(site) if key not in shapes]
        if missing:
            raise ValueError(f"{source}: {missing[0]} is missing, though its partner is there")
        a, b = (shapes[key] for key in site_keys(site))
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise ValueError(
                f"{source}: at {site} lora_A {list(a)} and lora_B {list(b)} must be [rank, in] and "
                "[out, rank]"
            )
        ranks[site], sizes[site] = a[0], (b[0], a[1])
    return ranks, sizes


def _check_sites(source: str | Path, config: Mapping[str, Any], ranks: Mapping[str, int]) -> None:
    """The tensors' sites and ranks are those that the config names."""
    for site, rank in ranks.items():
        if rank != site_rank(config, site):
            promised = site_rank(config, site)
            raise ValueError(f"{source}: {site} has rank {rank}, but its config says {promised}")
    targets = config["target_modules"]
    if isinstance(targets, str):
        strays = [s for s in ranks if targets != "all-linear" and not _names(targets, s)]
    else:
        suffixes = {suffix for site in ranks for suffix in _suffixes(site)}
        # Bare names that this base lacks (`qkv_proj`) are a habit of PEFT users; paths are not.
        idle = [target for target in targets if "." in target and target not in suffixes]
        if idle:
            raise ValueError(f"{source}: {len(idle)} target_modules lack tensors, first {idle[0]}")
        strays = [site for site in ranks if not _names(targets, site)]
    if strays:
        raise ValueError(f"{source}: {len(strays)} sites are not in target_modules: {strays[0]}")


def _suffixes(site: str) -> set[str]:
    parts = site.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}
