"""The mean loss of each validation source: cheap, teacher-forced, with the stage's own gates."""

from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from data.batch import Batch
from data.collate import Collator
from data.mixture import Source
from moa.config import RunConfig
from moa.model import MixtureModel
from moa.training.batches import source_loader

FIRST_LOOK = 4  # samples of a source that an imported expert is tried on


@torch.no_grad()
def validation_losses(
    model: MixtureModel,
    sources: Mapping[str, Source],
    collator: Collator,
    accelerator: Accelerator,
    config: RunConfig,
    gates: Callable[[Batch], Tensor | None],
) -> dict[str, float]:
    """`validation/<source>` for each source, and `validation`, their mean; every process must call it."""
    model.eval()
    sums = torch.zeros(len(sources), 3, device=accelerator.device)  # loss, samples, bad ones
    for row, (name, source) in enumerate(sources.items()):
        for batch, errors in source_loader(
            source,
            name,
            collator,
            batch_size=config.eval.batch_size,
            process=accelerator.process_index,
            num_processes=accelerator.num_processes,
            num_workers=config.data.num_workers,
        ):
            if errors and config.data.on_bad_sample == "error":
                raise errors[0]
            sums[row, 2] += len(errors)
            if batch is not None:
                batch = batch.to(accelerator.device)
                with accelerator.autocast():
                    loss = model(batch, gates(batch)).loss_per_sample
                sums[row, :2] += torch.stack([loss.sum(), loss.new_tensor(len(batch))])
    model.train()
    total = accelerator.reduce(sums, "sum").double().cpu()
    means = (total[:, 0] / total[:, 1].clamp(min=1)).tolist()
    losses = {f"validation/{name}": mean for name, mean in zip(sources, means, strict=True)}
    skipped = {"validation_skipped": int(total[:, 2].sum())} if total[:, 2].any() else {}
    return losses | {"validation": sum(means) / len(means)} | skipped


@torch.no_grad()
def import_lines(
    model: MixtureModel, config: RunConfig, sources: Mapping[str, Source], collator: Collator, accelerator: Accelerator
) -> list[str]:
    """A line for each imported expert: its loss on the first samples of its own source, and the base's."""
    model.eval()
    lines, names = [], model.bank.names
    for source in config.data.sources.values():
        expert = config.data.expert or source.expert
        if expert not in names or config.experts[expert].init_from is None:
            continue
        loader = source_loader(sources[source.name], source.name, collator, batch_size=FIRST_LOOK)
        batch, _ = next(iter(loader), (None, []))
        if batch is None:  # bad samples, which training names
            continue
        batch = batch.to(accelerator.device)
        own = model.routing.oracle(torch.full((len(batch),), names.index(expert), device=accelerator.device))
        with accelerator.autocast():
            outputs = [model(batch, gates) for gates in (own, torch.zeros_like(own))]
        loss, alone = (float(output.loss_per_sample.mean()) for output in outputs)
        line = f"imported {expert}: loss {loss:.2f} on {len(batch)} samples of {source.name}"
        hint = "" if loss < alone else "; was it trained with this prompt? docs/experts.md"
        lines.append(f"{line}, the base alone {alone:.2f}{hint}")
    model.train()
    return lines
