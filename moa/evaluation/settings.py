"""Settings of an evaluation and the rules between them; nothing here imports torch."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

from data.config import SourceConfig
from moa.benchmarks.table import BENCHMARKS, BY_FORMAT
from moa.cli.ranges import FilePath
from moa.cli.settings import laid_over, load, read_override
from moa.cli.strict_yaml import read_yaml
from moa.config import RunConfig
from moa.sections import GATE_RULES, EvalConfig

WITH = re.compile(r"with:(?:(\d*\.?\d+)\*)?(.+)")


@dataclass(frozen=True, kw_only=True)
class EvalCommand:
    run: FilePath | None = None  # run folder or step folder
    # further models in the same table: runs, PEFT adapters, (merged) checkpoints, ORG/MODEL of the hub
    models: list[FilePath] = field(default_factory=list)
    # run or YAML file with the prompt and the data sets for models that are not runs; null: the first run
    like: FilePath | None = None
    other_base: bool = False  # score on a base that changed since, or is another one
    # results of the same weights, data, settings and versions are read from the folder, not measured again
    reuse: bool = False
    device: str = "auto"  # cpu, cuda, cuda:1; auto: a GPU where there is one
    progress: bool = True  # progress bars
    eval: EvalConfig = field(default_factory=EvalConfig)  # in place of what the run's config has


def read_command(files: Sequence[str] | None, overrides: Sequence[str]) -> tuple[EvalCommand, list[tuple[str, Any]]]:
    """The command, and the settings of `eval` that replace those of each run."""
    rest = [text for text in overrides if not re.match(r"eval[.=]", text)]
    command = load(EvalCommand, files, rest)  # checks the files too
    raw: dict[str, Any] = reduce(laid_over, map(read_yaml, files or ()), {})
    given = [(f"eval.{key}", value) for key, value in (raw.get("eval") or {}).items()]
    given += map(read_override, [text for text in overrides if text not in rest])
    if any(key == "eval.every" for key, _ in given):
        raise ValueError("eval.every: has no effect here, it is for train.py")
    return command, given


def with_eval(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, eval=replace(config.eval, **changes))


def chosen_sources(config: RunConfig) -> list[SourceConfig]:
    """The data sets to score, cut to `num_samples`; ValueError where that leaves none."""
    settings = config.eval
    sources = settings.sources or config.data.validation
    if not sources:
        raise ValueError("eval.sources: names none, and data.validation is empty")
    check_sources(sources.values(), settings.only or ())
    chosen = [s for s in sources.values() if settings.only is None or s.name in settings.only]
    limit = settings.num_samples
    return [s if limit is None else replace(s, num_samples=min(limit, s.num_samples or limit)) for s in chosen]


def check_sources(sources: Iterable[SourceConfig], only: Sequence[str] = ()) -> None:
    """ValueError for names that the files of results cannot have, and for an unknown benchmark."""
    sources = [*sources]
    names = [source.name for source in sources]
    folded = [name.casefold() for name in names]
    for name in names:
        if name.casefold() == "routing":
            raise ValueError(f"sources: {name!r} is the name of the file with the gates")
        if folded.count(name.casefold()) > 1:
            raise ValueError(f"sources: two data sets have the name {name} (but for upper case)")
    for source in sources:
        if source.benchmark is not None and source.benchmark not in BENCHMARKS:
            choices = f"no benchmark {source.benchmark!r}; choices: {', '.join(BENCHMARKS)}"
            raise ValueError(f"sources.{source.name}.benchmark: {choices}")
    for name in only:
        if name not in names:
            raise ValueError(f"eval.only: no data set {name!r}; choices: {', '.join(names)}")


def benchmark_of(source: SourceConfig) -> str | None:
    """The benchmark that a source names, or its format's; None: each sample's task decides."""
    return source.benchmark or BY_FORMAT.get(source.format)


def partner_of(rule: Any) -> tuple[str, float] | None:
    """Run and weight of with:RUN or with:0.3*RUN; None for gates of the model's own."""
    match = WITH.fullmatch(rule) if isinstance(rule, str) else None
    if match is None:
        return None
    weight = float(match[1] or 0.5)
    if not 0 < weight <= 0.5:
        raise ValueError(f"gates={rule}: the weight must be above 0 and at most 0.5; evaluate the run that weighs more")
    return match[2], weight


def mixes_answers(rule: Any) -> bool:
    """Whether a rule averages what several models answer, which no gates do."""
    return rule == "ensemble" or partner_of(rule) is not None


def check_gates(rule: str, names: Sequence[str], granularity: str = "sample") -> None:
    """ValueError, with the choices, for a rule that these experts do not have."""
    if other := partner_of(rule):
        if not Path(other[0]).is_dir():
            raise ValueError(f"eval.gates={rule}: {other[0]} is no folder of a run")
        return
    if rule not in GATE_RULES and rule.removeprefix("without:") not in names:
        choices = ", ".join([*GATE_RULES, *names, *(f"without:{name}" for name in names), "with:RUN"])
        raise ValueError(f"eval.gates={rule}: unknown; choices: {choices}")
    if rule.startswith("without:") and granularity != "sample":
        raise ValueError(f"eval.gates={rule}: has no meaning where every token is routed by itself")


def variant_of(settings: EvalConfig) -> str:
    """The folder below <run>/eval, empty for the model as it was trained."""
    parts = [re.sub(r"[^\w.]+", "-", settings.gates)] if settings.gates != "router" else []
    return "_".join([*parts, *(["no_task"] if settings.withhold_task else [])])
