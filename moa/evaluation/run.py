"""Score a model on a data set: batched generation, gates fixed at prefill, each task by its benchmark.

    data set -> instruction -> collator (left padding) -> gates -> generate -> Response -> Result

A sample that cannot be read or scored stops the evaluation or is counted by rule (`on_bad_sample`).
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data.checks import BadSampleError, name_of
from data.collate import ChatCollator
from data.mixture import Source, read_sample
from data.sample import Sample
from moa.benchmarks.scores import Response, Scores, unscored
from moa.benchmarks.table import BENCHMARKS, benchmark_called
from moa.checkpoint import step_folder, weights_fingerprint
from moa.evaluation.fingerprints import data_digest, sample_digest
from moa.evaluation.predict import respond
from moa.evaluation.processes import ALONE, Processes
from moa.evaluation.result import Result
from moa.evaluation.settings import check_gates, partner_of
from moa.model import MixtureModel
from moa.sections import EvalConfig

ANSWERING = ("gates", "batch_size", "max_new_tokens", "num_beams")
PROMPT = ("task_in_prompt", "ocr_in_prompt", "task_template", "ocr_template", "border")


@dataclass(kw_only=True)
class BatchResult:
    """What became of the samples of one batch."""

    responses: list[Response] = field(default_factory=list)
    rejected: list[BadSampleError]
    read: list[str]  # digest of each sample
    seconds: float = 0.0  # of generating
    num_tokens: int = 0


def evaluate(
    model: MixtureModel,
    dataset: Source | Sequence[Sample],
    collator: ChatCollator,
    settings: EvalConfig,
    *,
    name: str,
    benchmark: str | None = None,
    progress: bool = False,
    processes: Processes = ALONE,
) -> Result:
    """Generate an answer to every sample of a map-style data set and score it.

    `collator` is one made with `for_generation`. `benchmark` scores every sample; None: each by that of its task. Only
    the first `num_images` responses of a task keep their image: all need too much memory. With `gates` oracle a sample
    without an expert gets a uniform mixture. All `processes` must call it; the main one has the result.
    """
    check_gates(settings.gates, model.bank.names, model.routing.granularity)
    keep = first_images(settings.num_images, benchmark)

    def answer(rows: range) -> BatchResult:
        part = answer_batch(model, [read_sample(dataset, row, name) for row in rows], collator, settings, benchmark)
        part.responses = [replace(r, sample=keep(r.sample)) for r in part.responses]
        return part

    batches = rows_of_batches(len(dataset), settings.batch_size)
    parts = processes.map(answer, batches, bar=name if progress else None)
    if not processes.is_main:
        return Result(name=name, tasks={})
    return collect(parts, collator, settings, name, benchmark, processes)


def collect(
    parts: Sequence[BatchResult],
    collator: ChatCollator,
    settings: EvalConfig,
    name: str,
    benchmark: str | None,
    processes: Processes,
) -> Result:
    """The result of all batches; ValueError where no sample is left."""
    skipped = [error for part in parts for error in part.rejected]
    responses = [response for part in parts for response in part.responses]
    read = [digest for part in parts for digest in part.read]
    if not responses:
        raise ValueError(f"{name}: none of {len(read)} samples can be scored; {skipped[0]}")
    asked = asked_of(settings, benchmark, collator)
    asked["prompt"] |= {"example": collator.prompt(responses[0].sample)}
    keep = first_images(settings.num_images, benchmark)  # of all that the processes kept
    kept = [replace(response, sample=keep(response.sample)) for response in responses]
    return Result(
        name=name,
        tasks=scored_tasks(kept, benchmark, settings.score),
        skipped=skipped,
        # process r has done the jobs r, r + size, ...
        seconds=max(sum(part.seconds for part in parts[r :: processes.size]) for r in range(processes.size)),
        num_tokens=sum(part.num_tokens for part in parts),
        num_processes=processes.size,
        data=data_digest(read),
        settings=asked,
    )


def answer_batch(
    model: MixtureModel,
    samples: Sequence[Sample | BadSampleError],
    collator: ChatCollator,
    settings: EvalConfig,
    benchmark: str | None = None,
) -> BatchResult:
    """Answer samples in one batch; what cannot be answered, or scored where that is wanted, stops all or is counted. A
    task that is withheld may have any name, unless it decides the score."""
    tasks = None if collator.withhold_task and not settings.score else collator.tasks
    items = [prepare(s, model.routes, benchmark, settings.score, tasks) for s in samples]
    batch, rejected = collator.split(items)
    if rejected and settings.on_bad_sample != "skip":
        raise rejected[0]
    part = BatchResult(rejected=rejected, read=[*map(sample_digest, samples)])
    if batch is None:
        return part
    begin, lengths = time.perf_counter(), (settings.max_new_tokens, settings.num_beams)
    part.responses, part.num_tokens = respond(model, collator, batch, settings.gates, *lengths)
    part.seconds = time.perf_counter() - begin
    return part


def asked_of(settings: EvalConfig, benchmark: str | None, collator: ChatCollator) -> dict[str, Any]:
    """What the answers depend on beside weights and data, as a record."""
    prompt = {key: getattr(collator.settings, key) for key in PROMPT if key != "border" or collator.settings.border}
    other = partner_of(settings.gates)
    return {
        **({"other": weights_fingerprint(step_folder(other[0]))} if other else {}),
        "benchmark": benchmark,
        "scored": settings.score,
        **{key: getattr(settings, key) for key in ANSWERING},
        "on_bad_sample": settings.on_bad_sample or "error",
        "prompt": {"withhold_task": collator.withhold_task} | prompt,
    }


def prepare(
    item: Sample | BadSampleError,
    experts: Sequence[str],
    benchmark: str | None,
    scored: bool,
    tasks: Collection[str] | None = None,
) -> Sample | BadSampleError:
    """The sample with its benchmark's instruction, or why it cannot be scored. An expert that this model does not have
    counts as none. `tasks` have a benchmark under any name; None: all."""
    if isinstance(item, BadSampleError):
        return item
    name = benchmark or item.task
    if name not in BENCHMARKS and tasks is not None and name not in tasks:
        way_out = f"name one by sources.{item.source}.benchmark; choices: {', '.join(BENCHMARKS)}"
        detail = f"{name!r} is neither one of the run's tasks nor a benchmark; {way_out}"
        return BadSampleError(name_of(item), "unknown task", detail)
    chosen = benchmark_called(name)
    lacks = chosen.needs(item) if scored else None
    if lacks is not None:
        return BadSampleError(name_of(item), "empty answer", f"{name} needs {lacks}")
    instruction = item.instruction or chosen.instruction
    return replace(without_unknown_expert(item, experts), instruction=instruction)


def without_unknown_expert(sample: Sample, experts: Sequence[str]) -> Sample:
    return sample if sample.expert in experts else replace(sample, expert=None)


def rows_of_batches(num_rows: int, batch_size: int) -> list[range]:
    rows = range(num_rows)
    return [rows[start : start + batch_size] for start in range(0, num_rows, batch_size)]


def first_images(count: int, benchmark: str | None = None) -> Callable[[Sample], Sample]:
    """A function that drops the image of every sample but the first `count` of a task."""
    seen: Counter[str] = Counter()

    def keep(sample: Sample) -> Sample:
        task = benchmark or sample.task
        seen[task] += 1
        return sample if seen[task] <= count else sample.with_images([])

    return keep


def scored_tasks(
    responses: Sequence[Response], benchmark: str | None, scored: bool = True
) -> dict[str, tuple[list[Response], Scores]]:
    """The responses of each task, or of the one `benchmark`, with their scores."""
    found: dict[str, list[Response]] = {}
    for response in responses:
        found.setdefault(benchmark or response.sample.task, []).append(response)
    return {t: (own, benchmark_called(t).score(own) if scored else unscored(own)) for t, own in found.items()}
