"""What runs trained beside their LoRA experts, merged by a rule for each part: never silently.

    mean        the plain mean of every tensor
    regmean     linear weights by each run's own inputs, W = (sum W_i G_i) (sum G_i)^-1; their biases by the mean
    keep:NAME   one run's
    drop        none; the merged model has no such part

The parts are the projector, the OCR encoder, the task prefixes (embeddings), and the rest of the router.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moa.checkpoint import CONFIG, load_tensors, step_folder
from moa.config import load_config
from moa.merging.methods.regression import least_squares, shrink
from moa.parts import beside_experts

Tensors = Mapping[str, Tensor]
ByRun = Mapping[str, Tensors]
RULES = "mean, regmean, keep:NAME or drop"
# Parts of the router that have a rule of their own -> regular expression of their tensors' names.
ROUTER_PARTS = {"ocr_encoder": r"router\.(encoders|missing)\.ocr\b", "prefixes": r"router\.(encoders|missing)\.task\b"}
BESIDE = ("projector", *ROUTER_PARTS, "router")


def read_parts(run: str | Path) -> dict[str, dict[str, Tensor]]:
    """Part -> tensors by name, of all that a run or step folder trained beside its experts."""
    step = step_folder(run)
    parts = beside_experts(load_config(step / CONFIG))
    tensors = {name: load_tensors(step / part.file) for name, part in parts.items()}
    return {part: own for part, own in split_router(tensors).items() if own}


def split_router(parts: Mapping[str, Tensors]) -> dict[str, dict[str, Tensor]]:
    """The parts of a run, with those of ROUTER_PARTS taken out of the router."""
    found = {part: dict(tensors) for part, tensors in parts.items()}
    router = found.get("router", {})
    for part, pattern in ROUTER_PARTS.items():
        found[part] = {name: router.pop(name) for name in [*router] if re.match(pattern, name)}
    return found


def merge_parts(
    runs: Mapping[str, Mapping[str, Tensors]],
    rules: Mapping[str, str],
    grams: Mapping[str, Mapping[str, Float[Tensor, "in in"]]] | None = None,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Any]]]:
    """Part -> merged tensors, and for each part that some run has: `runs`, `rule`, and how many `tensors` came out.

    `runs` are as `read_parts` reads them, `grams` X^T X / tokens by run and linear layer, for `regmean`. Raises
    ValueError for a part without a rule, a rule for an unknown part or run, and for tensors that do not fit together.
    """
    if unknown := [part for part in rules if part not in BESIDE]:
        raise ValueError(f"parts.{unknown[0]}: no such part; choices: {', '.join(BESIDE)}")
    merged, reports = {}, {}
    for part in BESIDE:
        own = {run: parts[part] for run, parts in runs.items() if part in parts}
        if not own:
            continue
        if part not in rules:
            raise ValueError(f"parts.{part}: {', '.join(own)} trained one; the rules are {RULES}")
        if tensors := _merge_part(part, own, rules[part], grams or {}):
            merged[part] = tensors
        reports[part] = {"runs": list(own), "rule": rules[part], "tensors": len(tensors)}
    return merged, reports


def part_line(part: str, row: Mapping[str, Any]) -> str:
    """What became of a part, of a row of `merge_parts`."""
    fate = "dropped" if row["rule"] == "drop" else f"{row['rule']}, {row['tensors']} tensors"
    return f"{part} of {', '.join(row['runs'])}: {fate}"


def _merge_part(part: str, own: ByRun, rule: str, grams: ByRun) -> dict[str, Tensor]:
    if rule == "drop":
        return {}
    if rule.startswith("keep:"):
        name = rule.removeprefix("keep:")
        if name not in own:
            raise ValueError(f"parts.{part}: {rule}: no such run; choices: {', '.join(own)}")
        return dict(own[name])
    if rule not in ("mean", "regmean"):
        raise ValueError(f"parts.{part}: no such rule {rule!r}; the rules are {RULES}")
    _check_alike(part, own)
    mean = {
        name: torch.stack([run[name].double() for run in own.values()]).mean(0).to(tensor.dtype)
        for name, tensor in next(iter(own.values())).items()
    }
    return mean if rule == "mean" else mean | _regression(part, own, grams)


def _check_alike(part: str, own: ByRun) -> None:
    shapes = {run: {n: tuple(t.shape) for n, t in tensors.items()} for run, tensors in own.items()}
    (first, expected), *others = shapes.items()
    for run, found in others:
        for name in (*expected, *found):
            if expected.get(name) != found.get(name):
                raise ValueError(
                    f"parts.{part}: {name} is {expected.get(name, 'missing')} in {first} and "
                    f"{found.get(name, 'missing')} in {run}, so they have no mean; use keep:NAME or drop"
                )


def _regression(part: str, own: ByRun, grams: ByRun) -> dict[str, Tensor]:
    """The weights of the part's linear layers whose outputs are nearest to each run's own on its own inputs."""
    solved = {}
    for name, tensor in next(iter(own.values())).items():
        layer = name.removesuffix(".weight")
        if not name.endswith(".weight") or not any(layer in inputs for inputs in grams.values()):
            continue
        if missing := [run for run in own if layer not in grams.get(run, {})]:
            raise ValueError(f"parts.{part}: regmean has no inputs of {layer} from {missing}")
        inputs = [shrink(grams[run][layer].double(), 0.9) for run in own]
        matrices = torch.stack([run[name].double() for run in own.values()])
        alike = torch.ones(len(inputs), dtype=torch.float64)
        solved[name] = least_squares(matrices, alike, inputs.__getitem__, ridge=1e-6, where=layer).to(tensor.dtype)
    if not solved:
        raise ValueError(f"parts.{part}: regmean needs inputs of its linear layers, and has none")
    return solved
