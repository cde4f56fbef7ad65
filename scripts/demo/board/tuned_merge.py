"""Merge adapters by one method, tuned like every other: the length of the result and at most one option, on validation.

    python -m scripts.demo.board.tuned_merge adapters=[A,B] method=ties grid={density: [0.1, 0.2, 0.5]} out=OUT

The result is first made as long as the mean expert (as Pico does, arXiv 2604.16826), so that a method whose output is
a sum has the same start as one whose output is a mean. Each scale then multiplies it. The lowest mean loss on the
validation sets of `like`, with their answers, decides. Questions of the test split are never seen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from moa.cli.command import run_command
from moa.cli.ranges import Count, FilePath, Positive
from moa.cli.settings import check
from moa.merging.methods.table import find_method

if TYPE_CHECKING:
    from data.batch import Batch
    from moa.merging.merge import MergedSite
    from moa.model import MixtureModel

    Merged = dict[str, MergedSite]


@dataclass(frozen=True, kw_only=True)
class TunedMerge:
    adapters: list[FilePath] = field(default_factory=list)  # PEFT folders
    method: str = "linear"  # of scripts.merge method=list
    options: dict[str, Any] = field(default_factory=dict)  # of the method
    grid: dict[str, list[Any]] = field(default_factory=dict)  # one more option and its values
    scales: list[Positive] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0])
    like: FilePath = "configs/demo.yaml"  # has the prompt and the validation sets
    num_samples: Count = 48  # of each validation set
    rank: Any = "sum"  # of the result, as in scripts.merge
    out: FilePath | None = None  # folder to write

    def __post_init__(self) -> None:
        find_method(self.method)
        check(self.out is not None, "out", "names no folder")
        check(len(self.adapters) > 0, "adapters", "names none")
        check(len(self.grid) <= 1, "grid", f"is for one option, got {[*self.grid]}")


def main(argv: Sequence[str] | None = None) -> None:
    run_command(TunedMerge, tune, __doc__, argv)


def tune(settings: TunedMerge, console: Console) -> None:
    from moa.files.atomic import write_json
    from moa.merging.adapters import open_adapters
    from moa.merging.export.export import export_adapter
    from moa.merging.merge import merge

    out = Path(str(settings.out))
    experts = open_adapters(settings.adapters)
    wanted = sum(length([merge([expert])]) for expert in experts) / len(experts)
    tried: list[dict[str, Any]] = []
    best: tuple[float, Merged] | None = None
    for options in choices(settings):
        merged = merge(experts, method=settings.method, options=options, rank=settings.rank)
        even = scaled(merged, wanted / length([merged]))
        for scale, loss in losses(settings, even, experts):
            tried.append({"options": options, "scale": scale, "loss": loss})
            if best is None or loss < best[0]:
                best = loss, scaled(even, scale)
    assert best is not None  # there is a scale
    export_adapter(out, best[1], experts)
    chosen = min(tried, key=lambda row: row["loss"])
    write_json(out / "tuned.json", {"method": settings.method, "chosen": chosen, "tried": tried})
    console.print(f"{settings.method}: {chosen} of {len(tried)}", highlight=False, soft_wrap=True)


def choices(settings: TunedMerge) -> list[dict[str, Any]]:
    """The method's options with each value of the grid."""
    names = [*settings.grid]
    return [settings.options | dict(zip(names, values, strict=True)) for values in product(*settings.grid.values())]


def length(merges: "Sequence[Merged]") -> float:
    """The Frobenius norm of all updates together."""
    return sum(site.energy for merged in merges for site in merged.values()) ** 0.5


def scaled(merged: "Merged", scale: float) -> "Merged":
    return {name: site.scaled(scale) for name, site in merged.items()}


def losses(settings: TunedMerge, merged: "Merged", experts: Sequence[Any]) -> Iterator[tuple[float, float]]:
    """Each scale with the mean loss of the validation sets."""
    import tempfile

    from moa.build import build_model, only_adapter
    from moa.config import load_config
    from moa.merging.export.export import export_adapter

    with tempfile.TemporaryDirectory() as name:
        export_adapter(Path(name) / "adapter", merged, experts)
        config = load_config(settings.like, only_adapter(Path(name) / "adapter"))
        model = build_model(config).eval()
    batches = validation_batches(model, config, settings.num_samples)
    factors = [layer.lora_B["merged"] for layer in model.bank.sites.values() if "merged" in layer.lora_B]
    own = [factor.detach().clone() for factor in factors]
    for scale in settings.scales:
        for factor, before in zip(factors, own, strict=True):
            factor.data = before * scale
        yield scale, mean_loss(model, batches)


def validation_batches(model: "MixtureModel", config: Any, num_samples: int) -> list["Batch"]:
    """One batch of each validation set."""
    from data.sources import make_collator, open_ocr, open_sources

    ocr, collator = open_ocr(config.data), make_collator(config, model.backbone.intake)
    sources = [replace(s, num_samples=num_samples) for s in config.data.validation.values()]
    sets = open_sources(sources, config.data, ocr).values()
    return [collator([dataset[index] for index in range(num_samples)]) for dataset in sets]


def mean_loss(model: "MixtureModel", batches: Sequence["Batch"]) -> float:
    """Of the sets alike."""
    import torch

    with torch.no_grad():
        return sum(float(model(batch).loss_per_sample.mean()) for batch in batches) / len(batches)


if __name__ == "__main__":
    main()
