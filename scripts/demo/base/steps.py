"""Steps on shuffled rows, with a rate that rises and falls, and a line of figures now and then."""

import json
import sys
import time
from collections.abc import Callable, Iterator

import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

Take = Callable[..., None]


def steps(parameters, total, rows, batch, peak, args, name) -> Iterator[tuple[Tensor, Take]]:
    """Shuffled batches of row numbers, each with a function that takes the step on their loss."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total, pct_start=0.05)
    order = torch.empty(0, dtype=torch.long)
    began, means = time.time(), dict[str, float]()
    for number in track(range(total), name):
        if len(order) < batch:
            order = torch.randperm(rows, generator=generator)
        chosen, order = order[:batch], order[batch:]

        def take(loss: Tensor, *, number: int = number, **shown: float) -> None:
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            means.update({k: 0.98 * means.get(k, v) + 0.02 * v for k, v in shown.items() if v == v})
            if number % 50 == 0 or number == total - 1:
                row = {"stage": name, "step": number, "seconds": round(time.time() - began)}
                print(json.dumps(row | {k: round(v, 3) for k, v in means.items()}), flush=True)

        yield chosen, take


def track(sequence, name: str):
    columns = (TextColumn(name), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stderr.isatty()) as bar:
        yield from bar.track(sequence)
