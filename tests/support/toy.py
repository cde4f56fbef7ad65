"""A toy world on disk: random pictures, JSON-lines files of two tasks, a saved tiny base."""

import json
from pathlib import Path

import yaml

from moa.config import RunConfig, load_config
from tests.support.tiny import random_image, tiny_llava

CLOCKS = ("step_s", "data_wait_s", "samples_per_s", "tokens_per_s", "memory_gib")
COLORS = ("red", "green", "blue")


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def toy_rows(folder: Path, task: str, count: int) -> list[dict]:
    """`count` rows about five pictures of 40x30 pixels that are written beside them."""
    for number in range(5):
        random_image(number).save(folder / f"{number}.png")
    rows = []
    for i in range(count):
        row = {"image": f"{i % 5}.png", "task": task, "question": f"what is in picture {i}?"}
        if task == "grounding":
            row["boxes"] = [[i % 7, 2, 20 + i % 9, 25]]
        else:
            row["answers"] = [COLORS[i % 3]]
        if i % 2:
            row["ocr"] = [{"text": "sign", "box": [1, 2, 10, 8], "confidence": 0.9}]
        rows.append(row)
    return rows


def toy_world(folder: Path, count: int = 24) -> dict:
    """A config (as plain data) of two experts on two sources, with its base and data in `folder`."""
    if not (folder / "base").is_dir():
        model, processor = tiny_llava()
        model.save_pretrained(folder / "base")
        processor.save_pretrained(folder / "base")
    sources = {}
    for task in ("vqa", "grounding"):
        path = write_rows(folder / f"{task}.jsonl", toy_rows(folder, task, count))
        sources[task] = {"format": "jsonl", "path": str(path), "expert": task}
    return {
        "out": str(folder / "run"),
        "model": {
            "name": str(folder / "base"),
            "targets": [r"model\.language_model\.layers\.\d+\.mlp\.(up|down)_proj"],
        },
        "experts": {"vqa": {"rank": 2, "alpha": 4}, "grounding": {"rank": 3, "alpha": 3}},
        "router": {"hidden": 8, "modality_dropout": 0.3},
        "losses": {"z": 0.01, "load_balancing": 0.01},
        "data": {"sources": sources, "tasks": ["vqa", "grounding"],
                 "validation": {n: {**s, "num_samples": 4} for n, s in sources.items()}},
        "train": {"batch_size": 4, "save_every": 3},
        "eval": {"every": 4, "batch_size": 4},
        "logging": {"progress": False},
        "stages": {
            "experts": {"steps": 5, "lr": {"experts": 1e-2}, "warmup_steps": 2},
            "router": {"steps": 4, "lr": {"router": 1e-2}},
            "joint": {"steps": 3},
        },
    }  # fmt: skip


def toy_config(folder: Path, **changes) -> RunConfig:
    """The toy world's config; `changes` are overrides with `__` for the dots."""
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(toy_world(folder), sort_keys=False))
    pairs = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
    return load_config(file, pairs)


def read_log(out: str | Path) -> list[dict]:
    """A run's log without what a clock says; a last line cut short by a kill is left out."""
    lines = (Path(out) / "log.jsonl").read_text().split("\n")[:-1]
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]
