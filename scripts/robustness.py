"""How much do a run's scores fall under typos, misread OCR words, noise and blur? A table and an image.

    python -m scripts.robustness run=runs/demo
    python -m scripts.robustness run=runs/demo corruptions=[typos,ocr] num_samples=64 gates=uniform
    python -m scripts.robustness run=runs/demo corruptions=[] mixing=true   # which pairs of experts can be mixed?

Scores the run's data sets of eval.py as they are, and each corruption at rising strength on the same questions. The
falls are paired, with bootstrap intervals over questions. OUT gets robustness.json and robustness.png, and with
mixing=true mixing.png: what each pair of LoRA experts loses at half the gate each, over the signs that disagree.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from moa.cli.command import command
from moa.cli.ranges import Count, FilePath, Seed

if TYPE_CHECKING:
    from moa.config import RunConfig
    from moa.evaluation.result import Result
    from moa.evaluation.robustness import View
    from moa.model import MixtureModel

    Name = str
else:
    from data.corruption import CORRUPTIONS

    Name = Literal[tuple(CORRUPTIONS)]


@dataclass(frozen=True, kw_only=True)
class RobustnessSettings:
    run: FilePath = ""  # run or step folder
    out: FilePath | None = None  # folder of the results; null: <run>/robustness
    corruptions: list[Name] = field(default_factory=lambda: ["typos", "ocr", "noise", "blur"])
    mixing: bool = False  # also mix each pair of experts, beside the signs of their updates
    num_samples: Count | None = None  # at most so many of each data set; null: as in the run's eval
    gates: str = "router"  # as eval.gates
    seed: Seed = 0  # of the corruptions
    device: str = "auto"  # cpu, cuda, cuda:1; auto: a GPU where there is one
    progress: bool = True  # progress bars


def measure(settings: RobustnessSettings, console: Console) -> None:
    if not settings.run or not (settings.corruptions or settings.mixing):
        raise ValueError("run and corruptions, or mixing=true, are needed; see --help")
    from moa.analysis.plots import mixing_chart, robustness_chart
    from moa.evaluation.models import find_models, open_model, pick_device
    from moa.evaluation.robustness import FILE, mixing_table, study, table
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

    record: dict[str, Any] = {"run": settings.run, "gates": settings.gates, "seed": settings.seed}
    folder = Path(settings.out) if settings.out is not None else model.folder / "robustness"
    if settings.mixing:
        record["mixing"] = mixed(network, config, settings)
        mixing_chart(folder / "mixing.png", record["mixing"])
        console.print(mixing_table(record["mixing"]))
    if settings.corruptions:
        record |= study(score, settings.corruptions, settings.seed)
        robustness_chart(folder / "robustness.png", record)
        console.print(table(record))
    write_json(folder / FILE, record)
    console.print(f"images: {folder}", soft_wrap=True)


def mixed(network: "MixtureModel", config: "RunConfig", settings: RobustnessSettings) -> dict[str, Any]:
    """The loss of mixing each pair of routed experts, beside the signs in which their updates disagree."""
    import torch

    from moa.evaluation.robustness import mixing
    from moa.evaluation.settings import with_eval
    from moa.evaluation.sources import open_datasets, score_sources, trained_experts
    from moa.merging.report.fidelity import measure as fidelity
    from moa.merging.source import open_run

    experts, roles = open_run(settings.run).experts, network.routing.roles
    routed, signs = [roles.experts[place] for place in roles.choices], fidelity(experts)["total"]["sign_disagreement"]
    with_expert, names = trained_experts(config), [expert.name for expert in experts]

    def score(chosen: Collection[str], data_sets: Collection[str]) -> "Sequence[Result]":
        alone = [name in chosen or name not in routed for name in roles.experts]
        network.available = torch.tensor(alone, device=network.routing.weights.device)
        alike = with_eval(config, gates="uniform", only=[*data_sets])
        return score_sources(network, alike, progress=settings.progress)

    firsts = {source.name: dataset[0] for source, dataset in open_datasets(network, config)}
    own = {name: with_expert(sample).expert for name, sample in firsts.items()}
    pairs = {(one, other): signs[names.index(one)][names.index(other)] for one, other in combinations(routed, 2)}
    met = {pair: share for pair, share in pairs.items() if share is not None}
    try:
        return mixing(score, {name: expert for name, expert in own.items() if expert in routed}, met)
    finally:
        network.available = None


main = command(RobustnessSettings, measure, __doc__)

if __name__ == "__main__":
    main()
