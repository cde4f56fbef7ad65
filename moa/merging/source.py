"""What is merged: the experts of a run or of folders, and what the runs around them trained beside."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from moa.checkpoint import CONFIG, load_tensors, step_folder
from moa.cli.command import note
from moa.config import RunConfig, load_config
from moa.evaluation.gates_file import run_of
from moa.experts.kinds import KINDS
from moa.files.checkpoint_files import local_base
from moa.files.peft import STATISTICS_FILE
from moa.files.peft_config import NO_LORA
from moa.merging.adapters import Expert, adapter_folders, open_adapters, sum_of
from moa.merging.checkpoints.parts import read_parts
from moa.parts import PARTS
from moa.routing.roles import LEFT_OVER, WITH
from moa.statistics.stored import read_statistics, share_of


@dataclass(frozen=True, kw_only=True)
class Source:
    """Experts, and, where they come from one run, its step folder and config."""

    experts: list[Expert]
    folders: list[Path]  # of each expert
    base_name: str | None  # as given, or as the run or the adapters name it
    base_fingerprint: str | None = None
    step: Path | None = None
    config: RunConfig | None = None
    projector: dict[str, Tensor] = field(default_factory=dict)  # trained; empty: the base's own
    beside: list[str] = field(default_factory=list)  # a line for each part that is not merged
    added: Collection[str] = ()  # experts that are not merged, beside those that their run has always on
    folded: frozenset[str] = frozenset()  # experts that became one with another, see `fold_pairs`

    @property
    def gates(self) -> dict[str, str]:
        """Of the experts that are of the run of the config: experts.NAME.gate."""
        known = self.config.experts if self.config else {}
        return {e.name: known[e.name].gate for e in self.experts if e.name in known}

    @property
    def shared(self) -> list[str]:
        """The experts that are added to what the others merge to: by the settings, and what their run has always on."""
        return [e.name for e in self.experts if self.gates.get(e.name) == "always" or e.name in self.added]

    @property
    def pairs(self) -> dict[str, str]:
        """Expert -> the one whose gate it has, where both are here."""
        found = {n: gate.removeprefix(WITH) for n, gate in self.gates.items() if gate.startswith(WITH)}
        return {name: other for name, other in found.items() if other in self.gates and name not in self.added}

    def base(self) -> Path:
        """The base's folder; ValueError, with the way out, where none is named or it is not here."""
        ways = "give base=FOLDER, or verify=false for an adapter that is not compared with its base"
        if self.base_name is None:
            raise ValueError(f"base: the adapters name none; {ways}")
        try:
            return local_base(self.base_name)
        except ValueError as error:
            raise ValueError(f"{error}; {ways}") from None


def check_linear(config: RunConfig, names: Iterable[str]) -> None:
    """ValueError, with the way out, for an expert whose folder is not all that it does."""
    for name in names:
        own, kind = config.experts[name].kind, config.experts[name].rank_gates
        if own != "lora":
            raise ValueError(f"experts.{name}.kind={own}: {NO_LORA[KINDS[own].peft_type]}")
        if kind != "none":
            raise ValueError(
                f"experts.{name}.rank_gates={kind}: the gates of its ranks change by {kind}, and no merge of factors "
                "has them; eval.py scores the run as it is, and scripts.distill teaches it to one adapter"
            )


def open_run(run: str | Path, base: str | None = None, *, to_merge: bool = True) -> Source:
    """All experts of a run or step folder, and its trained projector; `to_merge` refuses those beyond factors."""
    step = step_folder(run)
    config = load_config(step / CONFIG)
    if to_merge:
        check_linear(config, config.experts)
    folders = [step / "experts" / name for name in config.experts]
    trained = config.model.train_projector
    return Source(
        experts=open_adapters(folders),
        folders=folders,
        base_name=base or config.model.name,
        step=step,
        config=config,
        projector=load_tensors(step / PARTS["projector"].file) if trained else {},
    )


def with_statistics(source: Source, *, routed_alone: bool = False) -> Source:
    """With the statistics of each expert's inputs; ValueError where a folder has none, or those of other weights, and
    where two are of another `answer_share`.

    Those of an expert that is always on may be missing, as it is not merged, or are not wanted.
    """
    experts, shares = [], dict[str, str]()
    for expert, folder in zip(source.experts, source.folders, strict=True):
        if expert.name in source.shared and (routed_alone or not (folder / STATISTICS_FILE).is_file()):
            experts.append(expert)
            continue
        if source.gates.get(expert.name) in LEFT_OVER and not (folder / STATISTICS_FILE).is_file():
            raise ValueError(
                f"experts.{expert.name}.gate={source.gates[expert.name]}: the expert has the gate 0 on every sample of "
                "another, so that no statistics of its inputs are written; choose a method that reads none"
            )
        step = folder.resolve().parent.parent
        known = (step / CONFIG).is_file()
        way_out = f"python -m scripts.statistics run={run_of(step) if known else 'RUN'} writes it"
        way_out += "" if known else ", where it was trained"
        experts.append(replace(expert, inputs=read_statistics(folder, way_out)))
        if share := share_of(folder):  # unknown in an older file
            shares[share] = expert.name
    if len(shares) > 1:
        found = ", ".join(f"{share} in {name}" for share, name in shares.items())
        raise ValueError(f"answer_share: statistics weigh tokens unlike, by {found}; write all of them with one share")
    return replace(source, experts=experts)


def with_known_statistics(source: Source) -> Source:
    """The same where every routed expert has them; a note where they belong to other weights."""
    routed = [f for e, f in zip(source.experts, source.folders, strict=True) if e.name not in source.shared]
    if all((folder / STATISTICS_FILE).is_file() for folder in routed):
        try:
            return with_statistics(source, routed_alone=True)
        except ValueError as error:
            note(f"warning: the report has no crosstalk: {error}")
    return source


def fold_pairs(source: Source) -> Source:
    """With one expert in place of each and those that have its gate: the sum of their updates."""
    pairs, named = source.pairs, {expert.name: expert for expert in source.experts}
    kept = [place for place, name in enumerate(named) if name not in pairs]
    experts = [source.experts[place] for place in kept]
    for place, expert in enumerate(experts):
        if own := [named[name] for name, other in pairs.items() if other == expert.name]:
            experts[place] = sum_of(expert, own)
    folders = [source.folders[place] for place in kept]
    return replace(source, experts=experts, folders=folders, folded=frozenset(pairs))


def open_folders(adapters: Sequence[str], base: str | None = None, projector: str | None = None) -> Source:
    """The experts in some folders, and what the runs around them trained beside."""
    folders = adapter_folders(adapters)
    around = {folder.resolve().parent.parent for folder in folders}
    steps = sorted(step for step in around if (step / CONFIG).is_file())
    for step in steps:
        own = load_config(step / CONFIG)
        names = [f.resolve().name for f in folders if f.resolve().parent.parent == step]
        check_linear(own, [name for name in names if name in own.experts])
    experts = open_adapters(folders)
    only = steps[0] if len(steps) == 1 else None
    config = load_config(only / CONFIG) if only else None
    named = [config.model.name if config else None]
    named += [expert.config.get("base_model_name_or_path") for expert in experts]
    return Source(
        experts=experts,
        folders=folders,
        base_name=base or next(filter(None, named), None),
        step=only,
        config=config,
        projector=load_tensors(Path(projector)) if projector else {},
        beside=[*beside_lines(steps, projector), *lines_of_shared(folders, steps)],
    )


def beside_lines(steps: Sequence[Path], projector: str | None) -> Iterator[str]:
    """One line for each part that a run trained: whether the merge has it."""
    for step in steps:
        for part in read_parts(step):
            replaced = part == "projector" and projector
            fate = f"replaced by {projector}" if replaced else "not in the result; scripts.merge_parts merges it"
            yield f"{part} of {run_of(step).name}: {fate}"


def lines_of_shared(folders: Sequence[Path], steps: Sequence[Path]) -> Iterator[str]:
    """One line for each always-on expert that is not added to what the others of its run merge to."""
    given = {folder.resolve() for folder in folders}
    for step in steps:
        for name, expert in load_config(step / CONFIG).experts.items():
            if expert.gate != "always":
                continue
            about = f"{name} of {run_of(step).name}: always on beside its other experts"
            folder = step / "experts" / name
            if folder not in given:
                yield f"{about}, and not in the result; add {folder} to adapters"
            elif len(steps) > 1:
                yield f"{about}, and merged here like any other, as the adapters are of several runs"
