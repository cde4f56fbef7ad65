"""A run as a model of lmms-eval, so that users' own tasks can score it.

    pip install --editable . lmms-eval
    python -m lmms_eval --model moa --model_args run=runs/mine,task=vqa --tasks textvqa_val

`run` takes what `run` or `models` take in eval.py; `like`, `gates`, `batch_size` and `device` are those of
eval.py. `task` is the one of the run's tasks that all questions get; without it neither prompt nor router
gets one. Registered by the entry point `lmms_eval.models` of pyproject.toml; nothing else needs lmms-eval.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL.Image import Image
from rich.progress import track

from data.sample import MARK
from moa.loaded import load

KNOWN = {"max_new_tokens", "num_beams", "until", "do_sample", "temperature", "top_p"}


def manifest() -> ModelManifest:
    return ModelManifest(model_id="moa", simple_class_path=f"{__name__}.Moa")


@dataclass(frozen=True)
class Options:
    """Generation options of one request; ValueError for what is not greedy or beam search."""

    max_new_tokens: int
    num_beams: int
    until: tuple[str, ...]

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Options":
        unknown = sorted(given.keys() - KNOWN)
        if unknown:
            raise ValueError(f"generation_kwargs: unknown {unknown}; choices: {sorted(KNOWN)}")
        if given.get("do_sample") or given.get("temperature"):
            raise ValueError("generation_kwargs: answers are not sampled here; set temperature: 0")
        until = given.get("until", ())
        until = (until,) if isinstance(until, str) else tuple(until)
        return cls(int(given.get("max_new_tokens", 32)), int(given.get("num_beams") or 1), until)

    def cut(self, text: str) -> str:
        ends = [text.find(stop) for stop in self.until if stop and stop in text]
        return text[: min(ends, default=len(text))].strip()


class Moa(lmms):
    """A run, an adapter or a checkpoint; the arguments are described at the top of this file."""

    def __init__(
        self,
        run: str,
        like: str | None = None,
        gates: str = "router",
        task: str | None = None,
        batch_size: int | str = 1,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        self.model = load(run, like=like, device=device)
        self.gates, self.task, self.batch_size = gates, task, int(batch_size)
        self.model.ask_all([], task, gates=gates)  # refuses wrong arguments at once

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers in the order of the requests; neighbours with equal options share a batch."""
        answers: list[str] = []
        for options, group in groupby(requests, lambda request: Options.of(request.args[1])):
            same = list(group)
            for start in track(range(0, len(same), self.batch_size), "moa", transient=True):
                found = self.model.ask_all(
                    [self.pair(request) for request in same[start : start + self.batch_size]],
                    self.task,
                    gates=self.gates,
                    max_new_tokens=options.max_new_tokens,
                    num_beams=options.num_beams,
                )
                answers += [options.cut(prediction.text) for prediction in found]
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise ValueError("moa scores no likelihoods; choose tasks with output_type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise ValueError("moa answers one question at a time; choose output_type generate_until")

    def pair(self, request: Instance) -> tuple[Image | list[Image], str]:
        """The request's image or images and its question; ValueError for a video, and for none."""
        context, _, doc_to_visual, doc_id, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        if not visuals or not all(isinstance(visual, Image) for visual in visuals):
            kinds = [type(visual).__name__ for visual in visuals]
            raise ValueError(f"{task}, {doc_id}: moa reads questions about images, got {kinds}")
        image_token = self.model.network.backbone.processor.image_token
        if len(visuals) == 1:
            return visuals[0], context.replace(image_token, "").strip()
        return [*visuals], context.replace(image_token, MARK).strip()
