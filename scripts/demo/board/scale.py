"""Rows of a board for numbers of skills and sizes of the base: what stands for them in the board's YAML."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from data.config import SourceConfig
from moa.cli.ranges import Count

EXPERT = "expert"  # the row that is one for each skill


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """The board's columns are skills, in the order in which they join. In rows that have `each` stand for

    {base} {size} {part}   a base, its name, and the number of skills, or the skill
    {train} {public} {validation}   data sources of these skills
    {steps}   of training, for all of them together
    {experts} {adapters}   their rows `expert`: as frozen experts, and as a list of PEFT folders
    """

    bases: dict[str, str]  # model.name by name
    counts: list[Count]  # numbers of skills
    steps: Count  # for each skill
    train: Count = 400  # samples of each skill
    public: Count = 32  # the same, for a router alone
    validation: Count = 32  # the same

    def places(self, columns: Mapping[str, SourceConfig], skills: Sequence[str], size: str) -> dict[str, str]:
        """What is written in their place, in JSON."""
        folders = {skill: f"{{expert:{EXPERT}-{skill}-{size}:{skill}}}" for skill in skills}
        mappings: dict[str, Any] = {"experts": {s: {"init_from": f, "frozen": True} for s, f in folders.items()}}
        for kind, number in (("train", self.train), ("public", self.public), ("validation", self.validation)):
            split = kind if kind == "validation" else "train"
            own: dict[str, Any] = {"name": "source", "benchmark": None, "split": split, "num_samples": number}
            mappings[kind] = {skill: given(replace(columns[skill], expert=skill, **own)) for skill in skills}
        found = {f'"{{{key}}}"': json.dumps(mapping) for key, mapping in mappings.items()}
        found |= {'"{steps}"': str(self.steps * len(skills)), "{adapters}": ",".join(folders.values())}
        return found | {"{base}": self.bases[size], "{size}": size}


def given(source: SourceConfig) -> dict[str, Any]:
    """What a data source's YAML set: a setting that appears later changes no older file."""
    return {f.name: getattr(source, f.name) for f in fields(source) if getattr(source, f.name) != f.default}
