"""Training steps with and without the pictures' features kept on the disk, and where a step's time goes.

    python benchmarks/features.py [--rounds 5]

demo   configs/demo.yaml, stage joint: drawn pictures, tower and language model of four layers each
heavy  photographs (JPEG, 640 x 480) at 336 pixels, tower and language model in the proportion of CLIP-L to a language
       model of 135M parameters, an eighth as wide

A step is reading, collating, forward and backward of one batch. The two ways take turns, and losses must agree bit for
bit. The table below them is from shapes alone: by which factor fewer FLOPs a step of well-known models takes.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from skimage import data as photographs
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.bench_model import clock, ratio
from benchmarks.record import machine, write_results
from data.collate import Collator
from data.mixture import Mixture
from data.scene_dataset import _render
from data.sources import make_collator, open_mixture, open_ocr
from moa.backbones.llava import load_backbone
from moa.build import build_model
from moa.config import RunConfig, load_config
from moa.features import keep, open_features
from moa.model import MixtureModel

ROOT = Path(__file__).parent.parent
BASE, BATCH = ROOT / "assets/demo_base", 8
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
# name: tower's parameters and patches, the language model's parameters (without embeddings) and image tokens
MODELS = {
    "LLaVA-1.5-7B (CLIP-L/336)": (303e6, 577, 6.48e9, 576),
    "LLaVA-1.5-13B (CLIP-L/336)": (303e6, 577, 12.7e9, 576),
    "PaliGemma-3B (SigLIP-So400m/224)": (412e6, 256, 1.98e9, 256),
    "LLaVA with a 0.5B language model": (303e6, 577, 0.36e9, 576),
    "LLaVA with a 135M language model": (303e6, 577, 0.106e9, 576),
}
TEXT_TOKENS = 100


def heavy_config(folder: Path) -> RunConfig:
    """A random LLaVA whose tower outweighs its language model, and a batch's worth of photographs."""
    processor = load_backbone(str(BASE)).processor
    processor.image_processor.size = {"height": 336, "width": 336}
    processor.patch_size = 28
    processor.save_pretrained(folder / "base")
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=24, num_attention_heads=4,
        image_size=336, patch_size=28,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=665, hidden_size=112, intermediate_size=304, num_hidden_layers=12,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=664, image_seq_length=144,
        vision_feature_layer=-2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder / "base")
    rows = []
    for i in range(BATCH):
        picture = Image.fromarray(getattr(photographs, PHOTOGRAPHS[i % 4])()).convert("RGB")
        picture.resize((640, 480)).rotate(i).save(folder / f"{i}.jpg", quality=90)
        rows.append(
            {"image": f"{i}.jpg", "task": "vqa", "question": "what is it?", "answers": ["a"]}
        )
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    source = f"{{name: vqa, format: jsonl, path: {folder / 'rows.jsonl'}, expert: vqa}}"
    overrides = [
        f"data.feature_cache={folder / 'features'}",
        f"data.sources=[{source}]",
        f"model.name={folder / 'base'}",
        "data.tasks=[vqa]",
        "experts={vqa: {rank: 2}, other: {rank: 2}}",
    ]
    return load_config(None, overrides)


class Way:
    """One of the two ways to take the steps of a config."""

    def __init__(self, config: RunConfig, model: MixtureModel, batch_size: int, known: bool):
        self.model, self.batch_size = model, batch_size
        self.store = open_features(config, model) if known else None
        self.mixture: Mixture = open_mixture(config, open_ocr(config.data), self.store)
        self.collator: Collator = make_collator(config, model.backbone.intake, features=self.store)
        self.parts: dict[str, list[float]] = {}

    def fill(self) -> None:
        assert self.store is not None
        batch = self.collator(self.samples())
        if batch.tower_states is None:
            keep(self.store, self.model, batch, "fp32")
            self.store.flush()

    def samples(self) -> list[Any]:
        _render.cache_clear()  # training meets most pictures for the first time
        return [self.mixture[i] for i in range(self.batch_size)]

    def step(self) -> Tensor:
        with self.part("read"):
            samples = self.samples()
        with self.part("collate"):
            batch = self.collator(samples)
        with self.part("forward"), self.watched_tower():
            loss = self.model(batch).loss_per_sample.mean()
        with self.part("backward"):
            loss.backward()
        self.model.zero_grad()
        return loss.detach()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = clock("cpu")
        yield
        self.parts.setdefault(name, []).append(clock("cpu") - began)

    @contextmanager
    def watched_tower(self) -> Iterator[None]:
        tower = self.model.model.get_submodule(self.model.backbone.family.tower).encoder
        times: list[float] = []
        hooks = [
            tower.register_forward_pre_hook(lambda *_: times.append(-clock("cpu"))),
            tower.register_forward_hook(lambda *_: times.append(clock("cpu"))),
        ]
        yield
        self.parts.setdefault("of forward: tower", []).append(sum(times))
        for hook in hooks:
            hook.remove()


def compare(config: RunConfig, batch_size: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = build_model(config).eval()  # no modality is dropped: both see the same
    ways = {
        "plain": Way(config, model, batch_size, False),
        "known": Way(config, model, batch_size, True),
    }
    ways["known"].fill()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first one warms up
        losses = []
        for name, way in ways.items():
            began = clock("cpu")
            losses.append(way.step())
            if turn:
                seconds[name].append(clock("cpu") - began)
        assert torch.equal(*losses), losses
    store = ways["known"].store
    assert store is not None
    return {
        "faster": ratio(seconds, "plain", "known"),
        "bytes_per_picture": store.num_bytes / len(store),
        **{
            name: {part: 1e3 * median(s[1:]) for part, s in w.parts.items()}
            for name, w in ways.items()
        },
    }


def fewer_flops(tower: float, patches: int, language: float, tokens: int, passes: int) -> float:
    """FLOPs of a step over those with known features: 2 for each weight and token in a forward pass; the frozen
    weights get no gradient, so that a backward pass is one more, and checkpointing another (`passes`)."""
    rest = passes * 2 * language * (tokens + TEXT_TOKENS)
    return (2 * tower * patches + rest) / rest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"where": machine()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        demo = load_config(
            ROOT / "configs/demo.yaml", [f"data.feature_cache={folder / 'features'}"]
        )
        figures["demo"] = compare(demo, demo.train.batch_size, args.rounds)
        figures["heavy"] = compare(heavy_config(folder), BATCH, args.rounds)
    figures["fewer_flops"] = {
        name: [fewer_flops(*shape, passes=passes) for passes in (2, 3)]
        for name, shape in MODELS.items()
    }
    show(figures)
    write_results("features", figures)


def show(figures: dict[str, Any]) -> None:
    console = Console(soft_wrap=True)
    for name in ("demo", "heavy"):
        found = figures[name]
        kib = found["bytes_per_picture"] / 2**10
        title = f"{name}: a step is {found['faster']:.2f} x as fast; {kib:.0f} KiB a picture"
        table = Table("ms", *found["plain"], title=title)
        for way in ("plain", "known"):
            table.add_row(way, *(f"{value:.1f}" for value in found[way].values()))
        console.print(table)
    table = Table(
        "from shapes", "forward, backward", "and checkpointing", title="FLOPs without / with"
    )
    for name, ratios in figures["fewer_flops"].items():
        table.add_row(name, *(f"{value:.2f}" for value in ratios))
    console.print(table)


if __name__ == "__main__":
    main()
