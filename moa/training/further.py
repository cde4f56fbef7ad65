"""A finished run, one expert of which learns further, or a new one, from samples in memory.

As configs/new_expert.yaml: the other experts are frozen, and the router learns from new and from some old samples.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml

from moa.cli.settings import Override, to_yaml
from moa.config import RunConfig, load_config
from moa.evaluation.predict import read_image
from moa.files.atomic import write_file

KEPT = 400  # old samples a source, for the router alone


def store_rows(rows: Iterable[Mapping[str, Any]], folder: Path, task: str) -> tuple[Path, list[str]]:
    """Rows as docs/data.md has them, of `task` where they name none, as a file of format jsonl; its tasks too. An image
    that is no path is stored beside it once, as PNG by a hash of its pixels; one answer need not be a list."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, tasks = list[str](), dict[str, None]()

    def stored(image: Any) -> Any:
        if isinstance(image, list | tuple):
            return [stored(one) for one in image]
        if isinstance(image, str | Path):
            return str(Path(image).expanduser().resolve())
        if image is None:
            return None
        pixels = read_image(image)
        file = folder / f"{hashlib.sha256(str(pixels.size).encode() + pixels.tobytes()).hexdigest()[:32]}.png"
        if not file.exists():
            pixels.save(file)
        return file.name

    for given in rows:
        row = {"task": task, **given}
        if "image" in row:
            row["image"] = stored(row["image"])
        row |= {"answers": [row["answers"]]} if isinstance(row.get("answers"), str) else {}
        lines.append(json.dumps(row) + "\n")
        tasks[str(row["task"])] = None
    if not lines:
        raise ValueError("rows: there are none")
    write_file(folder / "rows.jsonl", "".join(lines))
    return folder / "rows.jsonl", [*tasks]


def further_config(
    step: Path,
    config: RunConfig,
    out: Path,
    rows: tuple[Path, list[str]],
    expert: str,
    steps: int,
    settings: Mapping[str, Any],
) -> RunConfig:
    """The config of a run that begins with the weights of `step`; `settings` are `key.sub: value` over it."""
    raw = yaml.safe_load(to_yaml(config))
    everyone, file = raw["data"]["expert"], str(rows[0].resolve())
    sources = {
        name: {
            **source,
            "expert": source["expert"] or everyone,
            "num_samples": min(source["num_samples"] or KEPT, KEPT),
        }
        for name, source in raw["data"]["sources"].items()
    }
    new = next(name for name in chain([expert], (f"{expert}_{i}" for i in count(2))) if name not in sources)
    sources[new] = {"format": "jsonl", "path": file, "expert": expert}
    usual = {key: next(iter(raw["experts"].values()))[key] for key in ("rank", "alpha")}
    experts = {name: {**own, "init_from": None, "frozen": name != expert} for name, own in raw["experts"].items()}
    warm = {"warmup_steps": steps // 10, "lr_end": 0.1}
    stages: dict[str, Any] = {"experts": {"steps": steps, "init_from": str(step), "sources": [new], **warm}}
    if config.router.row.learns:
        stages["router"] = {"steps": max(steps // 2, 1), "warmup_steps": steps // 20, "lr_end": 0.1}
    over: list[Override] = [
        ("out", str(out)),
        ("data.expert", None),
        ("data.sources", sources),
        ("data.tasks", list(dict.fromkeys([*config.data.tasks, *rows[1]]))),
        ("experts", {**experts, **({} if expert in experts else {expert: usual})}),
        ("stages", stages),
    ]
    return load_config(step / "config.yaml", [*over, *settings.items()])
