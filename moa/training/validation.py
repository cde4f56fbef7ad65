"""The mean loss of each validation source: cheap, teacher-forced, with the stage's own gates."""

from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from data.batch import Batch
from data.collate import Collator
from data.mixture import Source
from moa.model import MixtureModel
from moa.training.batches import source_loader


@torch.no_grad()
def validation_losses(
    model: MixtureModel,
    sources: Mapping[str, Source],
    collator: Collator,
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_workers: int,
    gates: Callable[[Batch], Tensor | None],
) -> dict[str, float]:
    """`validation/<source>` for each source, and `validation`, the mean over the sources.

    The processes share the samples. Bad samples are left out. Every process must call it.
    """
    model.eval()
    sums = torch.zeros(len(sources), 2, device=accelerator.device)  # loss, samples
    for row, (name, source) in enumerate(sources.items()):
        for batch, _ in source_loader(
            source,
            name,
            collator,
            batch_size=batch_size,
            process=accelerator.process_index,
            num_processes=accelerator.num_processes,
            num_workers=num_workers,
        ):
            if batch is not None:
                batch = batch.to(accelerator.device)
                with accelerator.autocast():
                    loss = model(batch, gates(batch)).loss_per_sample
                sums[row] += torch.stack([loss.sum(), loss.new_tensor(len(batch))])
    model.train()
    total = accelerator.reduce(sums, "sum").double().cpu()
    means = (total[:, 0] / total[:, 1].clamp(min=1)).tolist()
    losses = {f"validation/{name}": mean for name, mean in zip(sources, means, strict=True)}
    return losses | {"validation": sum(means) / len(means)}
