"""The pictures' features kept on the disk: for which models that is exact, and what a folder belongs to.

A tower without experts, training or randomness gives the same states of a picture every time. They are kept
where they enter selection and projection, so that a projector may have experts and the router sees its tokens
in the one path (backbones/llava.py).
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from data.batch import Batch
from data.collate import stack_pictures
from data.features import FeatureStore, without_pictures
from moa.backbones.clip import ClipBackbone
from moa.backbones.llava import Backbone, answering
from moa.backbones.tower import tower_output, tower_states
from moa.build import DTYPES
from moa.config import Precision, RunConfig
from moa.model import MixtureModel

KEY = "data.feature_cache"


def open_features(
    config: RunConfig, model: MixtureModel, precision: Precision | None = None
) -> FeatureStore | None:
    """The run's store, or None where it wants none; ValueError where it would not be exact.

    `precision` of the computation is that of training; evaluation computes in the weights' own.
    """
    if config.data.feature_cache is None:
        return None
    check_model(model)
    backbone: Backbone = model.backbone
    dtype = config.data.feature_dtype
    about = identity(backbone, precision or config.train.precision, dtype)
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    folder = Path(config.data.feature_cache) / digest[:16]
    store = FeatureStore(folder, dtype=DTYPES[dtype] if dtype else None)
    (folder / "about.json").write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")
    return store


def describe(store: FeatureStore) -> str:
    size = f"{store.num_bytes / 2**20:.1f} MiB"
    each = f", {store.num_bytes / len(store) / 2**10:.0f} KiB each" if len(store) else ""
    torn = f"; put aside as torn: {', '.join(map(str, store.torn))}" if store.torn else ""
    return (
        f"pictures whose features are known: {len(store):,} ({size}{each}) in {store.folder}{torn}"
    )


@contextmanager
def keeping(store: FeatureStore | None, model: MixtureModel, batch: Batch) -> Iterator[None]:
    """Inside, what the tower makes of the batch's unknown pictures goes to the store."""
    if store is None or not batch.unknown_pictures:
        yield
        return
    with watching(model.backbone) as seen:
        yield
    store.add(batch.unknown_pictures, seen[0])


@torch.no_grad()
def keep(store: FeatureStore, model: MixtureModel, batch: Batch, precision: Precision) -> None:
    """Run the tower alone on a batch, as training with this precision does."""
    dtype, device = DTYPES[precision], model.model.device.type
    autocast = torch.autocast(device, dtype, precision != "fp32")
    with keeping(store, model, batch), model.bank.context.disabled(), autocast:
        model.backbone.features(batch)


@contextmanager
def watching(backbone: Backbone) -> Iterator[list[torch.Tensor]]:
    """The states of each pass of the tower inside."""
    layers, seen = backbone.family.feature_layers(backbone.model.config), []
    tower = backbone.model.get_submodule(backbone.family.tower)
    hook = tower.register_forward_hook(lambda *call: seen.append(tower_states(call[-1], layers)))
    try:
        yield seen
    finally:
        hook.remove()


def check_model(model: MixtureModel) -> None:
    """ValueError unless the tower gives the same states every time, which give the same features."""
    if isinstance(model.backbone, ClipBackbone):
        raise ValueError(f"{KEY}: a CLIP has no language model behind its tower; choices: null")
    backbone: Backbone = model.backbone
    kind, path = backbone.model.config.model_type, backbone.family.tower
    tower = backbone.model.get_submodule(path)
    sites = [site for site in model.bank.sites if site.startswith(f"{path}.")]
    if sites:
        raise ValueError(
            f"{KEY}: experts at {sites[0]} change what the tower says of a picture; choices: "
            "model.targets outside the tower, data.feature_cache=null"
        )
    trained = [name for name, p in tower.named_parameters() if p.requires_grad]
    if trained:
        raise ValueError(f"{KEY}: {path}.{trained[0]} is trained; choices: null")
    if drops_out(tower, backbone.model.config.vision_config):
        raise ValueError(f"{KEY}: the tower has dropout, and each pass differs; choices: null")
    if backbone.family.rows != "pictures":
        raise ValueError(
            f"{KEY}: {kind} sees a picture as a varying number of {backbone.family.rows}; choices: a "
            "base whose pictures all become one square, data.feature_cache=null"
        )
    without_pictures(backbone.processor)
    with model.bank.context.disabled():  # a projector may have experts; they have no gates yet
        check_features(backbone)


def drops_out(tower: nn.Module, config: Any) -> bool:
    layers = (m for m in tower.modules() if isinstance(m, nn.Dropout))
    return any(layer.p > 0 for layer in layers) or getattr(config, "attention_dropout", 0.0) > 0


@torch.no_grad()
def check_features(backbone: Backbone) -> None:
    """ValueError unless features from the kept states equal the model's own, bit for bit."""
    model, family = backbone.model, backbone.family
    made = backbone.processor.image_processor([Image.new("RGB", (64, 48), "orange")])
    pixels = stack_pictures(made["pixel_values"]).to(model.device, backbone.dtype)
    with watching(backbone) as seen:
        own = features_of(model, pixels)
    kept = tower_output(seen[0], family.feature_layers(model.config))
    with answering(model.get_submodule(family.tower), "forward", lambda *_, **__: kept):
        again = features_of(model, pixels)
    if not torch.equal(own, again):
        raise ValueError(f"{KEY}: {model.config.model_type} reads more of its tower than is kept")


def features_of(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    features = model.model.get_image_features(pixels, return_dict=True).pooler_output
    return features if isinstance(features, torch.Tensor) else torch.cat(list(features))


def identity(backbone: Backbone, precision: str, stored: str | None) -> dict[str, Any]:
    """All that a picture's features depend on, but the picture."""
    tower = backbone.model.get_submodule(backbone.family.tower)
    processor = json.loads(backbone.processor.image_processor.to_json_string())
    return {
        "tower": sha256_of(tower),
        "layers": backbone.family.feature_layers(backbone.model.config),
        "processor": processor,
        "weights": str(backbone.dtype).removeprefix("torch."),
        "computed": precision,
        "stored": stored or "as computed",
    }


def sha256_of(module: nn.Module) -> str:
    """Of all weights and buffers, with their names and types."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()
