"""adapter_config.json of one plain PEFT LoRA folder: what it means, and what is refused, with the reason."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moa.files.targets import fits

CONFIG_FILE = "adapter_config.json"
# peft_type; the second is of this project: a bottleneck adapter, the third PEFT's for SHiRA
LORA, ADAPTER, SPARSE = "LORA", "ADAPTER", "SHIRA"
# Settings that narrow target_modules down, of no use beside full paths.
NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
WHOLE_CHECKPOINT = (
    "; PEFT's merge_and_unload() writes it into its base exactly, and scripts.merge merges "
    "such checkpoints (models=[A,B] base=BASE)"
)
# Why a LoRA cannot be what a file of another type is, and what can be done.
NO_LORA = {
    ADAPTER: (
        "it has an activation between its projections, so that it is no update of a weight, and no merge has it; "
        "eval.py scores its run as it is"
    ),
    SPARSE: "it is a sparse update of full rank, and no product of two factors" + WHOLE_CHECKPOINT,
}
# settings of a file of another type, and what each must be
OWN = {ADAPTER: {"kind": "text", "activation": "text"}, SPARSE: {"mask_type": "text", "random_seed": "anything"}}
REFUSED_SETTINGS = {
    "use_dora": "DoRA rescales the rows of W + BA, so its update is no low-rank product" + WHOLE_CHECKPOINT,
    "lora_bias": "a bias on lora_B is no low-rank update of the weight" + WHOLE_CHECKPOINT,
    "modules_to_save": "whole modules lie beside the factors, and would be dropped" + WHOLE_CHECKPOINT,
    "trainable_token_indices": "trained embedding rows lie beside the factors, and are dropped",
    "target_parameters": "its factors sit on raw parameters and not on linear layers",
    "layer_replication": "it repeats layers of the base, so a site names several weights",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only",
}
# pissa, olora, corda, loftq and lora_ga subtract from the base's weights when they start.
BASE_KEEPING_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 31


def _is_rank(value: Any) -> bool:
    return _is_integer(value) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30  # NaN is not


def _is_mapping(value: Any, rule: Callable[[Any], bool]) -> bool:
    return value is None or (isinstance(value, dict) and all(map(rule, value.values())))


# What a setting must be, in words, and the test of it.
RULES: dict[str, Callable[[Any], bool]] = {
    "true or false": lambda value: value is None or isinstance(value, bool),
    "text": lambda value: value is None or isinstance(value, str),
    "text or a list of texts": lambda value: all(isinstance(v, str) for v in _listed(value)),
    "a positive integer": _is_rank,
    "an integer or a list of them": lambda value: all(map(_is_integer, _listed(value))),
    "a finite number": _is_number,
    "a mapping of expressions to positive integers": lambda value: _is_mapping(value, _is_rank),
    "a mapping of expressions to finite numbers": lambda value: _is_mapping(value, _is_number),
    "anything": lambda value: True,
}
# Settings that are read here, or that change nothing about a trained adapter, and what each must be.
# Any other one that is set is refused: PEFT grows variants, and a variant read as plain LoRA is silently wrong.
SETTINGS = {
    "r": "a positive integer",
    "lora_alpha": "a finite number",
    "lora_dropout": "a finite number",
    "rank_pattern": "a mapping of expressions to positive integers",
    "alpha_pattern": "a mapping of expressions to finite numbers",
    "layers_to_transform": "an integer or a list of them",
    **dict.fromkeys(("peft_type", "task_type", "base_model_name_or_path", "revision", "bias"), "text"),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), "text or a list of texts"),
    **dict.fromkeys(("use_rslora", "fan_in_fan_out", "inference_mode"), "true or false"),
    **dict.fromkeys(("init_lora_weights", "init_weights", "auto_mapping", "peft_version"), "anything"),
    **dict.fromkeys(("megatron_core", "qalora_group_size", "eva_config"), "anything"),
    **dict.fromkeys(("ensure_weight_tying", "runtime_config"), "anything"),
}


def read_config(folder: Path, peft_type: str = LORA) -> dict[str, Any]:
    """adapter_config.json as a dict, refused with the reason where it is no plain LoRA, or of another type."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{file}: missing; an expert is a folder of {CONFIG_FILE}, adapter_model.safetensors")
    config = read_json_object(file)
    check_config(config, file, peft_type)
    return config


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object; ValueError naming the file for any other."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: must hold a JSON object, got {type(found).__name__}")
    return found


def check_config(config: Mapping[str, Any], source: str | Path, peft_type: str = LORA) -> None:
    """Raise ValueError naming `source` and the setting unless the config is a plain LoRA's, or of another type."""
    if (got := config.get("peft_type")) != peft_type:
        why = f": {NO_LORA[got]}" if isinstance(got, str) and got in NO_LORA else ""
        raise ValueError(f"{source}: peft_type must be {peft_type}, got {_shown(got)}{why}")
    if "r" not in config:
        raise ValueError(f"{source}: r is missing; it is the rank")
    settings = SETTINGS | OWN.get(peft_type, {})
    for key, wanted in settings.items():
        if key in config and not RULES[wanted](config[key]):
            raise ValueError(f"{source}: {key} must be {wanted}, got {_shown(config[key])}")
    for key, reason in REFUSED_SETTINGS.items():
        if config.get(key):
            raise ValueError(f"{source}: {key}={_shown(config[key])} is not supported: {reason}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{source}: bias={_shown(config['bias'])} is not supported: it would be dropped")
    if config.get("init_lora_weights", True) not in BASE_KEEPING_INITS:
        raise ValueError(
            f"{source}: init_lora_weights={_shown(config['init_lora_weights'])} changes the base, so the "
            "factors alone are not the update; convert it with PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )
    if unknown := sorted(key for key, value in config.items() if value and key not in settings):
        raise ValueError(f"{source}: unknown settings may change what it computes: {unknown}")
    if not config.get("target_modules"):
        raise ValueError(f"{source}: target_modules is empty, so the adapter has no sites")
    for key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        value = config.get(key) or ()
        for pattern in [value] if isinstance(value, str) else value if "pattern" in key else ():
            fits(pattern, "", f"{source}: {key}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def site_rank(config: Mapping[str, Any], site: str) -> int:
    """The rank that the config promises for a site: `rank_pattern`'s first match, else `r`."""
    return _by_pattern(config.get("rank_pattern"), site, config["r"])


def site_scaling(config: Mapping[str, Any], site: str) -> float:
    """The factor before B A at a site: alpha / rank, or alpha / sqrt(rank) with `use_rslora`; 1 of a sparse update."""
    if config.get("peft_type") == SPARSE:
        return 1.0
    rank = site_rank(config, site)
    alpha = _by_pattern(config.get("alpha_pattern"), site, config.get("lora_alpha", 8))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: Mapping[str, Any] | None, site: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches, as a regular expression, the site or a suffix."""
    for pattern, value in (patterns or {}).items():
        if fits(rf"(.*\.)?({pattern})$", site, f"{CONFIG_FILE}: rank_pattern, alpha_pattern"):
            return value
    return default


def is_target(config: Mapping[str, Any], site: str) -> bool:
    """Whether `target_modules` alone names the site, without exclude_modules, layers_to_transform or "all-linear"."""
    targets = config["target_modules"]
    narrowed = config.get("exclude_modules") or config.get("layers_to_transform") is not None
    return not narrowed and targets != "all-linear" and is_named(targets, site)


def is_named(targets: str | Sequence[str], site: str) -> bool:
    if isinstance(targets, str):
        return fits(targets, site, f"{CONFIG_FILE}: target_modules")
    return not suffixes(site).isdisjoint(targets)


def rename_config(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A config that means for each new name what it meant for the old one: full paths, exact patterns."""
    ranks = {site: site_rank(config, site) for site in names}
    usual = config.get("lora_alpha", 8)
    alphas = {site: _by_pattern(config.get("alpha_pattern"), site, usual) for site in names}
    return {
        **{key: value for key, value in config.items() if key not in NARROWING},
        "target_modules": list(names.values()),
        "rank_pattern": _exact(names, ranks, config["r"]),
        "alpha_pattern": _exact(names, alphas, usual),
    }


def _exact(names: Mapping[str, str], values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """A pattern for each site whose value is not the usual one, under its new name."""
    return {f"^{re.escape(names[s])}": value for s, value in values.items() if value != usual}


def suffixes(site: str) -> set[str]:
    parts = site.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}
