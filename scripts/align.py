"""Bring one CLIP into the frame of another that was trained apart from it, so that their average means something.

    python -m scripts.align model=B to=A out=B_ALIGNED
    python -m scripts.align model=B to=A out=B_ALIGNED method=activations data=captions.jsonl
    python -m scripts.merge method=linear models=[A,B_ALIGNED] base=A out=M
    python -m scripts.repair model=M endpoints=[A,B_ALIGNED] data=captions.jsonl out=M_REPAIRED

A and B are local CLIPModel checkpoints of one architecture. OUT is B with its units in another order (and heads and
joint space rotated): the same similarities, checked on a probe after reloading; `export_report.json` has the numbers.
`data` is a jsonl file of pictures and captions (data/readers/own.py), of which the first answer is read:
{"image": "1.jpg", "question": "what is this?", "answers": ["a cat"], "task": "caption"}.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, CLIPModel

from data.readers.table import open_records
from moa.backbones.loading import load_weights, read_any_config
from moa.cli.command import run_command
from moa.cli.ranges import Count, FilePath, Seed
from moa.config import SourceConfig
from moa.files.atomic import atomic_folder, write_json
from moa.merging.align.activations import activation_matching
from moa.merging.align.alignment import Maps, Spec, align, check_pair, weight_matching
from moa.merging.align.symmetries import clip_spec
from moa.merging.align.transport import transport
from moa.merging.export.export import REPORT_FILE, check_out, copy_other_files
from moa.merging.inputs import local_base

SUPPORTED = {"clip": CLIPModel}  # model_type of a config -> class
# Largest difference of a similarity, as a share of the largest: what rounding to a dtype does to rotated weights.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
BATCH = 32


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    model: FilePath | None = None  # checkpoint folder to align
    to: FilePath | None = None  # checkpoint folder whose frame it gets
    out: FilePath | None = None  # folder to write
    method: Literal["weight_matching", "ot", "activations"] = "weight_matching"
    rotate: bool = True  # heads and joint space may rotate; false: permutations alone (ot: always)
    seed: Seed = 0  # of the order in which weight_matching visits the layers
    data: FilePath | None = None  # activations: jsonl file of pictures and captions
    num_samples: Count = 512  # at most so many of it


def main(argv: Sequence[str] | None = None) -> None:
    run_command(AlignConfig, run_align, __doc__, argv)


def run_align(settings: AlignConfig, console: Console) -> None:
    if settings.model is None or settings.to is None or settings.out is None:
        raise ValueError("model, to, out: each names a folder")
    check_out(settings.out)
    a, b = load_clip(settings.to), load_clip(settings.model)
    spec = spec_of(a, settings.rotate and settings.method != "ot")
    check_pair(a.state_dict(), b.state_dict(), spec)
    maps = find_maps(settings, a, b, spec, console)
    aligned = align(b.state_dict(), spec, maps)
    report = {
        "kind": "checkpoint", "method": settings.method, "model": settings.model, "to": settings.to,
        "rotate": settings.rotate, "seed": settings.seed, "symmetries": len(spec),
        "cosine_before": cosine(a.state_dict(), b.state_dict()),
        "cosine_after": cosine(a.state_dict(), aligned),
    }  # fmt: skip
    before = similarities(b)
    b.load_state_dict(aligned)
    with atomic_folder(settings.out) as temporary:
        write_clip(temporary, b, settings.model)
        report |= check_same(before, similarities(load_clip(temporary)), b.dtype)
        write_json(temporary / REPORT_FILE, report)
    console.print(
        f"weights' cosine with {settings.to}: {report['cosine_before']:.3f} -> {report['cosine_after']:.3f}\n"
        f"similarities on a probe: largest difference {report['difference']:.1e} of {report['largest']:.3g}\n"
        f"checkpoint: {settings.out}",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


def load_clip(folder: str | Path) -> Any:
    """The model of a local folder, in its own dtype; ValueError for another architecture."""
    path = local_base(str(folder))
    kind = read_any_config(str(path)).model_type
    if kind not in SUPPORTED:
        raise ValueError(
            f"{folder}: is a {kind!r}; the symmetries of {list(SUPPORTED)} are known (moa/merging/align/symmetries.py)"
        )
    model = load_weights(SUPPORTED[kind], str(path), dtype="auto").eval()
    if model.dtype not in TOLERANCE:
        raise ValueError(f"{folder}: is stored in {model.dtype}; choices: {list(TOLERANCE)}")
    return model


def spec_of(model: Any, rotate: bool) -> Spec:
    config = model.config
    return clip_spec(
        {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()},
        text_heads=config.text_config.num_attention_heads,
        vision_heads=config.vision_config.num_attention_heads,
        rotate=rotate,
    )


def find_maps(settings: AlignConfig, a: Any, b: Any, spec: Spec, console: Console) -> Maps:
    if (settings.data is None) == (settings.method == "activations"):
        raise ValueError("data: goes with method=activations, and that needs it")
    with console.status("matching units") as status:
        if settings.data is not None:
            batches = caption_batches(settings.data, str(settings.to), settings.num_samples)
            own = b.dtype
            maps = activation_matching(a.float(), b.float(), spec, batches, run=run_clip)
            b.to(own)
            return maps
        # From B as it is, heads soon agree with its order of the residual stream, and hold it there.
        plans = transport(a.state_dict(), b.state_dict(), spec_of(a, False))
        if settings.method == "ot":
            return plans
        return weight_matching(
            a.state_dict(),
            b.state_dict(),
            spec,
            seed=settings.seed,
            start=plans,
            on_sweep=lambda sweep, changed: status.update(
                f"sweep {sweep + 1}: {changed} of {len(spec)} maps changed"
            ),
        )


def run_clip(model: Any, batch: Mapping[str, Tensor]) -> object:
    return model(**batch)


def caption_batches(file: str, processor_of: str, num_samples: int) -> list[dict[str, Tensor]]:
    """Pictures with their first captions, through the processor of a checkpoint."""
    source = SourceConfig(name="captions", format="jsonl", path=file, num_samples=num_samples)
    rows = open_records(source, None)
    folder = local_base(processor_of)
    processor = AutoProcessor.from_pretrained(folder)
    longest = AutoConfig.from_pretrained(folder).text_config.max_position_embeddings
    settings = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": longest}
    batches = []
    for start in range(0, len(rows), BATCH):
        samples = [rows[index] for index in range(start, min(start + BATCH, len(rows)))]
        for sample in samples:
            if not sample.answers:
                raise ValueError(f"data: {sample.id} has no caption in `answers`")
        texts = [sample.answers[0] for sample in samples]
        pictures = [sample.image for sample in samples]
        batches.append(dict(processor(text=texts, images=pictures, **settings)))
    return batches


@torch.no_grad()
def similarities(model: Any, count: int = 4) -> Tensor:
    """Picture-text similarities of noise and random words, the same for every model of one architecture."""
    generator = torch.Generator().manual_seed(0)
    text, vision = model.config.text_config, model.config.vision_config
    length = min(16, text.max_position_embeddings)
    words = torch.randint(text.vocab_size, (count, length), generator=generator)
    words[:, -1] = text.eos_token_id
    size = (count, vision.num_channels, vision.image_size, vision.image_size)
    pictures = torch.randn(size, generator=generator)
    own = model.dtype
    found = model.float()(input_ids=words, pixel_values=pictures).logits_per_image
    model.to(own)
    return found


def check_same(before: Tensor, after: Tensor, dtype: torch.dtype) -> dict[str, float]:
    difference, largest = float((after - before).abs().max()), float(before.abs().max())
    if difference > TOLERANCE[dtype] * largest:
        raise ValueError(
            f"out: the aligned model differs by {difference:.3g} of {largest:.3g} on the probe; not written"
        )
    return {"difference": difference, "largest": largest}


def write_clip(out: Path, model: Any, like: str) -> None:
    """A checkpoint with the processor and other files of the folder `like`."""
    copy_other_files(local_base(like), out, None)
    model.save_pretrained(out)


def cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Of all weights as one vector."""

    def product(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> float:
        return sum(float((x[key].double() * y[key].double()).sum()) for key in x)

    return product(a, b) / (product(a, a) * product(b, b)) ** 0.5


if __name__ == "__main__":
    main()
