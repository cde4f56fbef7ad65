"""Which samples each process reads at each step, and the loaders that read them.

Step t of a run takes the next `batch_size` positions of the mixture, cut into micro-batches, dealt to the processes
in turn: its samples, and so its gradient, are the same for any number of processes, workers and micro-batches.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from data.batch import Batch
from data.checks import BadSampleError
from data.collate import Collator
from data.mixture import Mixture, Source, read_sample
from data.sample import Sample
from moa.sections import TrainConfig
from moa.training.signals import leave_to_parent

Collated = tuple[Batch | None, list[BadSampleError]]
DIED = (
    "a process that loads data died ({}): often for want of memory, which fewer data.num_workers need "
    "less of; data.num_workers=0 loads in the training process, and shows an error of its own"
)


class TrainingError(RuntimeError):
    """Training cannot continue; the message names the step, the rank and the samples where it can."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How `batch_size` samples fall into micro-batches on processes."""

    batch_size: int
    micro_batch_size: int
    num_processes: int

    @property
    def accumulation(self) -> int:
        return self.batch_size // (self.micro_batch_size * self.num_processes)

    def positions(self, start: int, process: int) -> list[list[int]]:
        """The micro-batches of one process in the step that begins at position `start`."""
        size, processes = self.micro_batch_size, self.num_processes
        firsts = (start + (m * processes + process) * size for m in range(self.accumulation))
        return [list(range(first, first + size)) for first in firsts]


def make_layout(train: TrainConfig, num_processes: int) -> Layout:
    """Raises ValueError where the batch does not split evenly."""
    size = train.batch_size
    if size % num_processes:
        raise ValueError(f"train.batch_size: {size} must divide by {num_processes} processes")
    micro = min(train.micro_batch_size or size, size // num_processes)
    if size % (micro * num_processes):
        raise ValueError(f"train.micro_batch_size: {micro} on {num_processes} processes must divide batch_size={size}")
    return Layout(batch_size=size, micro_batch_size=micro, num_processes=num_processes)


def collate(collator: Collator, items: list[Sample | BadSampleError]) -> Collated:
    """The samples lose their images: nothing reads them any more, and a worker's pipe would take long."""
    batch, rejected = collator.split(items)
    if batch is not None:
        batch = replace(batch, samples=[s.with_images([]) for s in batch.samples])
    return batch, rejected


def training_loader(
    mixture: Mixture, collator: Collator, layout: Layout, *, start: int, num_steps: int, process: int, num_workers: int
) -> Iterator[list[Collated]]:
    """The micro-batches of each step in turn, from position `start` on."""
    starts = range(start, start + num_steps * layout.batch_size, layout.batch_size)
    # a step takes all its micro-batches at once: while it runs, the next step's are made
    positions = (part for first in starts for part in layout.positions(first, process))
    micro_batches = iter(make_loader(mixture, collator, positions, num_workers, ahead=layout.accumulation))
    for _ in starts:
        try:
            step = [next(micro_batches) for _ in range(layout.accumulation)]
        except (OSError, EOFError) as error:
            # a worker's own error names the worker; without a name its connection broke
            if not num_workers or "in DataLoader worker process" in str(error):
                raise
            raise TrainingError(DIED.format(error)) from error
        yield step


def make_loader(dataset: Any, collator: Collator, sampler: Any, num_workers: int, ahead: int = 1) -> DataLoader:
    """`ahead` batches, and one for each worker, are ready before they are asked for."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=partial(collate, collator),
        worker_init_fn=leave_to_parent,
        # a loader draws a seed for its workers: not from the stream that dropout draws from
        generator=torch.Generator(),
        prefetch_factor=1 + math.ceil(ahead / num_workers) if num_workers else None,
        pin_memory=torch.cuda.is_available(),  # so that copies to the GPU need not be waited for
    )


def dead_worker(error: Exception) -> str | None:
    """What to print where `error`, which torch raises anywhere in the main thread, is a data worker's death."""
    found = re.search(r"DataLoader (worker \(pid.*)", str(error))
    return DIED.format(found[1].strip(" .")) if found else None


@dataclass(frozen=True)
class Rows:
    """One source; a bad sample as the error that it raised."""

    source: Source
    name: str

    def __getitem__(self, index: int) -> Sample | BadSampleError:
        return read_sample(self.source, index, self.name)


def source_loader(
    source: Source,
    name: str,
    collator: Collator,
    *,
    batch_size: int,
    process: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
) -> Iterator[Collated]:
    """One process's share of all samples of a source, in order."""
    rows = range(process, len(source), num_processes)
    batches = [list(rows[first : first + batch_size]) for first in range(0, len(rows), batch_size)]
    yield from make_loader(Rows(source, name), collator, batches, num_workers)
