"""Merge adapters by one method, tuned like every other: the length of the result and at most one option, on validation.

    python -m scripts.demo.board.tuned_merge adapters=[A,B] method=ties grid={density: [0.1, 0.2, 0.5]} out=OUT

The rule is that of moa/merging/learn/tuning.py, on the mean loss of the validation sets of `like`, with their answers.
Questions of the test split are never seen.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from moa.cli.command import command
from moa.cli.ranges import Count, FilePath, Positive
from moa.cli.settings import check
from moa.merging.methods.table import find_method

if TYPE_CHECKING:
    from data.batch import Batch
    from moa.model import MixtureModel


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


def tune(settings: TunedMerge, console: Console) -> None:
    from moa.build import build_model, only_adapters
    from moa.config import load_config
    from moa.files.atomic import write_json
    from moa.merging.export.export import export_adapter
    from moa.merging.learn import calibration, tuning
    from moa.merging.merge import Merged, merge
    from moa.merging.source import open_folders, with_statistics

    source, method = open_folders(settings.adapters), find_method(settings.method)
    experts = (with_statistics(source) if method.reads_inputs else source).experts
    config = load_config(settings.like, only_adapters({"merged": source.folders[0]}))
    model = build_model(config).eval()
    batches = {str(n): [batch] for n, batch in enumerate(validation_batches(model, config, settings.num_samples))}

    def loss(merged: Merged) -> float:
        with calibration.with_merged(model, merged, experts):
            return calibration.answers_loss(model, batches)

    made = (
        (options, merge(experts, method=settings.method, options=options, rank=settings.rank))
        for options in tuning.choices(settings.options, settings.grid)
    )
    found = tuning.tune(made, tuning.mean_length(experts), loss, settings.scales)
    export_adapter(Path(str(settings.out)), found.merged, experts)
    chosen = {"options": found.options, "scale": found.scale, "loss": found.loss}
    record = {"method": settings.method, "chosen": chosen, "tried": found.tried}
    write_json(Path(str(settings.out)) / "tuned.json", record)
    console.print(f"{settings.method}: {chosen} of {len(found.tried)}", highlight=False, soft_wrap=True)


def validation_batches(model: "MixtureModel", config: Any, num_samples: int) -> list["Batch"]:
    """One batch of each validation set."""
    from data.sources import make_collator, open_ocr, open_sources

    ocr, collator = open_ocr(config.data), make_collator(config, model.backbone.intake)
    sources = [replace(s, num_samples=num_samples) for s in config.data.validation.values()]
    sets = open_sources(sources, config.data, ocr).values()
    return [collator([dataset[index] for index in range(num_samples)]) for dataset in sets]


main = command(TunedMerge, tune, __doc__)

if __name__ == "__main__":
    main()
