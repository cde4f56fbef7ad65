"""How much do a run's scores fall under typos, misread OCR words, noise and blur? A table and an image.

    python -m scripts.robustness run=runs/demo
    python -m scripts.robustness run=runs/demo corruptions=[typos,ocr] num_samples=64 gates=uniform

Scores the run's data sets of eval.py as they are, and each corruption at rising strength on the same questions. The
falls are paired, with bootstrap intervals over questions. OUT gets robustness.json and robustness.png.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from moa.cli.command import command
from moa.cli.ranges import Count, FilePath, Seed

if TYPE_CHECKING:
    from moa.evaluation.result import Result
    from moa.evaluation.robustness import View

    Name = str
else:
    from data.corruption import CORRUPTIONS

    Name = Literal[tuple(CORRUPTIONS)]


@dataclass(frozen=True, kw_only=True)
class RobustnessSettings:
    run: FilePath = ""  # run or step folder
    out: FilePath | None = None  # folder of the results; null: <run>/robustness
    corruptions: list[Name] = field(default_factory=lambda: ["typos", "ocr", "noise", "blur"])
    num_samples: Count | None = None  # at most so many of each data set; null: as in the run's eval
    gates: str = "router"  # as eval.gates
    seed: Seed = 0  # of the corruptions
    device: str = "auto"  # cpu, cuda, cuda:1; auto: a GPU where there is one
    progress: bool = True  # progress bars


def measure(settings: RobustnessSettings, console: Console) -> None:
    if not settings.run or not settings.corruptions:
        raise ValueError("run and corruptions are needed; see --help")
    from moa.analysis.plots import robustness_chart
    from moa.evaluation.models import find_models, open_model, pick_device
    from moa.evaluation.robustness import FILE, study, table
    from moa.evaluation.settings import with_eval
    from moa.evaluation.sources import score_sources
    from moa.files.atomic import write_json

    (model,) = find_models([settings.run], None)
    own = {"num_samples": settings.num_samples or model.config.eval.num_samples, "gates": settings.gates}
    config = with_eval(model.config, num_images=0, **own)
    lenient = with_eval(config, on_bad_sample="skip")  # a spoilt question that no longer fits has the score 0
    network = open_model(model, pick_device(settings.device))
    network.answering()  # refuses a CLIP

    def score(view: "View | None") -> "Sequence[Result]":
        if view is None:
            return score_sources(network, config, progress=settings.progress)
        return score_sources(network, lenient, progress=settings.progress, view=view)

    record = study(score, settings.corruptions, settings.seed)
    folder = Path(settings.out) if settings.out is not None else model.folder / "robustness"
    write_json(folder / FILE, {"run": settings.run, "gates": settings.gates, "seed": settings.seed, **record})
    robustness_chart(folder / "robustness.png", record)
    console.print(table(record))
    console.print(f"image: {folder / 'robustness.png'}", soft_wrap=True)


main = command(RobustnessSettings, measure, __doc__)

if __name__ == "__main__":
    main()
