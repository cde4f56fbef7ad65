"""Give an average of two aligned CLIPs the activation statistics of the two: REPAIR (Jordan et al. 2023).

    python -m scripts.repair model=M endpoints=[A,B_ALIGNED] data=captions.jsonl out=M_REPAIRED

See scripts.align for where M and B_ALIGNED come from, and for the form of `data`. Every linear layer of both
towers' blocks is reset; the projections, which have no bias, are not. OUT is a plain checkpoint.
"""

from dataclasses import dataclass, field

from rich.console import Console

from moa.cli.command import command
from moa.cli.ranges import Count, FilePath
from scripts.align import caption_batches, load_clip, write_clip


@dataclass(frozen=True, kw_only=True)
class RepairConfig:
    model: FilePath | None = None  # the merged checkpoint
    # the aligned checkpoints it was merged from
    endpoints: list[FilePath] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # theirs in the merge; empty: 1/N each
    data: FilePath | None = None  # jsonl file of images and captions
    num_samples: Count = 512  # at most so many of it
    out: FilePath | None = None  # folder to write


def run_repair(settings: RepairConfig, console: Console) -> None:
    from torch import nn

    from moa.files.atomic import atomic_folder, write_json
    from moa.merging.align.activations import repair
    from moa.merging.align.clip import run_clip
    from moa.merging.export.folder import REPORT_FILE, check_out

    if settings.model is None or settings.data is None or settings.out is None:
        raise ValueError("model, data, out: each names a file or folder")
    count = len(settings.endpoints)
    weights = settings.weights or [1 / count for _ in settings.endpoints]
    if count < 2 or len(weights) != count:
        raise ValueError("endpoints: two or more checkpoints, with as many weights or none")
    check_out(settings.out)
    model = load_clip(settings.model)
    dtype = model.dtype
    endpoints = [load_clip(folder).float() for folder in settings.endpoints]
    batches = caption_batches(settings.data, settings.model, settings.num_samples)
    layers = [name for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and module.bias is not None]  # fmt: skip
    with console.status("measuring activations"):
        repair(model.float(), endpoints, layers, batches, weights=weights, run=run_clip)
    report = {"kind": "checkpoint", "method": "repair", "model": settings.model, "endpoints": settings.endpoints,
              "weights": weights, "layers": len(layers), "batches": len(batches)}  # fmt: skip
    with atomic_folder(settings.out) as temporary:
        write_clip(temporary, model.to(dtype), settings.model)
        write_json(temporary / REPORT_FILE, report)
    console.print(f"{len(layers)} layers reset; checkpoint: {settings.out}", soft_wrap=True)


main = command(RepairConfig, run_repair, __doc__)

if __name__ == "__main__":
    main()
