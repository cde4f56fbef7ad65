"""The statistics of every expert of a step folder, from the samples that the run trained it on.

Training samples, not validation: each expert has some by definition, the inputs are those that it learned to read, and
validation stays unseen for whoever tunes a merge on it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.checks import BadSampleError
from data.collate import Collator
from data.mixture import Mixture
from data.sample import Sample
from data.sources import make_collator
from moa.config import RunConfig
from moa.files.peft import ExpertHeader, read_header
from moa.model import MixtureModel
from moa.routing.roles import LEFT_OVER
from moa.statistics import ANSWER_SHARE
from moa.statistics.gather import groups, input_sums, moment_bytes, own_gates, sites_of
from moa.statistics.moments import InputSums
from moa.statistics.stored import write_statistics

Directions = int | str | None  # "full": all; None: as many as make the file about as large as the expert
Tick = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    model: MixtureModel
    config: RunConfig
    mixture: Mixture
    num_samples: int  # of each expert
    batch_size: int
    directions: Directions = None
    answer_share: float | None = ANSWER_SHARE

    def write(self, step: Path, *, main: bool = True, tick: Tick = lambda name: None) -> list[str]:
        """Write stats.safetensors beside each expert of a step folder that has samples; a line on each. Every process
        of a sharded model must call it, and the `main` one writes. `tick` is called `num_ticks` times."""
        plain = replace(self.config, prompt=replace(self.config.prompt, task_dropout=0.0))
        collator, device = make_collator(plain, self.model.backbone.intake), next(self.model.parameters()).device
        found, rejected = own_samples(self.config, self.mixture, collator, self.num_samples, served(self.model))
        lines = [f"{len(rejected)} bad samples left out, first: {rejected[0]}"] if rejected else []
        for name, samples in found.items():
            if not samples:
                why = "data.sources have no sample of it; the run that trained it writes its statistics"
                if self.config.experts[name].gate in LEFT_OVER:
                    why = "has the gate 0 on every sample of a routed expert, so that no statistics are of it"
                lines.append(f"{name}: {why}")
                continue
            starts = range(0, len(samples), self.batch_size)
            batches = [collator(samples[start : start + self.batch_size]).to(device) for start in starts]
            options: dict[str, Any] = {"answer_share": self.answer_share, "tick": partial(tick, name)}
            sums = input_sums(self.model, sites_of(self.model, name), batches, own_gates(self.model, name), **options)
            if main:
                lines += self.write_one(step / "experts" / name, sums, len(samples))
        return lines

    def write_one(self, folder: Path, sums: Mapping[str, InputSums], num_samples: int) -> Iterator[str]:
        header = read_header(folder)
        moments = {site: sums[site].sketch(shape[1], self.size(header, site)) for site, shape in header.shapes.items()}
        file = write_statistics(folder, moments, num_samples, self.answer_share)
        yield f"{file}: {num_samples} samples, {file.stat().st_size / 1e6:.1f} MB"
        if idle := [site for site, own in moments.items() if not own.tokens]:
            yield f"{folder.name}: none of its samples reaches {len(idle)} of its sites, first {idle[0]}"

    def size(self, header: ExpertHeader, site: str) -> int:
        """How many directions of a site are kept one by one."""
        out, width = header.shapes[site]
        as_expert = math.ceil(header.ranks[site] * (width + out) / width)
        if isinstance(self.directions, int):
            return self.directions
        return width if self.directions == "full" else as_expert

    @property
    def num_ticks(self) -> int:
        """An upper bound of the batches that are read."""
        each = math.ceil(self.num_samples / self.batch_size)
        passes = (groups(moment_bytes(sites_of(self.model, name))) for name in self.config.experts)
        return sum(each for own in passes for _ in own)


def own_samples(
    config: RunConfig, mixture: Mixture, collator: Collator, number: int, serving: Mapping[str | None, set[str]]
) -> tuple[dict[str, list[Sample]], list[BadSampleError]]:
    """The first `number` different samples of each expert in the training mixture, or all; and the bad ones on the way.

    `serving` names the experts that are on for a sample that names one.
    Raises BadSampleError for a bad one where the run's settings do not leave it out.
    """
    found: dict[str, list[Sample]] = {name: [] for name in config.experts}
    declared = {name: config.data.expert or source.expert for name, source in config.data.sources.items()}
    rejected, seen = list[BadSampleError](), set[tuple[str, int]]()
    # a block draws every source, so that this many draws hold `number` samples of each
    for position in range(min(mixture.block * number, mixture.epoch_length)):
        wanted = {name for name, own in found.items() if len(own) < number}
        place = mixture.locate(position)
        if not wanted:
            break
        expert = declared[place[0]]
        if place in seen or (expert is not None and not serving.get(expert, serving[None]) & wanted):
            continue
        seen.add(place)
        sample = mixture[position]
        if bad := collator.split([sample])[1]:  # also where no batch can hold it
            if config.data.on_bad_sample == "error":
                raise bad[0]
            rejected += bad
        elif isinstance(sample, Sample):
            for name in serving.get(sample.expert, serving[None]) & wanted:
                found[name].append(sample)
    return found, rejected


def served(model: MixtureModel) -> dict[str | None, set[str]]:
    """The experts that are on for the samples of each, and, under None, for those of no expert."""
    names = model.routing.roles.experts
    gates = model.routing.oracle(torch.arange(len(names) + 1))[:, 0]
    rows = [{name for name, gate in zip(names, row, strict=True) if gate > 0} for row in gates.tolist()]
    return dict(zip([*names, None], rows, strict=True))
