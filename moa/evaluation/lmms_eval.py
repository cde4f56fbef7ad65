"""A run as a model of lmms-eval, so that users' own tasks can score it.

    pip install --editable . lmms-eval
    python -m lmms_eval --model moa --model_args checkpoint=runs/mine,task=vqa --tasks textvqa_val

`checkpoint`, `like`, `gates`, `batch_size`, `device` mean what they mean for eval.py. `task` is the one of the
run's tasks that the harness asks; without it neither prompt nor router is told one. Registered by
the entry point `lmms_eval.models` of pyproject.toml; nothing else here needs lmms-eval.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL.Image import Image
from rich.progress import track

from data.collate import Collator
from data.images import to_rgb
from data.ocr import OcrCache
from data.sample import Sample
from data.sources import open_ocr
from moa.evaluation.models import open_subject, subject_of
from moa.evaluation.run import answer, check_gates
from moa.evaluation.sources import prompt_collator

KNOWN = {"max_new_tokens", "num_beams", "until", "do_sample", "temperature", "top_p"}


def manifest() -> ModelManifest:
    """What the entry point hands to lmms-eval."""
    return ModelManifest(model_id="moa", simple_class_path=f"{__name__}.Moa")


@dataclass(frozen=True, kw_only=True)
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
        return cls(
            max_new_tokens=int(given.get("max_new_tokens", 32)),
            num_beams=int(given.get("num_beams") or 1),
            until=(until,) if isinstance(until, str) else tuple(until),
        )

    def cut(self, text: str) -> str:
        """The text up to the first stop word."""
        ends = [text.find(stop) for stop in self.until if stop and stop in text]
        return text[: min(ends, default=len(text))].strip()


class Moa(lmms):
    """A run, an adapter or a checkpoint; see the top of this file for the arguments."""

    def __init__(
        self,
        checkpoint: str,
        like: str | None = None,
        gates: str = "router",
        task: str | None = None,
        batch_size: int | str = 1,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        self.model, config, _ = open_subject(subject_of(checkpoint), like, device)
        check_gates(gates, self.model.bank.names, self.model.routing.granularity)
        if gates == "oracle":
            raise ValueError(
                "gates=oracle: questions of lmms-eval name no expert; name one: gates=NAME"
            )
        if task is not None and task not in config.data.tasks:
            raise ValueError(f"task={task}: unknown; choices: {', '.join(config.data.tasks)}")
        self.gates, self.task, self.device = gates, task or "", torch.device(device)
        self.batch_size = int(batch_size)
        self.collator: Collator = prompt_collator(self.model, config, withhold_task=task is None)
        self.ocr: OcrCache | None = open_ocr(config.data)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers in the order of the requests; neighbours with equal options share a batch."""
        answers: list[str] = []
        for options, group in groupby(requests, lambda request: Options.of(request.args[1])):
            same = list(group)
            starts = range(0, len(same), self.batch_size)
            for start in track(starts, description="moa", transient=True):
                answers += self._answers(same[start : start + self.batch_size], options)
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise ValueError("moa scores no likelihoods; choose tasks with output_type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise ValueError("moa answers one question at a time; choose output_type generate_until")

    def _answers(self, requests: Sequence[Instance], options: Options) -> Iterator[str]:
        batch = self.collator([self.sample(request) for request in requests]).to(self.device)
        with torch.no_grad():
            ids, _ = answer(
                self.model,
                batch,
                self.gates,
                self.collator,
                options.max_new_tokens,
                options.num_beams,
            )
        texts = self.collator.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return map(options.cut, texts)

    def sample(self, request: Instance) -> Sample:
        """The request's one picture and its text; ValueError for several pictures, a video, none."""
        context, _, doc_to_visual, doc_id, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        if len(visuals) != 1 or not isinstance(visuals[0], Image):
            kinds = [type(visual).__name__ for visual in visuals]
            raise ValueError(f"{task}, {doc_id}: moa reads one picture a question, got {kinds}")
        image = to_rgb(visuals[0])
        return Sample(
            id=f"{task}/{split}/{doc_id}",
            image_id=f"{task}/{split}/{doc_id}",
            image=image,
            question=context.replace(self.collator.processor.image_token, "").strip(),
            answers=(),
            task=self.task,
            source=task,
            ocr=self.ocr(image) if self.ocr is not None else None,
        )
