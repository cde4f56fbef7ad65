"""What is in run folders, read without a model; what is broken or missing is a line, not an error."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from data.checks import one_line
from moa.analysis.plots import read_log
from moa.cli.settings import to_yaml
from moa.config import RunConfig, load_config
from moa.evaluation.fingerprints import read_result
from moa.evaluation.gates_file import PARTIAL
from moa.evaluation.result import Measured, measured

MARKS = ("config.yaml", "versions.json", "log.jsonl", "checkpoints")  # a run folder has one of these
INSIDE = ("checkpoints", "eval", "others", "pictures", "server")  # of a run, where no other run is
LAST = 10  # steps whose mean loss is the final one
FEDERATION = "federated.yaml"  # in the folder of a run that is one
HERE = ("out", "root")  # settings that say where a run is, not what


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run as far as it can be read, and the reasons for the rest."""

    path: Path
    config: RunConfig | None
    log: list[dict[str, Any]]
    # of eval/ ("") and of each of its folders of other gates: data set -> record and rows of an evaluation
    results: dict[str, dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    num_rounds: int | None = None  # of a federation

    @property
    def progress(self) -> tuple[int, int | None, str]:
        """How much is done, of how much, in steps; of a federation, whose clients' steps are no plan, in rounds."""
        if self.num_rounds is not None:
            rounds = [row.get("round") for row in self.log if row.get("stage") == "server"]
            return max((done for done in rounds if isinstance(done, int)), default=0), self.num_rounds, "rounds"
        steps = [row["step"] for row in self.log if isinstance(row.get("step"), int)]
        planned = None if self.config is None else sum(stage.steps for stage in self.config.stages.values())
        return max(steps, default=0), planned, "steps"

    def final(self, key: str, last: int = LAST) -> float | None:
        """The mean of the last logged values of a metric, None where there is none."""
        values = [row[key] for row in self.log if isinstance(row.get(key), int | float)]
        found = [value for value in values if math.isfinite(value)][-last:]
        return mean(found) if found else None

    def measured(self) -> dict[str, list[Measured]]:
        """The scores by gates, "" for the run's own, as tables of several models take them."""
        return {variant: [measured(*pair) for pair in found.values()] for variant, found in self.results.items()}


def find_runs(folder: Path) -> Iterator[Path]:
    """The run folders in a folder and below, in the order of their names; a step folder is none."""
    for place, names, files in os.walk(folder):
        is_run = any(mark in names or mark in files for mark in MARKS) and "manifest.json" not in files
        if is_run:
            yield Path(place)
        names[:] = sorted(n for n in names if not n.startswith(".") and not (is_run and n in INSIDE))


def read_run(path: Path) -> RunFolder:
    """Never an error for what a kill, a full disk or an editor made of the files."""
    problems: list[str] = []
    config, log, readable, weights = None, [], True, None
    try:
        config = load_config(path / "config.yaml")
    except (ValueError, OSError, yaml.YAMLError) as error:
        missing = not (path / "config.yaml").is_file()
        problems.append("config.yaml is missing" if missing else f"config.yaml: {error}")
    try:
        log = read_log(path / "log.jsonl")
    except (ValueError, OSError) as error:
        problems.append(str(error))
        readable = False
    try:
        weights = weights_of(path)
    except (ValueError, OSError, KeyError, TypeError) as error:
        problems.append(f"no checkpoint: {error}")
    rounds = None
    if (path / FEDERATION).is_file():
        try:
            rounds = int(yaml.safe_load((path / FEDERATION).read_text())["federated"]["rounds"])
        except (ValueError, OSError, yaml.YAMLError, KeyError, TypeError) as error:
            problems.append(f"{FEDERATION}: {error!r}")
    results = {}
    for place in (path / "eval", *sorted((path / "eval").glob("*/"))):
        if place.name != PARTIAL and place.is_dir():
            variant = "" if place == path / "eval" else place.name
            results[variant] = read_results(place, weights, problems)
    found = {variant: own for variant, own in results.items() if own}
    run = RunFolder(path=path, config=config, log=log, results=found, num_rounds=rounds)
    done, planned, unit = run.progress
    if readable and planned is not None and done < planned:
        problems.append(f"has {done} of {planned} {unit}: it was stopped, or trains still")
    return replace(run, problems=[*map(one_line, problems)])


def weights_of(run: Path) -> str:
    """The fingerprint of the checkpoint that is evaluated; ValueError, OSError where there is none."""
    from moa.checkpoint import step_folder, weights_fingerprint

    return weights_fingerprint(step_folder(run))


def read_results(
    folder: Path, weights: str | None, problems: list[str]
) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Record and rows by data set of the evaluations of these weights; the others are named in `problems`."""
    found = {}
    for file in sorted(folder.glob("*.jsonl")):
        name = f"eval/{folder.name}/{file.stem}" if folder.name != "eval" else f"eval/{file.stem}"
        pair = read_result(folder, file.stem)
        try:
            if pair is None:
                problems.append(f"{name}.json: missing, damaged, or of another evaluation than {file.name}")
            elif weights is not None and pair[0]["fingerprints"]["weights"] != weights:
                problems.append(f"{name}.json: of other weights than the run's checkpoint, such as an earlier step")
            else:
                measured(*pair)  # has what tables show
                found[file.stem] = pair
        except (KeyError, TypeError, AttributeError) as error:
            problems.append(f"{name}.json: is not what eval.py writes ({error!r})")
    return found


def differences(configs: Sequence[RunConfig]) -> dict[str, list[str]]:
    """The settings in which the configs differ: key -> value of each, `-` where it has none.

    What only some of them have, such as an expert, is one row.
    """
    values = [yaml.safe_load(to_yaml(config)) for config in configs]
    return dict(_differ("", [{k: v for k, v in value.items() if k not in HERE} for value in values]))


def _differ(key: str, values: Sequence[Any]) -> Iterator[tuple[str, list[str]]]:
    if all(value == values[0] for value in values):
        return
    if all(isinstance(value, Mapping) for value in values):
        for name in dict.fromkeys(name for value in values for name in value):
            yield from _differ(f"{key}.{name}".lstrip("."), [value.get(name, ...) for value in values])
    else:
        yield key, ["-" if value is ... else text_of(value) for value in values]


def _without_unset(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    found = {key: _without_unset(inner) for key, inner in value.items()}
    return {key: inner for key, inner in found.items() if inner not in (None, False, 0, [], {})}


def text_of(value: Any) -> str:
    """A setting as YAML writes it in one line, without what is null or off in a mapping."""
    with suppress(TypeError, ValueError):
        if not isinstance(value, Mapping | list):
            return json.dumps(value, ensure_ascii=False).strip('"')
    return yaml.safe_dump(
        _without_unset(value), default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6
    ).strip()
