"""Experts into the store: their files, and a record of what was measured of them, by this command or before."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from data.config import SourceConfig
from moa.card import CARD, Card, license_of, with_scores
from moa.checkpoint import load_tensors, step_folder, weights_fingerprint
from moa.evaluation.gates_file import run_of
from moa.evaluation.result import interval, measured
from moa.evaluation.runs import read_results
from moa.files.atomic import write_file, write_json
from moa.files.peft import STATISTICS_FILE, WEIGHTS_FILE
from moa.files.peft_config import CONFIG_FILE
from moa.merging.adapters import Expert, adapter_folders, respell
from moa.merging.report.fidelity import measure
from moa.merging.settings import StoreConfig
from moa.merging.source import Source, open_folders, with_known_statistics
from moa.merging.store.place import NAME, RECORD, Entry, Place, open_place
from moa.merging.weights import digest
from moa.parts import PARTS

ANCHORS_FILE = "anchors.safetensors"
TASKS = "tasks"  # in its metadata: what the columns of the task's sums are
MIXING = ("cosine", "disturbed", "disturbs")  # crosstalk of the other on its samples, and of it on the other's
ANCHOR = re.compile(r"router\.((\w+)_(sums|counts))")


def publish(settings: StoreConfig, console: Console) -> None:
    """All experts are checked before the first is stored."""
    if bool(settings.adapters) == (settings.run is not None):
        raise ValueError("run, adapters: give one of the two")
    folders = adapter_folders(settings.adapters or [f"{step_folder(str(settings.run))}/experts/*"])
    names = [settings.name] * len(folders) if settings.name else [folder.resolve().name for folder in folders]
    for name, folder in zip(names, folders, strict=True):
        if names.count(name) > 1 or not re.fullmatch(NAME, name):
            why = "is the name of two" if names.count(name) > 1 else "must be letters, digits and _"
            raise ValueError(f"name: {name!r} {why}; publish adapters=[{folder}] by itself with name=OTHER")
    sources = [with_known_statistics(open_folders([str(folder)])) for folder in folders]
    for source in sources:
        for site in source.experts[0].ranks:
            source.experts[0].read(site)  # refuses values that are not finite
    place = open_place(settings.store, create=True)
    with place.writing():
        store_all(place, dict(zip(names, sources, strict=True)), settings, console)


def store_all(place: Place, sources: Mapping[str, Source], settings: StoreConfig, console: Console) -> None:
    for name, source in sources.items():
        known = place.versions.get(name)
        if known and not settings.update and place.get(name)[0].digest != digest(source.experts[0]):
            raise ValueError(f"{name}: the store has other weights of this name, version {known[-1]}; update=true "
                             "stores these as its next version, name=OTHER beside it")  # fmt: skip
    for name, source in sources.items():
        version, entry = store_one(place, name, source, settings.license)
        unknown = [key for key in ("base_fingerprint", "data", "statistics", "scores") if not getattr(entry, key)]
        about = f"{name} {version}: rank {entry.rank} at {entry.num_sites} layers, beside {len(entry.mixes)} others"
        console.print(about + (f"; unknown: {', '.join(unknown)}" if unknown else ""), soft_wrap=True, highlight=False)
        place = open_place(settings.store)


def store_one(place: Place, name: str, source: Source, license_: str | None) -> tuple[str, Entry]:
    """Put an expert in the store with all that is known of it; its version and record."""
    [expert], [origin] = source.experts, source.folders
    base = expert.config.get("base_model_name_or_path") or None
    data, samples = trained_on(source), None
    if expert.inputs is not None:
        with safe_open(origin / STATISTICS_FILE, framework="pt") as handle:
            samples = int(handle.metadata()["num_samples"])
    with tempfile.TemporaryDirectory() as temporary:
        built = Path(temporary) / name
        built.mkdir()
        for file in (CONFIG_FILE, WEIGHTS_FILE, *([STATISTICS_FILE] if expert.inputs else [])):
            shutil.copyfile(origin / file, built / file)
        entry = Entry(
            name=name,
            digest=digest(expert),
            base=base,
            base_fingerprint=expert.base_fingerprint,
            rank=max(expert.ranks.values()),
            num_sites=len(expert.ranks),
            tasks=list(dict.fromkeys(s.task for s in data if s.task)),
            data=[{"name": s.name, "task": s.task, "split": s.split, "from": s.path or s.format} for s in data],
            license={"license": license_} if license_ else license_of(base),
            statistics=samples,
            anchors=write_anchors(built / ANCHORS_FILE, source),
            scores=list(scores_alone(source.step, expert.name)) if source.step else [],
            mixes=list(mixing(place, name, expert)),
            beside=source.beside,
        )
        write_json(built / RECORD, asdict(entry))
        write_file(built / CARD, card_of(entry, source))
        return place.put(name, built), entry


def trained_on(source: Source) -> list[SourceConfig]:
    """The expert's own data in the run around it."""
    data = source.config.data if source.config else None
    return [s for s in data.sources.values() if data.expert or s.expert == source.experts[0].name] if data else []


def scores_alone(step: Path, name: str) -> Iterator[dict[str, Any]]:
    """What eval.py measured with these weights of an expert alone: at its gate, and by oracle gates on its own data."""
    for gates in (name, "oracle"):
        found = read_results(run_of(step) / "eval" / gates, weights_fingerprint(step), [])
        for record, rows in found.values():
            if gates == name or all(row["expert"] == name for row in rows):
                of = measured(record, rows)
                yield {"data": of.name, "gates": gates, "metric": "+".join(of.metrics), **of.score, "n": record["n"]}


def mixing(place: Place, name: str, expert: Expert) -> Iterator[dict[str, Any]]:
    """The expert beside each that the store has of the same base: cosine, and crosstalk where statistics are."""
    same = [(version, entry) for version, entry in place.entries()
            if entry.name != name and entry.base_fingerprint == expert.base_fingerprint is not None]  # fmt: skip
    if not same:
        return
    folders = [str(place.get(f"{entry.name}@{version}")[1]) for version, entry in same]
    others = [with_known_statistics(open_folders([folder])).experts[0] for folder in folders]
    total = measure(respell([replace(expert, name=name), *others], None))["total"]
    crosstalk = total.get("crosstalk") or [[None] * (len(same) + 1)] * (len(same) + 1)
    for j, (version, entry) in enumerate(same, start=1):
        own = total["cosine"][0][j], crosstalk[0][j], crosstalk[j][0]
        yield {"name": entry.name, "version": version, **dict(zip(MIXING, own, strict=True))}


def write_anchors(file: Path, source: Source) -> list[str]:
    """The expert's rows of its run's router, where that learned by means; the kinds of evidence it has."""
    config, name = source.config, source.experts[0].name
    if config is None or source.step is None or config.router.row.learns != "means" or name not in config.choices:
        return []
    row, state = config.choices.index(name), load_tensors(source.step / PARTS["router"].file)
    found = {match[1]: tensor[row].clone() for key, tensor in state.items() if (match := ANCHOR.fullmatch(key))}
    kinds = sorted(key.removesuffix("_counts") for key, own in found.items() if key.endswith("_counts") and own > 0)
    kept = {f"{kind}_{part}": found[f"{kind}_{part}"] for kind in kinds for part in ("sums", "counts")}
    if kinds:
        save_file(kept, file, metadata={TASKS: json.dumps(config.data.tasks)})
    return kinds


def card_of(entry: Entry, source: Source) -> str:
    mixes = [[row["name"], row["version"], *("-" if row[key] is None else f"{row[key]:.3f}" for key in MIXING)]
             for row in entry.mixes]  # fmt: skip
    card = Card(
        name=entry.name,
        kind="adapter",
        about=f"A LoRA expert of rank {entry.rank} at {entry.num_sites} layers.",
        base=entry.base,
        fingerprint=entry.base_fingerprint,
        config=source.config,
        sources=trained_on(source),
        license=entry.license,
        mixes=mixes,
    ).text()
    scores = [[row["data"], row["metric"], interval(row), str(row["n"])] for row in entry.scores]
    return with_scores(card, "Of the expert alone, by eval.py.", scores) if scores else card
