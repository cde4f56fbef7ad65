"""One answer: model, image, question -> text, box, gates. The evaluation and `moa.loaded` answer by this."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL.Image import Image, fromarray

from data.batch import Batch
from data.checks import name_of
from data.collate import ChatCollator
from data.images import open_image
from data.sample import Box, Sample
from data.sources import make_collator
from moa.benchmarks.scores import Response
from moa.config import RunConfig
from moa.evaluation.fusion import Fused
from moa.evaluation.settings import mixes_answers, partner_of
from moa.model import Gates, MixtureModel

ImageLike = Any  # a path, a PIL image, or an array [height, width, 3] of bytes


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The text, its first box and all boxes in pixels of the given image, and each expert's mean gate: None where
    tokens differ.

    Boxes in an answer about several images name none of them, and are left out.
    """

    text: str
    box: Box | None
    gates: dict[str, float] | None
    boxes: tuple[Box, ...] = ()


def read_image(image: ImageLike) -> Image:
    """The image as RGB; ValueError for a file that is missing or broken, and for another kind of array."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            found = f"{image.dtype} of shape {image.shape}"
            raise ValueError(f"image: an array must be uint8 [height, width, 3], got {found}")
        image = fromarray(image)
    if isinstance(image, str):
        image = Path(image)
    if not isinstance(image, Path | Image):
        found = type(image).__name__
        raise ValueError(f"image: must be a path, a PIL image or an array, got {found}")
    return open_image(image, "image")


def prediction_of(network: MixtureModel, collator: ChatCollator, response: Response) -> Prediction:
    box, gates = response.box, None
    boxes: tuple[Box, ...] = ()
    if collator.codec is not None and response.sample.images and response.sample.box_image is not None:
        geometry = collator.geometry(response.sample)
        box = collator.codec.decode(response.text, geometry)
        boxes = collator.codec.decode_all(response.text, geometry)
    if response.gates is not None:
        means = (sum(column) / len(response.gates) for column in zip(*response.gates, strict=True))
        gates = dict(zip(network.bank.names, means, strict=True))
    return Prediction(text=response.text, box=box, boxes=boxes, gates=gates)


def prompt_collator(model: MixtureModel, config: RunConfig, *, withhold_task: bool) -> Any:
    """The run's own prompts, for generation; held-out tasks are allowed."""
    options = {"for_generation": True, "allow_unknown_tasks": True, "withhold_task": withhold_task}
    return make_collator(config, model.backbone.intake, **options)


@torch.no_grad()
def respond(
    model: MixtureModel,
    collator: ChatCollator,
    batch: Batch,
    gates: str | Mapping[str, float | int],
    max_new_tokens: int,
    num_beams: int,
    on_text: Callable[[str], None] | None = None,
) -> tuple[list[Response], int]:
    """Generate an answer to every sample of a batch, and count its tokens; the gates hold for the whole answer.
    `on_text` gets the first sample's answer as it grows."""
    tokenizer = collator.processor.tokenizer
    members, other = ensemble_members(model) if gates == "ensemble" else [], partner_of(gates)
    copies = collator([s for s in batch.samples for _ in members]) if members else batch
    copies = copies.to(next(model.parameters()).device)
    logits = Watching(tokenizer, copies.input_ids.shape[1], on_text)
    watched: list[Any] = [logits, *([MeanProbabilities(len(members), len(batch))] if members else [])]
    if other is not None:
        if num_beams > 1:
            raise ValueError(f"num_beams: 1 with gates={gates}, got {num_beams}")
        watched.append(Fused(model.answering(), copies, *other, withhold_task=collator.withhold_task))
        gates = "router"
    ids, decided = model.answering().generate_routed(
        copies,
        **(gates_of_members(model, copies, members) if members else gate_rule(model, copies, gates)),
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=watched,
    )
    if logits.finite is not None:
        check_finite(batch.samples, "logits", logits.finite.view(len(batch), -1))
    if members:  # all copies have the same answer, and no mixture of gates gave it
        ids, decided = ids[:: len(members)], Gates()
    if decided.gates is not None:
        check_finite(batch.samples, "gates", decided.gates.isfinite())
    rows, responses = [None] * len(batch.samples), []
    if decided.gates is not None and decided.gates.shape[-1]:  # a base has no experts
        rows = decided.gates.float().cpu().tolist()
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    for sample, text, row in zip(batch.samples, texts, rows, strict=True):
        box = collator.box_codec.decode(text, collator.geometry(sample)) if sample.boxes else None
        responses.append(Response(sample=sample, text=text.strip(), box=box, gates=row))
    return responses, int((ids != tokenizer.pad_token_id).sum())


@dataclass
class Watching:
    """A logits processor that changes nothing: it hands on the first row's text behind its prompt, where asked for, and
    records which rows had a finite largest logit.

    The largest is NaN or infinity where any is; processors before it may forbid tokens by -infinity.
    """

    tokenizer: Any
    prompt: int  # tokens
    on_text: Callable[[str], None] | None
    finite: torch.Tensor | None = None  # [rows]; on the device: nothing waits for it

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        finite = scores.amax(-1).isfinite()
        self.finite = finite if self.finite is None else self.finite & finite
        if self.on_text is not None:
            self.on_text(self.tokenizer.decode(input_ids[0, self.prompt :], skip_special_tokens=True).strip())
        return scores


class MeanProbabilities:
    """A logits processor: each row gets the log of the mean of its sample's `members` probabilities.

    Rows are by sample, member and beam. So all members decode the same tokens, each with a cache of its own.
    """

    def __init__(self, members: int, samples: int) -> None:
        self.members, self.samples = members, samples

    def __call__(
        self, input_ids: Int[torch.Tensor, "rows _"], scores: Float[torch.Tensor, "rows vocab"]
    ) -> Float[torch.Tensor, "rows vocab"]:
        each = scores.float().log_softmax(-1).view(self.samples, self.members, -1, scores.shape[-1])
        mean = each.logsumexp(1, keepdim=True) - math.log(self.members)
        return mean.expand_as(each).reshape(scores.shape).to(scores.dtype)


def check_finite(samples: Sequence[Sample], what: str, finite: torch.Tensor) -> None:
    """ValueError naming the first sample with a False among its entries [sample, ...]."""
    whole = finite.flatten(1).all(1).tolist()
    if bad := [sample for sample, good in zip(samples, whole, strict=True) if not good]:
        raise ValueError(
            f"{name_of(bad[0])}: the model's {what} are not finite (NaN or infinity), so it has no answer; "
            "check its weights, its scaling and model.dtype"
        )


def choose_gates(model: MixtureModel, batch: Batch, rule: str | Mapping[str, float | int]) -> Gates:
    """The gates of a batch by the rule of `eval.gates`, or by hand."""
    found = gate_rule(model, batch, rule)
    return model.compute_gates(batch, override=found.get("gates"), available=found.get("available"))


def ensemble_members(model: MixtureModel) -> list[str]:
    """The experts that answer alone, beside shared ones, and are averaged; ValueError where there is none."""
    if found := model.routing.roles.named("routed"):
        return found
    raise ValueError("gates=ensemble: no expert is routed (experts.NAME.gate), so that none answers alone")


def gates_of_members(model: MixtureModel, batch: Batch, members: Sequence[str]) -> dict[str, torch.Tensor]:
    """The `gates` of a batch that has each sample once for every member: member after member alone."""
    each = [gate_rule(model, batch, name)["gates"] for name in members]
    turn = torch.arange(len(batch), device=batch.input_ids.device)
    return {"gates": torch.stack(each)[turn % len(members), turn]}


def gates_by_name(names: Sequence[str], gates: Mapping[str, float | int], key: str = "gates") -> dict[str, float]:
    """The gate of every expert, 0 where none is given; ValueError for an unknown expert and an odd number."""
    for name, gate in gates.items():
        if name not in names:
            raise ValueError(f"{key}.{name}: no such expert; choices: {', '.join(names)}")
        if isinstance(gate, bool) or not isinstance(gate, int | float) or not math.isfinite(gate):
            raise ValueError(f"{key}.{name}: must be a finite number, got {gate!r}")
    return {name: float(gates.get(name, 0.0)) for name in names}


def gate_rule(model: MixtureModel, batch: Batch, rule: str | Mapping[str, float | int]) -> dict[str, torch.Tensor]:
    """The `gates` to use, or the experts `available` to the router, as a model takes them; or neither. A mapping has
    the gates themselves, the same for every sample."""
    names, device = model.bank.names, batch.input_ids.device
    if not isinstance(rule, str):
        row = torch.tensor([*gates_by_name(names, rule).values()], device=device)
        return {"gates": row.expand(len(batch), -1)}
    if mixes_answers(rule):
        raise ValueError(f"gates={rule}: averages the probabilities of generated tokens, which no gates do")
    if rule == "router":
        return {}
    if rule.startswith("without:"):
        left = torch.tensor([name != rule.removeprefix("without:") for name in names])
        return {"available": left.to(device)}
    if rule == "off":
        return {"gates": torch.zeros(len(batch), len(names), device=device)}
    if rule in names and rule not in model.routing.roles.experts:  # such as a merge on trial: it is on alone
        return {"gates": torch.tensor([float(name == rule) for name in names], device=device).expand(len(batch), -1)}
    # a sample of expert NAME, or of an unknown one, which is uniform; shared experts have their own gates
    known = {"oracle": batch.expert_ids, "uniform": torch.full((len(batch),), -1, device=device)}
    ids = known[rule] if rule in known else torch.full((len(batch),), names.index(rule), device=device)
    return {"gates": model.routing.oracle(ids)}
