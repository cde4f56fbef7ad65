"""What is merged: the experts of a run or of folders, and what the runs around them trained beside."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from moa.checkpoint import CONFIG, load_tensors, step_folder
from moa.config import RunConfig, load_config
from moa.files.checkpoint_files import local_base
from moa.merging.checkpoints.parts import read_parts, sort_parts
from moa.merging.core import Expert
from moa.merging.inputs import adapter_folders, open_adapters


@dataclass(frozen=True, kw_only=True)
class Source:
    """Experts, and, where they come from one run, its step folder and config."""

    experts: list[Expert]
    folders: list[Path]  # of each expert
    base_fingerprint: str | None = None
    step: Path | None = None
    config: RunConfig | None = None
    projector: dict[str, Tensor] = field(default_factory=dict)  # trained; empty: the base's own
    beside: list[str] = field(default_factory=list)  # a line for each part that is not merged

    def base_name(self, name: str | None) -> str | None:
        """The named base, or what run or adapters name."""
        named = [expert.config.get("base_model_name_or_path") for expert in self.experts]
        run = self.config.model.name if self.config is not None else None
        return name or run or next(filter(None, named), None)

    def base(self, name: str | None) -> Path:
        """The base's folder; ValueError, with the way out, where none is named or it is not here."""
        found = self.base_name(name)
        ways = "give base=FOLDER, or verify=false for an adapter that is not compared with its base"
        if found is None:
            raise ValueError(f"base: the adapters name none; {ways}")
        try:
            return local_base(found)
        except ValueError as error:
            raise ValueError(f"{error}; {ways}") from None


def open_run(run: str | Path) -> Source:
    """All experts of a run or step folder, and its projector where it trained one."""
    step = step_folder(run)
    config = load_config(step / CONFIG)
    trained = config.model.train_projector
    folders = [step / "experts" / name for name in config.experts]
    return Source(
        experts=open_adapters(folders),
        folders=folders,
        step=step,
        config=config,
        projector=load_tensors(step / "projector.safetensors") if trained else {},
    )


def open_folders(adapters: Sequence[str], projector: str | None = None) -> Source:
    """The experts in some folders, and what the runs that they lie in trained beside them."""
    folders = adapter_folders(adapters)
    steps = {folder.resolve().parent.parent for folder in folders}
    steps = {step for step in steps if (step / CONFIG).is_file()}
    source = Source(
        experts=open_adapters(folders),
        folders=folders,
        projector=load_tensors(Path(projector)) if projector else {},
        beside=list(beside_lines(sorted(steps), projector)),
    )
    if len(steps) != 1:
        return source
    step = steps.pop()
    return replace(source, step=step, config=load_config(step / CONFIG))


def beside_lines(steps: Sequence[Path], projector: str | None) -> Iterator[str]:
    """One line for each part that a run trained: whether the merge has it."""
    for step in steps:
        for part in sort_parts(read_parts(step)):
            if part == "projector" and projector:
                fate = f"replaced by {projector}"
            else:
                fate = "not in the result; scripts.merge_parts merges it"
            run = step.parent.parent if step.parent.name == "checkpoints" else step
            yield f"{part} of {run.name}: {fate}"
