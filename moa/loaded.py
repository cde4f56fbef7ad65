"""A model in Python: ask it, mix its experts by hand, merge them at these gates, add or train one more.

from moa import load

model = load("runs/demo")
found = model.ask("street.png", "what is written on the sign?", task="ocr_vqa")
found.text    # "exit"
found.gates   # {"vqa": 0.04, "ocr_vqa": 0.93, ...}
model.merge("mix", {"vqa": 0.3, "ocr_vqa": 0.7})  # one PEFT adapter
model = model.train(rows, "runs/more", expert="count")  # a new expert, from samples in memory
"""

import io
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from data.ocr import OcrCache, words_on
from data.pairs import fill, only_images
from data.sample import Sample, placed
from data.sources import open_ocr
from moa.build import build_model, only_adapters
from moa.clip_model import ClipMixture
from moa.config import RunConfig, load_config
from moa.evaluation.dual_encoder import gates_of, text_features
from moa.evaluation.models import check_weights, config_file, find_models, open_model, pick_device
from moa.evaluation.predict import (
    ImageLike,
    Prediction,
    check_finite,
    gates_by_name,
    prediction_of,
    prompt_collator,
    read_image,
    respond,
)
from moa.evaluation.processes import ALONE
from moa.evaluation.settings import check_gates
from moa.merging.adapters import adapter_folders, open_adapters
from moa.merging.run import merge_experts
from moa.merging.settings import MergeExperts
from moa.model import MixtureModel
from moa.training.further import further_config, store_rows
from moa.training.loop import train_here

GateRule = str | Mapping[str, float | int]  # router, off, ... or the gate of each expert by hand


@dataclass(frozen=True, kw_only=True)
class Classified:
    """The share of each name, and each expert's gate for the image; None for a base."""

    shares: dict[str, float]
    gates: dict[str, float] | None


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model with the config that its prompt comes from, and its OCR; `load` makes it. One thread at a time."""

    network: MixtureModel
    config: RunConfig
    ocr: OcrCache | None
    run: str | None = None  # step folder of the weights
    adapters: tuple[str, ...] = ()  # where they are no run's: folder of each expert
    like: str | None = None  # beside adapters: the run with the prompt and the base

    @property
    def experts(self) -> list[str]:
        """The names of the experts, in the order of their gates; empty for a base."""
        return self.network.bank.names

    def ask(
        self,
        image: ImageLike | Sequence[ImageLike],
        question: str,
        task: str | None = None,
        *,
        gates: GateRule = "router",
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Prediction:
        """The answer to a question about an image: a path, a PIL image, or an array [height, width, 3] of bytes.

        For bases that take several, `image` may be a list of them. Each has an `<image>` in the question, or all
        stand before it.
        Without a task neither prompt nor router gets one. `gates` is router, uniform, ensemble, off (the base), the
        name of an expert (it alone), without:NAME, with:RUN (docs/evaluation.md), or a mapping from experts to gates,
        where an expert that it lacks has gate 0. Lengths are by default those of the run's `eval`. `on_text` is called
        with the answer as far as it is generated; what it raises ends the answer.
        """
        lengths = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
        return self.ask_all([(image, question)], task, gates=gates, on_text=on_text, **lengths)[0]

    def ask_all(
        self,
        pairs: Sequence[tuple[ImageLike | Sequence[ImageLike], str]],
        task: str | None = None,
        *,
        gates: GateRule = "router",
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Prediction]:
        """Answers to (image, question) pairs of one task, in one batch; otherwise as `ask`; `on_text` is of the
        first."""
        network, config = self.network, self.config
        network.answering()  # refuses a CLIP
        self._check(task, gates)
        if not pairs:
            return []
        collator = prompt_collator(network, config, withhold_task=task is None)
        samples = [self._sample(image, question, task, str(i)) for i, (image, question) in enumerate(pairs)]
        for key, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{key}: must be a whole number of at least 1, got {value}")
        lengths = max_new_tokens or config.eval.max_new_tokens, num_beams or config.eval.num_beams
        responses, _ = respond(network, collator, collator(samples), gates, *lengths, on_text)
        return [prediction_of(network, collator, response) for response in responses]

    @torch.no_grad()
    def classify(
        self,
        image: ImageLike,
        names: Sequence[str],
        task: str | None = None,
        *,
        prompt: str = "{}",
        gates: GateRule = "router",
    ) -> Classified:
        """How well a CLIP finds each name, put into `prompt`, to fit an image; the shares sum to one.

        Those of a SigLIP are each a probability of its own. `gates` are those of `ask`, without ensemble.
        """
        network = self.network
        if not isinstance(network, ClipMixture):
            raise ValueError("classify: compares an image with names, which a CLIP does; this model answers: ask")
        self._check(task, gates)
        names = list(dict.fromkeys(filter(None, map(str.strip, names))))
        if not names:
            raise ValueError("names: there are none")
        collator = prompt_collator(network, self.config, withhold_task=task is None)
        like = replace(self._sample(image, prompt, task), answers=(names[0],))
        batch = only_images(collator([like]).to(network.backbone.model.logit_scale.device))
        decided = gates_of(network, batch, gates)
        features = network.image_features(batch, decided)
        check_finite(batch.samples, "features", features.isfinite())
        (texts,) = text_features(network, collator, [[fill(prompt, name) for name in names]], like, gates, ALONE)
        logits = network.backbone.logits(features, texts)[0]
        shares = logits.sigmoid() if network.backbone.is_sigmoid else logits.softmax(-1)
        own = dict(zip(self.experts, decided[0].mean(0).tolist(), strict=True))
        return Classified(shares=dict(zip(names, shares.tolist(), strict=True)), gates=own or None)

    def merge(self, out: str | Path, weights: Any = None, **settings: Any) -> dict[str, Any]:
        """Merge the experts into one PEFT adapter in the new folder `out`, verified in a fresh process; the report.

        `weights` are those of scripts.merge, and a mapping may leave out experts of weight 0; `settings` are its other
        settings: method="ties", rank=8, merged=True. The files that the model was loaded from are what is merged.
        """
        if not self.experts:
            raise ValueError("merge: a base has no experts to merge")
        if isinstance(weights, Mapping):
            weights = gates_by_name(self.experts, weights, "weights")
            if not any(weights.values()):
                raise ValueError("weights: all are 0, which is the base")
        if self.run is None and isinstance(weights, dict):
            weights = [*weights.values()]  # the only adapter's folder is not called as the expert is
        source = {"run": self.run, "adapters": [*self.adapters], "out": str(out), "weights": weights}
        return merge_experts(MergeExperts(**source, **settings), Console(file=io.StringIO()))

    def add(self, folder: str | Path) -> "LoadedModel":
        """This model with a PEFT adapter as one more expert, called as its folder; all are on alike.

        There is no router, which would not know it: mix by `gates` and `weights`, or let `train` make a router.
        """
        if self.run is None and not self.adapters:
            raise ValueError("add: a base has no run whose prompt it is asked with; load(run, adapters=[...])")
        own = [str(Path(self.run) / "experts" / name) for name in self.experts] if self.run else [*self.adapters]
        return load(self.run or str(self.like), adapters=[*own, str(folder)], device=str(self._device))

    def train(
        self,
        rows: Iterable[Mapping[str, Any]],
        out: str | Path,
        expert: str,
        *,
        task: str | None = None,
        steps: int = 100,
        settings: Mapping[str, Any] | None = None,
    ) -> "LoadedModel":
        """Train one expert further, or a new one, on samples in memory, in the new run folder `out`; its model.

        A row has `image` (as in `ask`), `question`, `answers` (a text or several) or `boxes`, and
        may have the other keys of format jsonl (docs/data.md); `task` is theirs where they name none, by default the
        expert's name. The other experts stay as they are. A router that learns has half of the steps after that, on
        these rows and some of the run's own samples. `settings` are of train.py: {"train.batch_size": 8}.
        """
        if self.run is None:
            raise ValueError("train: needs a run, whose prompt, data and router it continues")
        if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
            raise ValueError(f"out: {out} holds other things; name a new folder")
        try:
            stored = store_rows(rows, Path(out) / "rows", task or expert)
            train_here(further_config(Path(self.run), self.config, Path(out), stored, expert, steps, settings or {}))
        except (ValueError, TypeError):
            if not (Path(out) / "checkpoints").exists():
                shutil.rmtree(out, ignore_errors=True)  # nothing was trained: the corrected call can have the name
            raise
        return load(out, device=str(self._device))

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device

    def _check(self, task: str | None, gates: GateRule) -> None:
        known = task is None or task in self.config.data.tasks or self.config.router.unknown_task != "route"
        if not known:
            raise ValueError(f"task={task}: unknown; choices: {', '.join(self.config.data.tasks)}")
        if isinstance(gates, str):
            check_gates(gates, self.experts, self.network.routing.granularity)
            if gates == "oracle":
                raise ValueError("gates=oracle: a question alone names no expert; name one: gates=NAME")
        else:
            gates_by_name(self.experts, gates)

    def _sample(
        self, given: ImageLike | Sequence[ImageLike], question: str, task: str | None, name: str = "0"
    ) -> Sample:
        listed = isinstance(given, list | tuple)
        images = [read_image(image) for image in (given if listed else [given])]
        if not images:
            raise ValueError("image: the list is empty")
        about: dict[str, Any] = {"id": name, "image_id": name, "question": placed(question) if listed else question}
        about |= {"image": images[0], "more_images": tuple(images[1:]), "box_image": None if images[1:] else 0}
        about |= {"ocr": words_on(images, self.ocr) if self.ocr is not None else None}
        return Sample(**about, answers=(), task=task or "", source="predict")


def load(
    run: str | Path, *, like: str | Path | None = None, adapters: Sequence[str] = (), device: str = "auto"
) -> LoadedModel:
    """The model of a run or step folder, or of an adapter or checkpoint with the prompt of the run `like`.

    `adapters` are PEFT folders, which take the place of the run's experts, without a router.
    """
    device = pick_device(device)
    if adapters:
        if like is not None:
            raise ValueError("like: has no effect beside adapters, whose prompt and base are those of `run`")
        places = adapter_folders(adapters)
        folders = {expert.name: str(place) for expert, place in zip(open_adapters(places), places, strict=True)}
        config = load_config(config_file(str(run)), only_adapters(folders))
        network = build_model(config).to(device).eval()
        check_weights(network, config, "adapters")
        own: dict[str, Any] = {"adapters": tuple(folders.values()), "like": str(run)}
    else:
        (model,) = find_models([str(run)], None if like is None else str(like))
        network, config = open_model(model, device), model.config
        own = {"run": model.weights} if model.kind == "run" else {}
        own |= {"adapters": (model.weights,), "like": str(like)} if model.kind == "adapter" else {}
    return LoadedModel(network=network, config=config, ocr=open_ocr(config.data), **own)
