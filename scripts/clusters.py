"""Clusters of a run's training samples by their evidence, for a router with a row of logits for each.

    python -m scripts.clusters config=configs/demo.yaml evidence=[text] number=16 out=runs/clusters.safetensors
    accelerate launch train.py --config configs/demo.yaml router.score=cluster router.evidence=[text] \\
        router.clusters=runs/clusters.safetensors

k-means (k-means++ starts, the best of a few) over the base's embeddings of questions, the tower's of images, those of
OCR words, and the tasks: the mean of each kind, of length 1, side by side. A sample's cluster is the nearest one.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console

from moa.cli.command import command, progress_bar
from moa.cli.ranges import Count, FilePath, Seed, Size


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    config: FilePath = ""  # YAML file of a run: its base, its prompt and its training mixture
    out: FilePath = ""  # .safetensors file of the centres
    evidence: list[Literal["image", "text", "ocr", "task"]] = field(default_factory=lambda: ["text"])
    number: Size = 16  # of clusters
    num_samples: Count = 2000  # the first of the mixture
    batch_size: Size = 32
    tries: Size = 4  # the one with the least distance counts
    seed: Seed = 0


def cluster(settings: ClusterSettings, console: Console) -> None:
    if not settings.config or not settings.out:
        raise ValueError("config and out are needed; see --help")
    from safetensors.torch import save_file

    from data.sources import make_collator, open_mixture, open_ocr
    from moa.build import build_base
    from moa.config import load_config
    from moa.files.atomic import atomic_file
    from moa.routing.clusters import k_means
    from moa.routing.router import described

    config = load_config(settings.config)
    model = build_base(config).eval()
    mixture = open_mixture(config, open_ocr(config.data))
    collator = make_collator(config, model.backbone.intake)
    rows, number = [], min(settings.num_samples, mixture.epoch_length)
    with progress_bar("reading", number, console) as advance:
        for start in range(0, number, settings.batch_size):
            places = range(start, min(start + settings.batch_size, number))
            batch, rejected = collator.split([mixture[place] for place in places])
            if rejected and config.data.on_bad_sample == "error":
                raise rejected[0]
            if batch is not None:
                evidence = model.evidence(batch, kinds=settings.evidence)
                features, present = described(evidence, settings.evidence, len(config.data.tasks))
                rows.append(features[present])
            for _ in places:
                advance("")
    centres, sizes = k_means(rows, settings.number, settings.tries, settings.seed)
    Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(settings.out) as temporary:
        save_file({"centres": centres}, temporary, metadata={"evidence": " ".join(settings.evidence)})
    console.print(f"{settings.out}: {len(sizes)} clusters of {sum(sizes)} samples: {sizes}", soft_wrap=True)


main = command(ClusterSettings, cluster, __doc__)

if __name__ == "__main__":
    main()
