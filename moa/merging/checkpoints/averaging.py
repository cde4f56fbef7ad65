"""Stochastic weight averaging (Izmailov et al. 2018): the mean of all trained parts over steps of ONE run.

Experts (their A and their B, which within a run belong together), router and projector are averaged; the result is a
folder that loads like any step, but has no optimizer, so training cannot continue from it.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moa import checkpoint
from moa.card import CARD, Card, local_fingerprint
from moa.config import load_config
from moa.files.atomic import atomic_folder, write_file, write_json
from moa.files.peft_config import CONFIG_FILE
from moa.merging.export.folder import check_out
from moa.parts import PARTS

REPORT = "average.json"


def choose_steps(run: str | Path, steps: Sequence[int], last: int | None) -> list[Path]:
    """The step folders of a run: those of `steps`, or the newest `last`; ValueError names those there are."""
    root = Path(run) / "checkpoints"
    found = {int(folder.name.partition("-")[2]): folder for folder in sorted(root.glob("step-*"))}
    if not found:
        raise ValueError(f"run: {run} has no checkpoints/step-*")
    if bool(steps) == (last is not None):
        raise ValueError("steps, last: give one of the two")
    if last is not None:
        if not 1 <= last <= len(found):
            raise ValueError(f"last: must be 1 to {len(found)}, the steps of {run}; got {last}")
        return list(found.values())[-last:]
    if missing := [step for step in steps if step not in found]:
        choices = f"choices: {list(found)} (train.keep_last keeps more)"
        raise ValueError(f"steps: {run} has no step {missing[0]}; {choices}")
    if len(set(steps)) < len(steps):
        raise ValueError(f"steps: names one twice: {list(steps)}")
    return [found[step] for step in sorted(steps)]


def average_steps(out: str | Path, folders: Sequence[Path], *, decay: float = 1.0) -> dict[str, Any]:
    """Write the mean of some step folders; returns the report, which is written beside it.

    `decay` 1 is the uniform mean; below it a step weighs `decay` times the next one, an exponential moving average.
    Raises ValueError for a changed file, and for steps whose configs or tensors differ.
    """
    check_out(out, report=REPORT)
    for folder in folders:
        checkpoint.verify(folder)
    raw = torch.tensor([decay**age for age in reversed(range(len(folders)))], dtype=torch.float64)
    weights = raw / raw.sum()
    files = _trained_files(folders)
    with atomic_folder(out) as temporary:
        _copy_rest(folders[-1], temporary)
        for file in files:
            (temporary / file).parent.mkdir(parents=True, exist_ok=True)
            states = [checkpoint.load_tensors(folder / file) for folder in folders]
            checkpoint.save_tensors(temporary / file, mean_state(states, weights, str(file)))
        report = {"steps": [folder.name for folder in folders], "weights": weights.tolist(),
                  "files": [str(file) for file in files]}  # fmt: skip
        write_json(temporary / REPORT, report)
        write_file(temporary / CARD, _card(out, folders, weights).text())
        write_json(temporary / checkpoint.MANIFEST, checkpoint.manifest_of(temporary))
    return report


def _card(out: str | Path, folders: Sequence[Path], weights: Tensor) -> Card:
    config = load_config(folders[-1] / checkpoint.CONFIG)
    rows = zip(folders, weights.tolist(), strict=True)
    return Card(
        name=Path(out).name,
        kind="step",
        about=f"The weighted mean of {len(folders)} steps of one run: experts, router and projector.",
        base=config.model.name,
        fingerprint=config.model.fingerprint or local_fingerprint(config.model.name),
        rows=[(folder.name, f"{weight:.4g}", str(folder)) for folder, weight in rows],
        config=config,
        sources=[*config.data.sources.values()],
    )


def mean_state(states: Sequence[Mapping[str, Tensor]], weights: Float[Tensor, " step"], name: str) -> dict[str, Tensor]:
    """Weighted means of tensors with one name, in float64; tensors that are not floating are the last one's."""
    kinds = [{key: (t.shape, t.dtype) for key, t in state.items()} for state in states]
    for kind in kinds[1:]:
        if odd := sorted({key for key, _ in kind.items() ^ kinds[0].items()}):
            raise ValueError(f"{name}: {odd[0]} differs in shape or dtype between the steps; are they of one run?")
    mean = dict(states[-1])
    for key, newest in mean.items():
        if newest.is_floating_point():
            total = sum(w * state[key].double() for w, state in zip(weights, states, strict=True))
            mean[key] = torch.as_tensor(total).to(newest.dtype)
    return mean


def _trained_files(folders: Sequence[Path]) -> list[Path]:
    """The weight files, alike in all steps; the configs beside the experts must be equal."""
    first, *others = (
        [f.relative_to(folder) for part in PARTS.values() for f in sorted(folder.glob(part.file))] for folder in folders
    )
    for folder, files in zip(folders[1:], others, strict=True):
        if files != first:
            odd = sorted(str(f) for f in {*files} ^ {*first})
            raise ValueError(f"steps: {folder.name} and {folders[0].name} differ in {odd}")
        for config in (f.parent / CONFIG_FILE for f in first if f.parts[0] == "experts"):
            if checkpoint.read_json(folder / config) != checkpoint.read_json(folders[0] / config):
                raise ValueError(f"steps: {config} differs between {folder.name} and {folders[0].name}")
    return first


def _copy_rest(step: Path, out: Path) -> None:
    shutil.copytree(step / "processor", out / "processor")
    shutil.copyfile(step / checkpoint.CONFIG, out / checkpoint.CONFIG)
    for expert in step.glob("experts/*"):
        (out / "experts" / expert.name).mkdir(parents=True)
        for name in (CONFIG_FILE, CARD):
            if (expert / name).is_file():
                shutil.copyfile(expert / name, out / "experts" / expert.name / name)
