"""LoRA adapters as experts: opened from PEFT folders, tensors or a live model, and checked against each other."""

import glob
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moa.backbones.fingerprint import base_fingerprint
from moa.card import hub_name
from moa.experts.bank import ExpertBank
from moa.files import peft as peft_io
from moa.files.peft_config import is_target, rename_config, site_scaling
from moa.files.spelling import match_spelling, plain
from moa.merging.core import Factors
from moa.statistics.moments import Moments


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One adapter whose weights are read a site at a time, so that memory is one site's."""

    name: str
    config: Mapping[str, Any]
    ranks: Mapping[str, int]  # site -> rank
    shapes: Mapping[str, tuple[int, int]]  # site -> (out, in)
    read: Callable[[str], tuple[Tensor, Tensor]]  # site -> lora_A, lora_B as stored
    # of the base that it was trained on, where that is recorded
    base_fingerprint: str | None = None
    # site -> second moments of its inputs there, where they are known
    inputs: Callable[[str], Moments] | None = None

    def moments(self, site: str) -> Moments:
        """ValueError where they are not known, or where none of the expert's tokens reached the site."""
        if self.inputs is None:
            raise ValueError(
                f"adapters: {self.name} has no statistics of its inputs; python -m scripts.statistics run=RUN writes "
                "them beside the experts of a run"
            )
        found = self.inputs(site)
        if not found.tokens:
            raise ValueError(
                f"{site}: no token of the expert {self.name} reached it when its statistics were written; merge it "
                "without them by a rule: sites=[{match: ..., method: linear}]"
            )
        return found

    def factors(self, site: str, dtype: torch.dtype) -> Factors:
        """(A, scaling * B): the product B A is the expert's update, all scale folded in."""
        lora_a, lora_b = self.read(site)
        return lora_a.to(dtype), lora_b.to(dtype) * site_scaling(self.config, site)


def expert_from_folder(path: str | Path, name: str | None = None) -> Expert:
    """An expert read lazily from its PEFT folder, called after it by default; ValueError as of `read_header`."""
    header = peft_io.read_header(path)

    def read(site: str) -> tuple[Tensor, Tensor]:
        lora_a, lora_b = peft_io.read_site(header, site).values()
        return lora_a, lora_b

    return Expert(
        name=name or header.path.resolve().name,
        config=header.config,
        ranks=header.ranks,
        shapes=header.shapes,
        read=read,
        base_fingerprint=header.base_fingerprint,
    )


def sum_of(expert: Expert, others: Sequence[Expert]) -> Expert:
    """The sum of their updates, with the expert's name, and its inputs where it has the site."""
    parts = [expert, *others]
    ranks = {site: sum(part.ranks.get(site, 0) for part in parts) for site in all_sites(parts)}
    pattern = {f"^{re.escape(site)}": rank for site, rank in ranks.items()}
    config = {**expert.config, "use_rslora": False, "rank_pattern": pattern, "alpha_pattern": pattern}
    config |= {"target_modules": [*ranks], "exclude_modules": None, "layers_to_transform": None}

    def read(site: str) -> tuple[Tensor, Tensor]:
        here = [part for part in parts if site in part.ranks]
        lora_a = torch.cat([part.read(site)[0] for part in here])
        return lora_a, torch.cat([part.factors(site, torch.float64)[1] for part in here], dim=1)

    def inputs(site: str) -> Moments:
        return next(part for part in parts if site in part.ranks).moments(site)

    shapes = {site: shape for part in parts for site, shape in part.shapes.items()}
    known = None if expert.inputs is None else inputs
    return replace(expert, config=config, ranks=ranks, shapes=shapes, read=read, inputs=known)


def rename_sites(expert: Expert, names: Mapping[str, str]) -> Expert:
    if all(site == name for site, name in names.items()):
        return expert
    own, inputs = {name: site for site, name in names.items()}, expert.inputs
    if len(own) < len(names):
        raise ValueError(f"adapters: {expert.name}: two of its sites are one layer, spelled twice")
    return replace(
        expert,
        config=rename_config(expert.config, names),
        ranks={name: expert.ranks[site] for name, site in own.items()},
        shapes={name: expert.shapes[site] for name, site in own.items()},
        read=lambda name: expert.read(own[name]),
        inputs=None if inputs is None else lambda name: inputs(own[name]),
    )


def expert_from_tensors(name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Expert:
    """An expert in memory, such as a live bank's `state(name)` and `peft_config(name)`."""
    ranks, shapes = peft_io.check_tensors(name, tensors, config)

    def read(site: str) -> tuple[Tensor, Tensor]:
        key_a, key_b = peft_io.site_keys(site)
        return tensors[key_a].detach().cpu(), tensors[key_b].detach().cpu()

    return Expert(name=name, config=config, ranks=ranks, shapes=shapes, read=read)


def adapter_folders(patterns: Sequence[str]) -> list[Path]:
    """A pattern with * is every adapter folder that it matches; ValueError where it matches none."""
    folders: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir() or not glob.has_magic(pattern):
            folders.append(path)
            continue
        found = sorted(map(Path, glob.glob(str(path))))
        found = [folder for folder in found if (folder / peft_io.CONFIG_FILE).is_file()]
        if not found:
            raise ValueError(f"adapters: {pattern} matches no folder with {peft_io.CONFIG_FILE}")
        folders += found
    return folders


def open_adapters(folders: Sequence[str | Path]) -> list[Expert]:
    """The experts in the given folders, called after them; of two with one name the later gets a number."""
    experts: list[Expert] = []
    for folder in map(Path, folders):
        stem = re.sub(r"[^\w-]", "_", folder.resolve().name)
        taken = {expert.name for expert in experts}
        names = (stem, *(f"{stem}_{number}" for number in range(2, len(folders) + 2)))
        experts.append(expert_from_folder(folder, next(n for n in names if n not in taken)))
    return experts


def respell(experts: Sequence[Expert], layers: Iterable[str] | None) -> list[Expert]:
    """The experts with sites as the base's model spells them, or, where it is not on this machine, in one spelling.

    A site that matches no layer keeps its name, and is refused when it is matched with the base's weights.
    """
    if layers is None:
        spellings: dict[str, list[str]] = {}
        for site in all_sites(experts):
            spellings.setdefault(plain(site), []).append(site)
        layers = [max(found, key=lambda s: s.startswith("model.")) for found in spellings.values()]
    matches = [match_spelling(expert.ranks, layers) for expert in experts]
    return [
        rename_sites(expert, {site: found.get(site, site) for site in expert.ranks})
        for expert, found in zip(experts, matches, strict=True)
    ]


def common_fingerprint(experts: Sequence[Expert], base: str | Path | None, other_base: bool) -> str | None:
    """Of the experts' base: its own where it is here, else as recorded; ValueError for another, unless `other_base`."""
    own = base_fingerprint(base) if base is not None else None
    recorded = {e.name: e.base_fingerprint for e in experts if e.base_fingerprint is not None}
    wanted = own or next(iter(recorded.values()), None)
    wrong = [name for name, found in recorded.items() if found != wanted]
    if wrong and not other_base:
        theirs = {e.name: e.config.get("base_model_name_or_path") for e in experts}[wrong[0]]
        other = f"the base {base}" if own else next(iter(recorded))
        raise ValueError(
            f"adapters: {wrong[0]} was trained on the base {theirs} with the fingerprint {recorded[wrong[0]]}, and "
            f"{other} has {wanted}; name the right base by base=, or continue with other_base=true"
        )
    return wanted


def experts_of_bank(bank: ExpertBank) -> list[Expert]:
    """The experts of a live model, as they are now; merge them as any others."""
    return [expert_from_tensors(n, bank.state(n), bank.peft_config(n)) for n in bank.names]


def factors_of(experts: Sequence[Expert], site: str, dtype: torch.dtype = torch.float64) -> list[Factors | None]:
    """(A, scaling * B) of each expert; None for one without the site."""
    return [e.factors(site, dtype) if site in e.ranks else None for e in experts]


def all_sites(experts: Sequence[Expert]) -> list[str]:
    """The sites of any expert, in the first one's order, then the next one's."""
    return list(dict.fromkeys(site for expert in experts for site in expert.ranks))


def check_base_names(experts: Sequence[Expert]) -> None:
    """ValueError where the adapters name different bases; names prove little, so `base=` decides over them."""
    bases = {e.name: e.config.get("base_model_name_or_path") for e in experts}
    if len({Path(hub_name(base)).name for base in bases.values() if base}) > 1:
        raise ValueError(
            f"adapters: they belong to different bases: {bases}; if these are one base under several names or a "
            "quantised copy of it, give base=FOLDER"
        )


def check_experts(experts: Sequence[Expert]) -> None:
    """Raise ValueError unless the experts can be summed: own names, one shape per site."""
    if not experts:
        raise ValueError("adapters: names none")
    names = [expert.name for expert in experts]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"adapters: two experts are called {name!r}; rename one folder")
    if len({bool(e.config.get("fan_in_fan_out")) for e in experts}) > 1:
        raise ValueError("adapters: fan_in_fan_out differs, so they belong to different bases")
    for site in all_sites(experts):
        shapes = {e.name: e.shapes[site] for e in experts if site in e.shapes}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"adapters: they belong to different bases: {site} is {shapes}")
        for expert in experts:
            if site not in expert.ranks and is_target(expert.config, site):
                raise ValueError(
                    f"adapters: {expert.name} lacks {site}, which its target_modules name and "
                    f"{next(iter(shapes))} has; its file is incomplete"
                )
