"""Bring one CLIP into the frame of another that was trained apart from it, so that their average means something.

    python -m scripts.align model=B to=A out=B_ALIGNED
    python -m scripts.align model=B to=A out=B_ALIGNED method=activations data=captions.jsonl
    python -m scripts.merge method=linear models=[A,B_ALIGNED] base=A out=M
    python -m scripts.repair model=M endpoints=[A,B_ALIGNED] data=captions.jsonl out=M_REPAIRED

A and B are local CLIPModel checkpoints of one architecture. OUT is B with its units in another order (and heads and
joint space rotated): the same similarities, checked on a probe after reloading; `export_report.json` has the numbers.
`data` is a jsonl file of images and captions (data/readers/own.py), of which the first answer is read:
{"image": "1.jpg", "question": "what is this?", "answers": ["a cat"], "task": "caption"}.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from moa.cli.command import command
from moa.cli.ranges import Count, FilePath, Seed

BATCH = 32


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    model: FilePath | None = None  # checkpoint folder to align
    to: FilePath | None = None  # checkpoint folder whose frame it gets
    out: FilePath | None = None  # folder to write
    method: Literal["weight_matching", "ot", "activations"] = "weight_matching"
    rotate: bool = True  # heads and joint space may rotate; false: permutations alone (ot: always)
    seed: Seed = 0  # of the order in which weight_matching visits the layers
    data: FilePath | None = None  # activations: jsonl file of images and captions
    num_samples: Count = 512  # at most so many of it

    def __post_init__(self) -> None:
        if (self.data is None) == (self.method == "activations"):
            raise ValueError("data: goes with method=activations, and that needs it")


def run_align(settings: AlignConfig, console: Console) -> None:
    from moa.files.atomic import atomic_folder, write_json
    from moa.merging.align.alignment import align, check_pair
    from moa.merging.align.clip import check_same, cosine, match, similarities, spec_of
    from moa.merging.export.folder import REPORT_FILE, check_out

    if settings.model is None or settings.to is None or settings.out is None:
        raise ValueError("model, to, out: each names a folder")
    check_out(settings.out)
    a, b = load_clip(settings.to), load_clip(settings.model)
    spec = spec_of(a, settings.rotate and settings.method != "ot")
    check_pair(a.state_dict(), b.state_dict(), spec)
    batches = []
    if settings.data is not None:
        batches = caption_batches(settings.data, settings.to, settings.num_samples)
    with console.status("matching units") as status:

        def show(sweep: int, changed: int) -> None:
            status.update(f"sweep {sweep + 1}: {changed} of {len(spec)} maps changed")

        options: dict[str, Any] = {"seed": settings.seed, "batches": batches, "on_sweep": show}
        maps = match(settings.method, a, b, spec, **options)
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
    from transformers import CLIPModel

    from moa.backbones.loading import load_weights, read_any_config
    from moa.files.checkpoint_files import local_base
    from moa.merging.align.clip import TOLERANCE

    path = str(local_base(str(folder)))
    kind = read_any_config(path).model_type
    if kind != "clip":
        raise ValueError(f"{folder}: is a {kind!r}; only a 'clip' can be aligned (moa/merging/align/clip.py)")
    model = load_weights(CLIPModel, path, dtype="auto").eval()
    if model.dtype not in TOLERANCE:
        raise ValueError(f"{folder}: is stored in {model.dtype}; choices: {list(TOLERANCE)}")
    return model


def write_clip(out: Path, model: Any, like: str) -> None:
    from moa.files.checkpoint_files import local_base
    from moa.merging.export.folder import copy_other_files

    copy_other_files(local_base(like), out, None)
    model.save_pretrained(out)


def caption_batches(file: str, processor_of: str, num_samples: int) -> list[dict[str, Any]]:
    """Images with their first captions, through the processor of a checkpoint."""
    from transformers import AutoConfig, AutoProcessor

    from data.config import SourceConfig
    from data.readers.table import open_records
    from moa.files.checkpoint_files import local_base

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
        images = [sample.image for sample in samples]
        batches.append(dict(processor(text=texts, images=images, **settings)))
    return batches


main = command(AlignConfig, run_align, __doc__)

if __name__ == "__main__":
    main()
