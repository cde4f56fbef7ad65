"""What the scoreboard trains and scores: its rows, its columns, and one seed of it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data.ocr import OcrCache
from data.world.scene_dataset import TRAINED_TASKS, SceneDataset
from moa.backbones.fingerprint import base_fingerprint
from moa.cli.settings import Override
from moa.config import RunConfig, load_config
from moa.evaluation.fingerprints import digest

ROOT = Path(__file__).resolve().parents[3]

CONFIG = "configs/demo.yaml"
EVIDENCE = {
    "router_image": ["image"],
    "router_image_text": ["image", "text"],
    "router_image_text_ocr": ["image", "text", "ocr"],
    "router_all": ["image", "text", "ocr", "task"],
}
ROWS = (
    "base", "lora", "lora_equal_rank", "oracle", *EVIDENCE, "router_no_prefix", "router_token_top2",
    "merged_uniform_rank_r", "merged_exact", "merged_rank_r",
)  # fmt: skip
MERGES = {  # row -> weights and rank of the merge of router_all's experts; r is one expert's rank
    "merged_uniform_rank_r": ("uniform", "r"),
    "merged_exact": ("gates", "sum"),
    "merged_rank_r": ("gates", "r"),
}


@dataclass(frozen=True, kw_only=True)
class Column:
    """One set of questions; without a task, the mean over the trained ones."""

    split: str
    task: str | None = None
    style: str | None = None
    withhold_task: bool = False

    def datasets(self, num_samples: int, ocr: OcrCache | None) -> list[SceneDataset]:
        of_slice = self.split.startswith("slice_")
        tasks = [self.task] if self.task or of_slice else list(TRAINED_TASKS)
        count = num_samples if len(tasks) == 1 else num_samples // 2
        return [SceneDataset(self.split, task, num_samples=count, style=self.style, ocr=ocr) for task in tasks]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one seed needs to train and score its rows."""

    out: Path
    seed: int
    columns: dict[str, Column]
    num_samples: int
    overrides: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.out / f"seed-{self.seed}"

    @property
    def ocr_file(self) -> Path:
        return self.out / "ocr.parquet"

    def fingerprint(self, *more: Override) -> str:
        """Of the settings of a run of this seed and of the base that it starts from."""
        config = self.config(*more)
        return digest(json.dumps([asdict(config), base_fingerprint(config.model.name)], default=str))

    def config(self, *more: Override) -> RunConfig:
        return load_config(ROOT / CONFIG, [*self.overrides, f"seed={self.seed}", *more])

    def steps(self) -> dict[str, int]:
        """Optimiser steps by stage name; every row but `base` trains for their sum."""
        return {name: stage.steps for name, stage in self.config().stages.items()}
