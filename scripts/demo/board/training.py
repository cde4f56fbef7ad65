"""Train or make the weights of one row at one seed, each in a process of its own; what is there is not made again."""

import json
import shlex
import subprocess
import sys
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any

from moa.backbones.fingerprint import base_fingerprint
from moa.checkpoint import step_folder, weights_fingerprint
from moa.cli.settings import apply_override, laid_over, read_override
from moa.cli.strict_yaml import read_yaml
from moa.config import RunConfig
from moa.evaluation.fingerprints import digest
from moa.federated.config import FederateConfig
from moa.files.atomic import write_file, write_json
from scripts.demo.board.plan import MADE, ROOT, Cell, Plan, load_run, needed, read_board

Setting = tuple[str, Any]  # key and value, as on the command line
# settings that change no weight; statistics can be written later too, by scripts.statistics
NOT_TRAINED_BY = ("out", "eval", "logging", "root", "train.statistics")
DONE = "done"  # what a row was made of, written last


@dataclass(frozen=True, kw_only=True)
class Making:
    """A command that writes `out`, and the digest of all that its result depends on."""

    out: Path
    command: list[str]
    wanted: str

    def is_done(self) -> bool:
        """ValueError where `out` is of something else."""
        done = self.out / DONE
        if done.is_file() and done.read_text() != self.wanted:
            raise ValueError(
                f"{self.out}: was made with other settings, from other weights or on another base; use another `out`, "
                "or delete the folder to make it again"
            )
        return done.is_file()

    def do(self) -> None:
        """Run the command unless it was run before; its output goes to `out`/log.txt."""
        if self.is_done():
            return
        log = self.out / "log.txt"
        self.out.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(f"{shlex.join(self.command)}\n")
            file.flush()
            code = subprocess.run(self.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
        if code:
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1]
            raise ValueError(f"{self.out}: failed; see {log}: {last}")
        write_file(self.out / DONE, self.wanted)


@cache
def config_of(board: str, row: str, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Of a row's runs, whatever their seed and rate; the places in its settings are not filled."""
    return load_run(read_board(board), read_board(board).rows[row], overrides)


def making(plan: Plan, cell: Cell) -> Making | None:
    """How the weights of a row are made; None where they are another row's."""
    row = read_board(cell.board).rows[cell.row]
    if row.of is not None:
        return None
    if row.command is None:
        return training(plan, cell, plan.folder(cell), tuned_rate(plan, cell), share=1.0)
    out, weights = plan.folder(cell), weights_of(plan, cell)
    places = {"{out}": str(out / MADE), "{seed}": str(cell.seed)}
    module, *settings = shlex.split(plan.filled(row.command, cell))
    for place, text in places.items():
        settings = [setting.replace(place, text) for setting in settings]
    wanted = digest(json.dumps([row.command, weights]))
    return Making(out=out, command=[sys.executable, "-m", module, *settings], wanted=wanted)


def training(plan: Plan, cell: Cell, out: Path, changes: list[Setting], share: float) -> Making:
    """One run of train.py into `out`, for `share` of its steps; a half-trained one is continued."""
    board, row = read_board(cell.board), read_board(cell.board).rows[cell.row]
    files = [*board.config, *row.config]
    own = [*plan.settings(cell).items(), *changes, ("seed", cell.seed), *map(read_override, plan.overrides)]
    if row.pooled:
        own.append(("federated.partition", {"clients": 1, "how": "even"}))
    own = written_through(own)
    config = config_of(cell.board, cell.row, plan.overrides)
    own += shorter(config, share * plan.steps)
    sizes = {name: source.num_samples or 0 for name, source in config.data.validation.items()}
    if (most := plan.num_samples) is not None:
        own += [(f"data.validation.{name}.num_samples", most) for name, size in sizes.items() if size > most]
    raw: dict[str, Any] = reduce(laid_over, map(read_yaml, files))
    asked = {key: value for key, value in raw.items() if key not in NOT_TRAINED_BY}
    given = [(key, value) for key, value in own if key not in NOT_TRAINED_BY]
    base, start = base_fingerprint(plan.filled(config.model.name, cell)), weights_of(plan, cell)
    wanted = digest(json.dumps([asked, given, base, start], default=repr))  # an entry that a layer removes is no JSON
    own += [("out", str(out)), ("eval.every", 0), ("logging.progress", False)]
    own += [("data.ocr_cache", str(plan.ocr_file))] if config.data.ocr_cache else []
    own += [("federated.num_questions", 0)] if board.partitions else []  # scored here, beside the other rows
    arguments = [f"{key}={json.dumps(value)}" for key, value in own]
    layers = [text for file in files for text in ("--config", file)]
    script = "federate.py" if board.partitions else "train.py"
    return Making(out=out, command=[sys.executable, script, *layers, "--resume", *arguments], wanted=wanted)


def written_through(settings: list[Setting]) -> list[Setting]:
    """The same, where a mapping has what later settings change inside of it: runs that are alike look alike."""
    settings, below = deepcopy(settings), dict[str, Any]()
    for setting in settings:
        apply_override(below, setting)  # it goes into the mappings of those before
    return settings


def weights_of(plan: Plan, cell: Cell) -> list[str]:
    """Fingerprints of everything that a row starts from."""
    found = []
    for other in needed(cell):
        folder = plan.folder(other)
        made = (folder / DONE).read_text() if (folder / MADE).exists() else None
        found.append(made or weights_fingerprint(step_folder(folder, "last")))
    return found


def shorter(config: RunConfig, share: float) -> list[Setting]:
    """Every stage with a share of its steps, at least one."""
    found: list[Setting] = []
    for name, stage in config.stages.items() if share != 1 else ():
        steps = max(1, round(share * stage.steps))
        warmup = min(steps, round(share * stage.warmup_steps))
        found += [(f"stages.{name}.steps", steps), (f"stages.{name}.warmup_steps", warmup)]
    if share != 1 and isinstance(config, FederateConfig) and (rounds := config.federated.rounds) > 2:
        found.append(("federated.rounds", max(2, round(share * rounds))))  # some stages begin in the second
    return found


# Learning rate ----------------------------------------------------------------------------------------


def tune(plan: Plan, cell: Cell) -> None:
    """Find the rate with the lowest validation loss at the seed of the board's `tune`, from shorter runs."""
    losses, runs = {}, tuning_runs(plan, cell)
    for rate, run in runs.items():
        run.do()
        losses[f"{rate:g}"] = last_validation(run.out)
    best = min(runs, key=lambda rate: losses[f"{rate:g}"])
    found = {"losses": losses, "rate": best, "factor": best / first_rate(cell)}
    write_json(tune_file(plan, cell), found | {"wanted": [run.wanted for run in runs.values()]})


def is_tuned(plan: Plan, cell: Cell) -> bool:
    """Whether the rate was found, with these settings."""
    file = tune_file(plan, cell)
    wanted = [run.wanted for run in tuning_runs(plan, cell).values()] if file.is_file() else None
    return wanted is not None and json.loads(file.read_text())["wanted"] == wanted


def tuning_runs(plan: Plan, cell: Cell) -> dict[float, Making]:
    settings, folder = read_board(cell.board).tune, plan.out / cell.board / cell.row / "tune"
    assert settings is not None and cell.seed == settings.seed
    return {
        rate: training(
            plan, cell, folder / f"rate-{rate:g}", times_rates(cell, rate / first_rate(cell)), share=settings.steps
        )
        for rate in settings.rates
    }


def tune_file(plan: Plan, cell: Cell) -> Path:
    row = read_board(cell.board).rows[cell.row]
    return plan.out / cell.board / (row.tune_as or cell.row) / "tune.json"


def tuned_rate(plan: Plan, cell: Cell) -> list[Setting]:
    """Rates of this row, as found for it or for the row whose factor it takes; nothing without tuning."""
    if read_board(cell.board).tune is None:
        return []
    return times_rates(cell, json.loads(tune_file(plan, cell).read_text())["factor"])


def times_rates(cell: Cell, factor: float) -> list[Setting]:
    return [(key, rate * factor) for key, rate in rates_of(cell).items()]


def first_rate(cell: Cell) -> float:
    return next(iter(rates_of(cell).values()))


def rates_of(cell: Cell) -> dict[str, float]:
    """The learning rate of experts in each stage that trains them; of the router where it alone is trained."""
    stages = config_of(cell.board, cell.row).stages
    of_experts = {
        f"stages.{name}.lr.experts": stage.lr.experts for name, stage in stages.items() if stage.kind != "router"
    }
    return of_experts or {f"stages.{name}.lr.router": stage.lr.router for name, stage in stages.items()}


def last_validation(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["validation"] for line in lines if "validation" in line][-1]
