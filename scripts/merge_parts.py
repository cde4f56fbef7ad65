"""Merge what runs trained beside their experts: projector, OCR encoder, task prefixes, router; a rule for each part.

    python -m scripts.merge_parts runs=[runs/A,runs/B] out=parts \\
        "parts={projector: regmean, ocr_encoder: mean, prefixes: keep:A, router: drop}"
    python -m scripts.merge "adapters=[A/*,B/*]" merged=true projector=parts/projector.safetensors out=OUT

The rules are mean, regmean (linear layers, by each run's own inputs on its validation data), keep:NAME and drop. A
part that some run has and no rule covers is an error. Writes PART.safetensors for each, and manifest.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from moa.cli.command import command
from moa.cli.ranges import Count, FilePath, Seed, Size


@dataclass(frozen=True, kw_only=True)
class PartsConfig:
    runs: list[FilePath] = field(default_factory=list)  # run or step folders; called after the run
    parts: dict[str, str] = field(default_factory=dict)  # part -> mean, regmean, keep:NAME, drop
    out: FilePath | None = None  # folder to write
    num_samples: Count = 32  # of each validation set, for the inputs of regmean
    batch_size: Size = 16
    seed: Seed = 0  # of the choice of samples


def run_merge(settings: PartsConfig, console: Console) -> None:
    from moa.checkpoint import save_tensors
    from moa.files.atomic import atomic_folder, write_json
    from moa.merging.checkpoints.parts import merge_parts, part_line, read_parts
    from moa.merging.export.folder import REPORT_FILE, check_out

    if settings.out is None:
        raise ValueError("out: names no folder")
    check_out(settings.out)
    folders = {Path(run).resolve().name: run for run in settings.runs}
    if len(settings.runs) < 2 or len(folders) < len(settings.runs):
        raise ValueError(f"runs: needs two or more of different names, got {settings.runs}")
    runs = {name: read_parts(run) for name, run in folders.items()}
    grams: Mapping[str, Mapping[str, Any]] = {}
    if "regmean" in settings.parts.values():
        shown = track(folders.items(), description="inputs of the projectors")
        grams = {name: projector_grams(run, settings) for name, run in shown}
    merged, reports = merge_parts(runs, settings.parts, grams)
    with atomic_folder(settings.out) as folder:
        for part, tensors in merged.items():
            save_tensors(folder / f"{part}.safetensors", tensors)
        write_json(folder / "manifest.json", {part: sorted(t) for part, t in merged.items()})
        write_json(folder / REPORT_FILE, {"kind": "parts", "runs": folders, "parts": reports})
    lines = (part_line(*item) for item in reports.items())
    console.print(*lines, f"written: {settings.out}", sep="\n", highlight=False, soft_wrap=True)


def projector_grams(run: str, settings: PartsConfig) -> dict[str, Any]:
    """X^T X / tokens of the linear layers of a run's projector, on its own validation data, by its own gates."""
    from data.sources import open_ocr
    from moa.checkpoint import load_model
    from moa.merging.learn.calibration import read_calibration
    from moa.parts import PARTS
    from moa.statistics.gather import input_sums

    model, _, config = load_model(run)
    chosen = {"num_samples": settings.num_samples, "seed": settings.seed}
    data = read_calibration(config, model, ocr=open_ocr(config.data), **chosen)
    matrices = {name for name, p in PARTS["projector"].parameters(model).items() if p.dim() == 2}
    layers = {name.removesuffix(".weight") for name in matrices}
    modules = {name: model.model.get_submodule(name) for name in layers}
    return {name: sums.gram for name, sums in input_sums(model, modules, data.batches(settings.batch_size)).items()}


main = command(PartsConfig, run_merge, __doc__, quiet=True)

if __name__ == "__main__":
    main()
