"""Write the statistics of each expert's inputs beside it, so that merges which use them need no data later.

    python -m scripts.statistics run=runs/demo
    python -m scripts.statistics run=runs/demo num_samples=128 directions=full

Each expert of a run or step folder gets a stats.safetensors beside its adapter_model.safetensors: at every site the
second moment of its inputs on the expert's own training samples, that expert being on. Send it along with the expert:
it holds sums over tokens, no sample. `train.statistics` writes the same at the end of a training.
"""

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from moa.cli.command import command, progress_bar
from moa.cli.ranges import Count, FilePath, ShareAboveZero, Size
from moa.statistics import ANSWER_SHARE


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig:
    run: FilePath | None = None  # a run or step folder
    num_samples: Count = 64  # of each expert, from data.sources
    batch_size: Size = 16
    # of the moments: how many are kept one by one, or full; null: as many as make the file about as large as the expert
    directions: Any = None
    # of the moments that the positions before an answer's tokens make up; null: every token counts alike, as published
    answer_share: ShareAboveZero | None = ANSWER_SHARE

    def __post_init__(self) -> None:
        number = isinstance(self.directions, int) and not isinstance(self.directions, bool) and self.directions > 0
        if not number and self.directions not in (None, "full"):
            raise ValueError(f"directions: must be 1 or more, full or null, got {self.directions!r}")


def write_statistics(settings: StatisticsConfig, console: Console) -> None:
    if settings.run is None:
        raise ValueError("run: names no folder")
    from data.sources import open_mixture, open_ocr
    from moa.checkpoint import load_model, step_folder
    from moa.statistics.measure import Measurement

    model, _, config = load_model(settings.run)
    if not config.data.sources:
        raise ValueError(f"run: {settings.run} has no data.sources to read samples from")
    chosen = {name: getattr(settings, name) for name in ("num_samples", "batch_size", "directions", "answer_share")}
    measurement = Measurement(model=model, config=config, mixture=open_mixture(config, open_ocr(config.data)), **chosen)
    with progress_bar("statistics", measurement.num_ticks, console) as advance:
        lines = measurement.write(step_folder(settings.run), tick=advance)
    console.print(*lines, sep="\n", highlight=False, soft_wrap=True)


main = command(StatisticsConfig, write_statistics, __doc__, quiet=True)

if __name__ == "__main__":
    main()
