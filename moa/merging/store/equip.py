"""A run with one expert more, or less, without training: the others, and the gates of their samples, stay.

what the router learned by   the new expert answers
gradient                     samples of one task: its logit is `NEVER`, to which the offset of that task adds -2 `NEVER`
means (anchors, likeness)    samples like those that it was trained on, whose means it brings along
nothing (one_hot)            samples that name it
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from safetensors import safe_open

from moa.build import build_mixture, open_base, settled_expert
from moa.checkpoint import CONFIG, TrainState, load_tensors, save_checkpoint, step_folder, verify, write_run_header
from moa.config import RunConfig, load_config
from moa.experts.kinds import KINDS
from moa.files.peft import STATISTICS_FILE, read_header
from moa.merging.settings import StoreConfig
from moa.merging.store.place import Entry, open_place
from moa.merging.store.publish import ANCHORS_FILE, TASKS
from moa.model import MixtureModel
from moa.routing.router import NEVER
from moa.sections import ExpertConfig
from moa.training.stages import load_rest

T = TypeVar("T")


def equip(settings: StoreConfig, console: Console) -> None:
    step, config = opened(settings)
    entry, folder = open_place(settings.store).get(settings.name)
    name, learns = entry.name, config.router.row.learns
    if name in config.experts:
        raise ValueError(f"{name}: the run has an expert of this name; its experts: {', '.join(config.experts)}")
    if settings.task and learns != "gradient":
        raise ValueError(f"task: has no effect with router.kind={config.router.kind}; leave it out")
    own = settled_expert(name, ExpertConfig(frozen=True), read_header(folder))
    new = replace(config, experts={**config.experts, name: own})
    task = task_of(settings, entry, config) if learns == "gradient" else None
    if task is not None:
        tasks = list(dict.fromkeys([*config.data.tasks, task]))
        new = replace(new, data=replace(new.data, tasks=tasks), router=replace(new.router, task_prior=True))
    elif learns == "means" and (lacking := [kind for kind in config.router.evidence if kind not in entry.anchors]):
        raise ValueError(f"{name}: has no anchors of {', '.join(lacking)}, which the run's router compares; publish it "
                         "from a run whose router has them, or train the router (docs/experts.md)")  # fmt: skip
    elif learns is None and not config.router.row.by_expert:
        raise ValueError(f"run: router.kind={config.router.kind} has the same gates for all samples, and none for more")
    model = rebuilt(new, step, {name: folder})
    if task is not None:
        give_task(model, new.choices.index(name), new.data.tasks.index(task))
        console.print(f"samples of the task {task} get {name}, all others the gates that they had", soft_wrap=True)
    elif learns == "means":
        give_means(model, new.choices.index(name), folder / ANCHORS_FILE, new.data.tasks)
    write(settings, step, model, new, {name: folder}, console)


def unequip(settings: StoreConfig, console: Console) -> None:
    step, config = opened(settings)
    if settings.name not in config.experts:
        raise ValueError(f"{settings.name}: the run has no such expert; choices: {', '.join(config.experts)}")
    left = [name for name in config.choices if name != settings.name]
    if not left or config.router.granularity != "sample":
        why = "routes tokens, and must be trained without it" if left else "chooses among no other"
        raise ValueError(f"{settings.name}: the run's router {why}")

    def others(sets: Mapping[str, T]) -> dict[str, T]:
        return {name: row for name, row in sets.items() if getattr(row, "expert", name) != settings.name}

    data = replace(config.data, sources=others(config.data.sources), validation=others(config.data.validation))
    scored = replace(config.eval, sources=others(config.eval.sources))
    new = replace(config, experts=others(config.experts), data=data, eval=scored)
    write(settings, step, rebuilt(new, step, {}), new, {}, console)


def opened(settings: StoreConfig) -> tuple[Path, RunConfig]:
    """The run's step folder and config."""
    for key in ("name", "run", "out"):
        if getattr(settings, key) is None:
            raise ValueError(f"{key}: is missing")
    step = step_folder(str(settings.run))
    verify(step)
    if any(Path(str(settings.out)).glob("*")):
        raise ValueError(f"out: {settings.out} holds other things; name a new folder")
    return step, replace(load_config(step / CONFIG), stages={})


def task_of(settings: StoreConfig, entry: Entry, config: RunConfig) -> str:
    """The task whose samples the expert gets; ValueError for a router that the offset of a task does not decide."""
    router = config.router
    one_logit = router.granularity == "sample" and router.score == "linear" and not router.learned_threshold
    if not one_logit or router.kind == "sigmoid" or "task" not in router.evidence:
        raise ValueError("run: no offset of a task decides its router; train it with the expert (docs/experts.md)")
    if settings.task is None and len(entry.tasks) != 1:
        known, has = ", ".join(entry.tasks) or "unknown", ", ".join(config.data.tasks)
        raise ValueError(f"task: whose samples does {entry.name} get? Its tasks: {known}; those of the run: {has}")
    return settings.task or entry.tasks[0]


def rebuilt(config: RunConfig, step: Path, added: Mapping[str, Path]) -> MixtureModel:
    """The model of a config with the experts and the router of a step folder, as far as it has them."""
    folders = {name: added.get(name, step / "experts" / name) for name in config.experts}
    headers = {n: read_header(folder, KINDS[config.experts[n].kind].peft_type) for n, folder in folders.items()}
    model = build_mixture(config, open_base(config.model), headers)
    load_rest(model, config, step)
    return model


@torch.no_grad()
def give_task(model: MixtureModel, expert: int, task: int) -> None:
    """Let a learned router choose an expert for the samples of one task, and for no other."""
    last, prior = model.router.head[-1], model.router.prior
    last.weight[expert], last.bias[expert], prior[:, expert] = 0.0, NEVER, 0.0
    prior[task, expert] = -2 * NEVER


def give_means(model: MixtureModel, expert: int, file: Path, tasks: list[str]) -> None:
    """Put the means of an expert's samples into a router that compares with them."""
    with safe_open(file, framework="pt") as handle:
        theirs = json.loads(handle.metadata()[TASKS])
    for key, own in load_tensors(file).items():
        if key == "task_sums":
            own = torch.stack([own[theirs.index(t)] if t in theirs else own.new_zeros(()) for t in tasks])
        if key.rpartition("_")[0] in model.router.evidence:
            model.router.get_buffer(key)[expert] = own


def write(
    settings: StoreConfig,
    step: Path,
    model: MixtureModel,
    config: RunConfig,
    added: Mapping[str, Path],
    console: Console,
) -> None:
    """A run folder of one step, with the statistics that lie beside the experts."""
    run, number = Path(str(settings.out)), int(step.name[5:]) if step.name.startswith("step-") else 0
    config = replace(config, out=str(run))
    write_run_header(run, config)
    written = save_checkpoint(run, number, model, config, TrainState(progress={"step": number}))
    for name in config.experts:
        file = added.get(name, step / "experts" / name) / STATISTICS_FILE
        if file.is_file():
            shutil.copyfile(file, written / "experts" / name / STATISTICS_FILE)
    console.print(f"{len(config.experts)} experts: {written}", soft_wrap=True)
