"""Score a model on a data set: batched generation, gates fixed at prefill, each task by its benchmark.

    data set -> instruction -> collator (left padding) -> gates -> generate -> Prediction -> Result

Several processes share the batches: the same batches as of one process, and so the same answers.

A sample that cannot be read, or has nothing to be scored against, stops the evaluation or is counted
by rule, as `on_bad_sample` says. An answer that cannot count scores 0 and is counted as a failure.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from data.batch import Batch
from data.checks import BadSampleError, name_of
from data.collate import Collator
from data.mixture import read_sample
from data.sample import Sample
from moa.benchmarks.catalogue import BENCHMARKS, benchmark_called
from moa.benchmarks.scores import Prediction, Scores, unscored
from moa.evaluation.fingerprints import data_digest, sample_digest
from moa.evaluation.processes import ALONE, Processes
from moa.evaluation.result import Result
from moa.model import Gates, MixtureModel
from moa.routing.gating import one_hot_gates

GATES = ("router", "oracle", "uniform", "off")


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What became of the samples of one batch."""

    predictions: list[Prediction] = field(default_factory=list)
    rejected: list[BadSampleError] = field(default_factory=list)
    read: list[str] = field(default_factory=list)  # digest of each sample
    seconds: float = 0.0  # of generating
    num_tokens: int = 0


@torch.no_grad()
def evaluate(
    model: MixtureModel,
    dataset: Any,
    collator: Collator,
    *,
    name: str,
    benchmark: str | None = None,
    scored: bool = True,
    gates: str = "router",
    batch_size: int = 32,
    max_new_tokens: int = 32,
    num_beams: int = 1,
    on_bad_sample: str = "error",
    num_pictures: int = 64,
    progress: bool = True,
    processes: Processes = ALONE,
) -> Result:
    """Generate an answer to every sample of a map-style data set and score it.

    `collator` is one made with `for_generation`. `benchmark` scores every sample; None: each by the
    benchmark of its task. Without `scored` the answers need no references. Only the first
    `num_pictures` predictions of a task keep their picture: all of a benchmark fill no memory.

    `gates` says who decides: the model's own `router` (or whatever its kind is), the `oracle` (each
    sample's expert; uniform for a sample without one, which `score_sources` refuses), a `uniform`
    mixture, `off` (the base), the name of one expert, or `without:NAME`.

    Of several `processes` all must call it; the main one has the result, the others one without tasks.
    """
    check_gates(gates, model.bank.names, model.routing.granularity)
    device = next(model.parameters()).device
    thinned = thinner(num_pictures, benchmark)  # no more pictures than this process might need

    def ask(rows: range) -> Answers:
        samples = [read_sample(dataset, index, name) for index in rows]
        read = [*map(sample_digest, samples)]
        items = [
            prepared(sample, model.routes, benchmark, scored, collator.tasks) for sample in samples
        ]
        batch, rejected = collator.split(items)
        if rejected and on_bad_sample == "error":
            raise rejected[0]
        if batch is None:
            return Answers(rejected=rejected, read=read)
        begin = time.perf_counter()
        ids, decided = answer(model, batch.to(device), gates, collator, max_new_tokens, num_beams)
        seconds = time.perf_counter() - begin
        return Answers(
            predictions=[*map(thinned, predictions_of(batch.samples, ids, decided, collator))],
            rejected=rejected,
            read=read,
            seconds=seconds,
            num_tokens=int((ids != collator.processor.tokenizer.pad_token_id).sum()),
        )

    rows = rows_of_batches(len(dataset), batch_size)
    answers = processes.map(ask, rows, bar=name if progress else None)
    if not processes.is_main:
        return Result(name=name, tasks={})
    skipped = [error for part in answers for error in part.rejected]
    predictions = [prediction for part in answers for prediction in part.predictions]
    if not predictions:
        raise ValueError(f"{name}: none of {len(dataset)} samples can be scored; {skipped[0]}")
    tasks = by_task([*map(thinner(num_pictures, benchmark), predictions)], benchmark)
    return Result(
        name=name,
        tasks={task: (found, scores_of(task, found, scored)) for task, found in tasks.items()},
        skipped=skipped,
        seconds=max(map(sum, processes.dealt([part.seconds for part in answers]))),
        num_tokens=sum(part.num_tokens for part in answers),
        num_processes=processes.size,
        data=data_digest(read for part in answers for read in part.read),
        settings={
            "benchmark": benchmark,
            "scored": scored,
            "gates": gates,
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
            "num_beams": num_beams,
            "on_bad_sample": on_bad_sample,
            "prompt": prompt_settings(collator)
            | {"example": collator.prompt(predictions[0].sample)},
        },
    )


def prepared(
    item: Sample | BadSampleError,
    experts: Sequence[str],
    benchmark: str | None,
    scored: bool,
    tasks: Collection[str] | None = None,
) -> Sample | BadSampleError:
    """The sample as its benchmark asks it, or why it cannot be scored.

    An expert that this model does not have is as good as none: the data may be another model's.
    `tasks` are those that have a benchmark without being named after one; None: all.
    """
    if isinstance(item, BadSampleError):
        return item
    name = benchmark or item.task
    if name not in BENCHMARKS and tasks is not None and name not in tasks:
        detail = (
            f"{name!r} is neither one of the run's tasks nor a benchmark; name one by "
            f"sources.{item.source}.benchmark; choices: {', '.join(BENCHMARKS)}"
        )
        return BadSampleError(name_of(item), "unknown task", detail)
    chosen = benchmark_called(name)
    lacks = chosen.needs(item) if scored else None
    if lacks is not None:
        return BadSampleError(name_of(item), "empty answer", f"{name} needs {lacks}")
    return replace(
        item,
        expert=item.expert if item.expert in experts else None,
        instruction=item.instruction or chosen.instruction,
    )


def rows_of_batches(num_rows: int, batch_size: int) -> list[range]:
    return [
        range(start, min(start + batch_size, num_rows)) for start in range(0, num_rows, batch_size)
    ]


def first_pictures(count: int, benchmark: str | None = None) -> Callable[[Sample], Sample]:
    """Takes the picture off every sample but the first `count` of a task that it is called with."""
    seen: Counter[str] = Counter()

    def thinned(sample: Sample) -> Sample:
        task = benchmark or sample.task
        seen[task] += 1
        return sample if seen[task] <= count else without_picture(sample)

    return thinned


def thinner(num_pictures: int, benchmark: str | None) -> Callable[[Prediction], Prediction]:
    """`first_pictures` for predictions."""
    thinned = first_pictures(num_pictures, benchmark)
    return lambda prediction: replace(prediction, sample=thinned(prediction.sample))


def by_task(
    predictions: Sequence[Prediction], benchmark: str | None
) -> dict[str, list[Prediction]]:
    """The predictions that each benchmark scores."""
    found: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        found.setdefault(benchmark or prediction.sample.task, []).append(prediction)
    return found


def without_picture(sample: Sample) -> Sample:
    return replace(sample, image=None)


def scores_of(benchmark: str, predictions: Sequence[Prediction], scored: bool) -> Scores:
    return benchmark_called(benchmark).score(predictions) if scored else unscored(predictions)


def answer(
    model: MixtureModel,
    batch: Batch,
    gates: str,
    collator: Collator,
    max_new_tokens: int,
    num_beams: int,
) -> tuple[torch.Tensor, Gates]:
    """New token ids, and the gates that they were generated with; ValueError for NaN or infinity in either."""
    logits = FiniteLogits()
    ids, decided = model.answering().generate_routed(
        batch,
        **gate_rule(model, batch, gates),
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        pad_token_id=collator.processor.tokenizer.pad_token_id,
        logits_processor=[logits],
    )
    if logits.finite is not None:
        check_finite(batch.samples, "logits", logits.finite.view(len(batch), -1))
    if decided.gates is not None:
        check_finite(batch.samples, "gates", decided.gates.isfinite())
    return ids, decided


class FiniteLogits:
    """A logits processor that changes nothing, and remembers which rows had a finite largest logit.

    The largest is NaN or infinity where any is; processors before it may forbid tokens by -infinity.
    """

    def __init__(self) -> None:
        self.finite: torch.Tensor | None = None  # [rows]; stays on the device: nothing waits for it

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        finite = scores.amax(-1).isfinite()
        self.finite = finite if self.finite is None else self.finite & finite
        return scores


def check_finite(samples: Sequence[Sample], what: str, finite: torch.Tensor) -> None:
    """ValueError naming the first sample with a False among its entries [sample, ...]."""
    whole = finite.flatten(1).all(1).tolist()
    if bad := [sample for sample, good in zip(samples, whole, strict=True) if not good]:
        raise ValueError(
            f"{name_of(bad[0])}: the model's {what} are not finite (NaN or infinity), so it has no answer; "
            "check its weights, its scaling and model.dtype"
        )


def check_gates(spec: str, names: Sequence[str], granularity: str = "sample") -> None:
    """ValueError, with the choices, unless `choose_gates` knows what to do with these experts."""
    if spec in GATES or spec.removeprefix("without:") in names:
        if spec.startswith("without:") and granularity == "token":
            raise ValueError(f"gates={spec}: has no meaning where every token is routed by itself")
        return
    choices = ", ".join([*GATES, *names, *(f"without:{name}" for name in names)])
    raise ValueError(f"gates={spec}: unknown; choices: {choices}")


def choose_gates(model: MixtureModel, batch: Batch, spec: str) -> Gates:
    """The gates of a batch by the rule `spec` (see `evaluate`)."""
    rule = gate_rule(model, batch, spec)
    return model.compute_gates(batch, override=rule.get("gates"), available=rule.get("available"))


def gate_rule(model: MixtureModel, batch: Batch, spec: str) -> dict[str, torch.Tensor]:
    """The `gates` to use, or the experts `available` to the router, as a model takes them; or neither."""
    names, device = model.bank.names, batch.input_ids.device
    if spec == "router":
        return {}
    if spec.startswith("without:"):
        left = torch.tensor([name != spec.removeprefix("without:") for name in names])
        return {"available": left.to(device)}
    if spec == "oracle":
        return {"gates": one_hot_gates(batch.expert_ids, len(names))}
    weights = {
        "uniform": [1.0 / len(names) for _ in names],
        "off": [0.0] * len(names),
    }.get(spec, [float(name == spec) for name in names])
    return {"gates": torch.tensor(weights, device=device).expand(len(batch), -1)}


def predictions_of(
    samples: Sequence[Sample], ids: torch.Tensor, decided: Gates, collator: Collator
) -> Iterator[Prediction]:
    texts = collator.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    gates = decided.gates
    if gates is not None and gates.shape[-1] == 0:  # a base has no experts
        gates = None
    rows = [None] * len(samples) if gates is None else gates.float().cpu().tolist()
    for sample, text, row in zip(samples, texts, rows, strict=True):
        box = collator.box_codec.decode(text, collator.geometry(sample)) if sample.boxes else None
        yield Prediction(sample=sample, text=text.strip(), box=box, gates=row)


def prompt_settings(collator: Collator) -> dict[str, Any]:
    """What shaped the prompts, and one of the templates' own texts."""
    names = ("task_in_prompt", "ocr_in_prompt", "withhold_task", "task_template", "ocr_template")
    return {name: getattr(collator, name) for name in names}
