"""Calibration data of a run: some samples of each validation set, and how well a merge does on them.

The sets are the run's `data.validation`, so that what is learned on them can be scored on the test sets.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from statistics import mean

import torch

from data.batch import Batch
from data.checks import BadSampleError
from data.collate import ChatCollator, Collator
from data.mixture import read_sample
from data.ocr import OcrCache
from data.sample import Sample
from data.sources import make_collator, open_sources
from moa.build import build_model
from moa.checkpoint import CONFIG, load_strictly, load_tensors, step_folder, verify
from moa.config import RunConfig, load_config
from moa.evaluation.predict import prompt_collator
from moa.evaluation.run import evaluate
from moa.merging.adapters import Expert
from moa.merging.export.export import adapter_config, tensors_of
from moa.merging.learn.distill import Gates
from moa.merging.merge import Merged
from moa.model import MixtureModel
from moa.parts import PARTS
from moa.sections import EvalConfig
from moa.statistics.gather import own_gates

Batches = Mapping[str, Sequence[Batch]]  # by data set
MERGED = "merged-experts"  # name of the merged update among the live experts


@dataclass(frozen=True, kw_only=True)
class CalibrationData:
    """Samples by data set, each set's in an order of its own."""

    samples: Mapping[str, Sequence[Sample]]
    collator: Collator  # with answers
    prompts: ChatCollator  # for generation
    num_skipped: int  # bad samples, where the run's data leaves them out

    def batches(self, size: int) -> list[Batch]:
        """Mixed batches: one sample of each data set in turn."""
        rounds = zip_longest(*self.samples.values())
        return self._cut([s for s in chain.from_iterable(rounds) if s is not None], size)

    def by_source(self, size: int) -> dict[str, list[Batch]]:
        return {name: self._cut(samples, size) for name, samples in self.samples.items()}

    def by_expert(self, size: int) -> dict[str, list[Batch]]:
        return {name: self._cut(samples, size) for name, samples in self.of_experts().items()}

    def of_experts(self) -> dict[str, list[Sample]]:
        """Every expert's own samples."""
        found: dict[str, list[Sample]] = {}
        for sample in chain.from_iterable(self.samples.values()):
            if sample.expert is not None:
                found.setdefault(sample.expert, []).append(sample)
        return found

    def _cut(self, samples: Sequence[Sample], size: int) -> list[Batch]:
        return [self.collator(samples[start : start + size]) for start in range(0, len(samples), size)]


def read_calibration(
    config: RunConfig, model: MixtureModel, *, num_samples: int, seed: int, ocr: OcrCache | None
) -> CalibrationData:
    """`num_samples` of each validation set, chosen by `seed`. Raises ValueError where the run has none."""
    if not config.data.validation:
        raise ValueError("run: has no data.validation to learn from")
    intake = model.backbone.intake
    config = replace(config, prompt=replace(config.prompt, task_dropout=0.0))
    collator = make_collator(config, intake, allow_unknown_tasks=True)
    samples, skipped = {}, 0
    for name, source in open_sources(config.data.validation.values(), config.data, ocr).items():
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:num_samples].tolist()
        read = [read_sample(source, index, name) for index in order]
        read = [s if isinstance(s, BadSampleError) else collator.error_of(s) or s for s in read]
        bad = [item for item in read if isinstance(item, BadSampleError)]
        if bad and config.data.on_bad_sample == "error":
            raise bad[0]
        skipped += len(bad)
        samples[name] = [item for item in read if isinstance(item, Sample)]
        if not samples[name]:
            raise ValueError(f"{name}: none of {len(order)} samples can be used; {bad[0]}")
    return CalibrationData(
        samples=samples,
        collator=collator,
        prompts=prompt_collator(model, config, withhold_task=False),
        num_skipped=skipped,
    )


def load_unrouted(run: str) -> tuple[MixtureModel, RunConfig]:
    """A run's experts and projector around its base, without a router: the gates come from outside."""
    step = step_folder(run)
    verify(step)
    config = load_config(step / CONFIG, ["router={kind: fixed}", "stages={}"])
    model = build_model(config, experts=step / "experts")
    projector = PARTS["projector"]
    if projector.is_trained(config):
        file = step / projector.file
        load_strictly(projector.state(model), load_tensors(file), file)
    return model.eval(), config


@contextmanager
def with_merged(model: MixtureModel, merged: Merged, experts: Sequence[Expert]) -> Iterator[None]:
    """Inside, the merged update is one more expert, called MERGED."""
    model.bank.import_expert(MERGED, tensors_of(merged, torch.float32), adapter_config(merged, experts, None))
    try:
        yield
    finally:
        model.bank.remove(MERGED)


@torch.no_grad()
def answers_loss(model: MixtureModel, batches: Batches) -> float:
    """Mean loss of the answers over the samples of a data set, then over the data sets, with the merge on."""
    gates = torch.tensor([float(name == MERGED) for name in model.bank.names])

    def total(batch: Batch) -> float:
        return float(model(batch, gates.expand(len(batch), -1)).loss_per_sample.sum())

    return mean(sum(total(batch) for batch in own) / sum(len(batch) for batch in own) for own in batches.values())


def benchmark_score(model: MixtureModel, data: CalibrationData, config: RunConfig) -> float:
    """Mean of the data sets' primary metrics over generated answers, with the merge on."""
    sizes = {name: getattr(config.eval, name) for name in ("batch_size", "max_new_tokens")}
    settings = EvalConfig(gates=MERGED, **sizes)
    results = [evaluate(model, samples, data.prompts, settings, name=name) for name, samples in data.samples.items()]
    return mean(float(result.score["value"] or 0.0) for result in results)


def greedy_answers(
    model: MixtureModel, prompts: ChatCollator, samples: Sequence[Sample], size: int, max_new_tokens: int, gates: Gates
) -> list[str]:
    """What the model generates for each sample, `size` at a time; `gates` are options of `generate`, by batch."""
    tokenizer, answering = prompts.processor.tokenizer, model.answering()
    settings = {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id, "do_sample": False}
    texts: list[str] = []
    for start in range(0, len(samples), size):
        batch = prompts(samples[start : start + size]).to(next(model.parameters()).device)
        ids = answering.generate(batch, **gates(batch), **settings)
        texts += [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return texts


def with_answer(sample: Sample, text: str) -> Sample:
    """The sample's first question with this answer, whatever its own are."""
    return replace(sample, answers=(text,), boxes=(), turns=())


@torch.no_grad()
def perturbed_answers(
    model: MixtureModel, names: Sequence[str], batches: Sequence[Batch], *, runs: int, noise: float, seed: int
) -> dict[str, torch.Tensor]:
    """Each expert's probabilities [run, question, option] of the first answer token, the images under noise.

    The first run is without noise; the others add normal noise of `noise` times the pixels' own spread.
    """
    found = {}
    for name in names:
        gates = own_gates(model, name)
        rows = []
        for run in range(runs):
            generator = torch.Generator().manual_seed(seed + run)
            logits = []
            for batch in batches:
                pixels = batch.pixel_values
                added = torch.randn(pixels.shape, generator=generator) * (noise * (run > 0)) * pixels.std()
                logits.append(model(replace(batch, pixel_values=pixels + added), gates(batch)).logits[:, 0])
            rows.append(torch.cat(logits).softmax(-1))
        found[name] = torch.stack(rows)
    return found
