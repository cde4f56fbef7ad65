"""scripts.distill: a run's routed mixture becomes one PEFT adapter.

    prompts of the run -> the teacher's greedy answers (answers.jsonl) -> student's steps (state.safetensors) -> adapter

What is not finished lies in OUT.steps. A step is a function of its number and of the state before it, so that a command
that was killed and is given again writes the adapter that it would have written.
"""

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.batch import Batch
from data.checks import BadSampleError, name_of
from data.collate import ChatCollator, Collator
from data.mixture import Mixture, read_sample
from data.ocr import OcrCache
from data.sample import Sample
from data.sources import make_collator, open_mixture, open_ocr
from moa.backbones.opening import class_of
from moa.build import check_adapter
from moa.checkpoint import load_model, step_folder, weights_fingerprint
from moa.cli.command import progress_bar
from moa.config import RunConfig
from moa.evaluation.card_parts import measured_of
from moa.evaluation.models import pick_device
from moa.evaluation.predict import gate_rule, prompt_collator
from moa.evaluation.settings import check_gates, mixes_answers
from moa.files.atomic import atomic_file, remove_folder, write_file, write_json
from moa.files.peft import read_header, read_site
from moa.files.peft_config import LORA, site_scaling
from moa.merging.adapters import expert_from_folder, expert_from_tensors
from moa.merging.core import Relation, inner_product
from moa.merging.export.export import Verify, adapter_config, export_adapter, tensors_of
from moa.merging.export.folder import check_out
from moa.merging.learn.calibration import greedy_answers, read_calibration, with_answer
from moa.merging.learn.distill import STUDENT, Lesson, add_student, over_tasks, student_factors
from moa.merging.merge import MergedSite
from moa.merging.report.console import report_lines
from moa.merging.run import prepare_verify
from moa.merging.settings import ZERO, DistillConfig
from moa.merging.source import Source, open_run
from moa.merging.weights import digest
from moa.model import MixtureModel
from moa.sections import StageConfig
from moa.training.optimizer import rate_factor

BETAS, CLIP = (0.9, 0.99), 1.0  # of Adam; largest norm of the whole gradient
# Settings that do not change what is learned.
FREE = ("out", "save_every", "overwrite", "device", "verify", "num_probes", "new_tokens")
SETTINGS, ANSWERS, STATE, LOG = "settings.json", "answers.jsonl", "state.safetensors", "log.jsonl"
Factors = dict[str, tuple[Tensor, Tensor]]  # by site


def distill(settings: DistillConfig, console: Console) -> None:
    """All of scripts.distill. Settings, run and start are checked before the model is loaded."""
    for key in ("run", "out"):
        if getattr(settings, key) is None:
            raise ValueError(f"{key}: names no folder")
    out, step = Path(str(settings.out)), step_folder(str(settings.run))
    source = open_run(step, to_merge=False)
    config = source.config
    assert config is not None
    check_teacher(settings, config)
    check_out(out, [step, *([settings.start] if settings.start != ZERO else [])])
    source.base()  # its absence is an error now, and not after the steps
    work = out.resolve().with_name(f"{out.resolve().name}.steps")
    begin(work, settings, step)
    factors, report = learn(settings, step, config, work, console)
    verify = prepare_verify(source, settings)
    console.print(*report_lines(export(settings, source, factors, report, work, verify), out), sep="\n", soft_wrap=True)
    remove_folder(work)


def check_teacher(settings: DistillConfig, config: RunConfig) -> None:
    """ValueError for a run that cannot teach, and for gates and sources that it does not have."""
    if class_of(config.model.name).compares:
        raise ValueError(f"run: {settings.run} is a CLIP, which answers with no tokens; scripts.merge merges it")
    if config.model.train_projector:
        raise ValueError(f"run: {settings.run} trained its projector, which no LoRA adapter can hold")
    check_gates(settings.gates, list(config.experts), config.router.granularity)
    if mixes_answers(settings.gates):
        raise ValueError(f"gates={settings.gates}: is no set of gates that a student's tokens could be compared with")
    known = list(config.data.sources)
    for name in settings.sources if settings.sources is not None else known:
        if name not in known:
            raise ValueError(f"sources: no data.sources.{name}; choices: {known}")
        if settings.gates == "oracle" and not (config.data.expert or config.data.sources[name].expert):
            raise ValueError(f"gates: data.sources.{name} names no expert, which oracle needs; leave it out of sources")
    if not known or settings.sources == []:
        raise ValueError("sources: there is no source of prompts")


def begin(work: Path, settings: DistillConfig, step: Path) -> None:
    """Open the folder of what is not finished; ValueError where it was begun with other settings or another teacher."""
    own = {key: value for key, value in asdict(settings).items() if key not in FREE}
    own |= {"run": str(step), "teacher": weights_fingerprint(step)}
    own["start_weights"] = None if settings.start == ZERO else digest(expert_from_folder(settings.start))
    if settings.overwrite and work.is_dir():
        remove_folder(work)
    if (work / SETTINGS).is_file():
        before = json.loads((work / SETTINGS).read_text())
        for key, value in own.items():
            if before.get(key) != value:
                raise ValueError(
                    f"{key}: {work} was begun with {before.get(key)}, and is now {value}; "
                    "overwrite=true starts anew, or name another out"
                )
    else:
        write_json(work / SETTINGS, own)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The run's training prompts in the order of the steps, with the answers whose tokens are compared."""

    mixture: Mixture
    collator: Collator  # with answers
    prompts: ChatCollator  # for generation
    settings: DistillConfig
    skip_bad: bool
    answers: dict[tuple[str, int], str | None] | None = None  # the teacher's; None: those of the data

    @cached_property
    def distinct(self) -> list[tuple[str, int]]:
        """Source and index of each prompt that some step draws, the first drawn first."""
        return list(dict.fromkeys(map(self.mixture.locate, range(self.settings.steps * self.settings.batch_size))))

    def read(self, place: tuple[str, int], collator: Collator) -> Sample | BadSampleError:
        name, index = place
        item = read_sample(self.mixture.sources[name], index, name)
        return item if isinstance(item, BadSampleError) else collator.error_of(item) or item

    def usable(self, items: Sequence[Sample | BadSampleError]) -> list[Sample]:
        bad = [item for item in items if isinstance(item, BadSampleError)]
        if bad and not self.skip_bad:
            raise bad[0]
        return [item for item in items if isinstance(item, Sample)]

    def samples(self, step: int) -> list[Sample]:
        """Those of step 0, 1, ...; ValueError where none is left."""
        size = self.settings.batch_size
        places = [self.mixture.locate(position) for position in range(step * size, (step + 1) * size)]
        if self.answers is None:
            found = self.usable([self.read(place, self.collator) for place in places])
        else:
            texts = [(place, text) for place in places if (text := self.answers[place])]
            read = [(self.usable([self.read(place, self.prompts)]), text) for place, text in texts]
            found = [with_answer(sample, text) for samples, text in read for sample in samples]
        if not found:
            raise ValueError(f"step {step + 1}: none of its {size} prompts can be used")
        return found


def open_prompts(settings: DistillConfig, config: RunConfig, model: MixtureModel, ocr: OcrCache | None) -> Prompts:
    config = replace(config, seed=settings.seed, prompt=replace(config.prompt, task_dropout=0.0))
    return Prompts(
        mixture=open_mixture(config, ocr).only(settings.sources),
        collator=make_collator(config, model.backbone.intake),
        prompts=prompt_collator(model, config, withhold_task=False),
        settings=settings,
        skip_bad=config.data.on_bad_sample == "skip",
    )


def learn(
    settings: DistillConfig, step: Path, config: RunConfig, work: Path, console: Console
) -> tuple[Factors, dict[str, Any]]:
    began = time.perf_counter()
    model, _, _ = load_model(step, pick_device(settings.device))
    ocr = open_ocr(config.data)
    lesson = Lesson(
        model=model,
        gates=lambda batch: gate_rule(model, batch, settings.gates),
        temperature=settings.temperature,
        by_labels=settings.loss == "labels",
        hidden=settings.hidden,
    )
    prompts = open_prompts(settings, config, model, ocr)
    length = settings.max_new_tokens or config.eval.max_new_tokens
    if settings.answers == "teacher":
        prompts = replace(prompts, answers=teacher_answers(lesson, prompts, length, work / ANSWERS, console))
    held_out = held_out_batches(settings, config, lesson, length, ocr)
    add_student(model, settings.rank, settings.alpha or settings.rank, settings.seed, start_of(settings, config, model))
    if not (work / "before.json").is_file():
        write_json(work / "before.json", compare(lesson, held_out))
    descend(lesson, prompts, work, console)
    before, after = json.loads((work / "before.json").read_text()), compare(lesson, held_out)
    for name, now in after.items():
        kept = f"same likeliest token {before[name]['token_agreement']:.1%} -> {now['token_agreement']:.1%}"
        console.print(f"{name}: {kept}, KL {before[name]['kl']:.4f} -> {now['kl']:.4f}", soft_wrap=True)
    lines = [json.loads(line) for line in (work / LOG).read_text().splitlines()] if settings.steps else []
    about = {
        **json.loads((work / SETTINGS).read_text()),
        "prompts": len(prompts.distinct),
        "without_answer": sum(not text for text in (prompts.answers or {}).values()),
        "loss": {"kind": settings.loss, "first": mean_loss(lines[:10]), "last": mean_loss(lines[-10:])},
        "agreement": {"before": before, "after": after},
        "seconds": round(time.perf_counter() - began, 1),
    }
    return student_factors(model), about


def mean_loss(lines: Sequence[dict[str, Any]]) -> float | None:
    return sum(line["loss"] for line in lines) / len(lines) if lines else None


def teacher_answers(
    lesson: Lesson, prompts: Prompts, length: int, file: Path, console: Console
) -> dict[tuple[str, int], str | None]:
    """The teacher's greedy answer to each prompt (None: unusable), of the file, a line a batch, or generated."""
    size, places = prompts.settings.batch_size, prompts.distinct
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []  # the last one may be cut
    write_file(file, b"".join(line + b"\n" for line in lines))
    texts: list[str | None] = [text for line in lines for text in json.loads(line)]
    starts = range(len(texts), len(places), size)
    with progress_bar("teacher's answers", len(starts), console) as advance, file.open("ab") as handle:
        for start in starts:
            items = [prompts.read(place, prompts.prompts) for place in places[start : start + size]]
            samples = prompts.usable(items)
            found = greedy_answers(lesson.model, prompts.prompts, samples, size, length, lesson.gates)
            pairs = zip(samples, found, strict=True)
            usable = iter([t if prompts.collator.error_of(with_answer(s, t)) is None else None for s, t in pairs])
            texts += (row := [next(usable) if isinstance(item, Sample) else None for item in items])
            handle.write(json.dumps(row).encode() + b"\n")
            handle.flush()
            advance("")
    return dict(zip(places, texts, strict=True))


def held_out_batches(
    settings: DistillConfig, config: RunConfig, lesson: Lesson, length: int, ocr: OcrCache | None
) -> dict[str, list[Batch]]:
    """Prompts of each validation set with the teacher's own answers; none where the run has no such set."""
    if not config.data.validation:
        return {}
    size, chosen = settings.batch_size, {"num_samples": settings.num_samples, "seed": settings.seed}
    data = read_calibration(config, lesson.model, ocr=ocr, **chosen)
    answered = {}
    for name, samples in data.samples.items():
        samples = [sample for sample in samples if settings.gates != "oracle" or sample.expert]
        texts = greedy_answers(lesson.model, data.prompts, samples, size, length, lesson.gates)
        answered[name] = [with_answer(sample, text) for sample, text in zip(samples, texts, strict=True) if text]
    return replace(data, samples={name: samples for name, samples in answered.items() if samples}).by_source(size)


def compare(lesson: Lesson, batches: dict[str, list[Batch]]) -> dict[str, dict[str, float]]:
    """Agreement by validation set, and of all of them, each alike: `mean`, or `mean of all` beside a `mean`."""
    device = next(lesson.model.parameters()).device
    found = {name: lesson.agreement([batch.to(device) for batch in own]) for name, own in batches.items()}
    if found:
        means = {key: sum(row[key] for row in found.values()) / len(batches) for key in ("token_agreement", "kl")}
        found["mean of all" if "mean" in found else "mean"] = means
    return found


def start_of(settings: DistillConfig, config: RunConfig, model: MixtureModel) -> Factors:
    """(A, B) of the folder that the student starts from, all scale in B; empty for zero."""
    if settings.start == ZERO:
        return {}
    header = read_header(settings.start)
    check_adapter(header, model.backbone, config.model)
    header, _ = model.bank.fit(header)
    found = {}
    for site in header.ranks:
        a, b = (factor.float() for factor in read_site(header, site).values())
        found[site] = a, b * site_scaling(header.config, site)
    return found


def descend(lesson: Lesson, prompts: Prompts, work: Path, console: Console) -> None:
    """All steps that are left, by Adam; the state is stored every so often and at the end."""
    settings = prompts.settings
    if settings.steps == 0:
        return
    own = dict(lesson.model.bank.named_parameters(STUDENT))
    optimizer = torch.optim.Adam(own.values(), lr=settings.lr, betas=BETAS)
    done = restore(work / STATE, own, optimizer)
    lines = (work / LOG).read_text().splitlines()[:done] if (work / LOG).is_file() else []
    write_file(work / LOG, "".join(line + "\n" for line in lines))
    stage = StageConfig(name="joint", steps=settings.steps, warmup_steps=settings.warmup_steps)
    with progress_bar("distilling", settings.steps, console) as advance, (work / LOG).open("a") as log:
        for _ in range(done):
            advance("")
        for step in range(done + 1, settings.steps + 1):
            optimizer.param_groups[0]["lr"] = settings.lr * rate_factor(stage, step)
            line = {"step": step, **distill_step(lesson, prompts, step, optimizer, list(own.values()))}
            log.write(json.dumps(line) + "\n")
            log.flush()
            if step % settings.save_every == 0 or step == settings.steps:
                store(work / STATE, own, optimizer, step)
            advance(f"{line['loss']:.4f}")


def distill_step(
    lesson: Lesson, prompts: Prompts, step: int, optimizer: torch.optim.Optimizer, parameters: list[Tensor]
) -> dict[str, Any]:
    """One step, number 1, 2, ...: its loss, that of each task, and the gradient's norm; ValueError where not finite."""
    began, settings, samples = time.perf_counter(), prompts.settings, prompts.samples(step - 1)
    tasks = [sample.task for sample in samples]
    shares = [1 / (len(set(tasks)) * tasks.count(task)) for task in tasks]
    size, found = settings.micro_batch_size or len(samples), []
    optimizer.zero_grad()
    for first in range(0, len(samples), size):
        part = slice(first, first + size)
        losses = lesson.losses(prompts.collator(samples[part]).to(parameters[0].device))
        share = torch.tensor(shares[part], device=losses.device)
        loss = over_tasks(losses, tasks, "worst") if settings.reduction == "worst" else (losses * share).sum()
        with lesson.model.bank.only([STUDENT]):  # checkpointed layers run again
            loss.backward()
        found.append(losses.detach().cpu())
    each = torch.cat(found)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, CLIP))
    if not (each.isfinite().all() and math.isfinite(norm)):
        names = ", ".join(name_of(sample) for sample in samples)
        raise ValueError(f"step {step}: the loss or its gradient is not finite; lower lr. Samples: {names}")
    optimizer.step()
    by_task = {f"loss/{task}": float(each[[t == task for t in tasks]].mean()) for task in dict.fromkeys(tasks)}
    total = float(over_tasks(each, tasks, settings.reduction))
    rate = optimizer.param_groups[0]["lr"]
    return {"loss": total, **by_task, "grad_norm": norm, "lr": rate, "step_s": time.perf_counter() - began}


MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam


def store(file: Path, own: dict[str, Any], optimizer: torch.optim.Optimizer, step: int) -> None:
    """Student and moments after `step` in one file."""
    tensors = {key: parameter.detach().cpu() for key, parameter in own.items()}
    for key, parameter in own.items():
        tensors |= {f"{name}:{key}": optimizer.state[parameter][name].cpu() for name in MOMENTS}
    with atomic_file(file) as temporary:
        save_file(tensors, temporary, metadata={"step": str(step)})


@torch.no_grad()
def restore(file: Path, own: dict[str, Any], optimizer: torch.optim.Optimizer) -> int:
    """The step after which the state was stored, which is now the student's and the optimiser's; 0 for none."""
    if not file.is_file():
        return 0
    with safe_open(file, framework="pt") as handle:
        step = int(handle.metadata()["step"])
        for key, parameter in own.items():
            parameter.copy_(handle.get_tensor(key))
            moments = {name: handle.get_tensor(f"{name}:{key}").to(parameter.device) for name in MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return step


def export(
    settings: DistillConfig, source: Source, factors: Factors, report: dict[str, Any], work: Path, verify: Verify | None
) -> dict[str, Any]:
    """The student as a PEFT folder, its factors as they were learned, with its report, log and card."""
    assert source.config is not None
    merged = {site: as_merged(a, b) for site, (a, b) in factors.items()}
    config = {**adapter_config(merged, source.experts, None), "peft_type": LORA}
    student = expert_from_tensors("distilled", tensors_of(merged, torch.float32), config)
    used = settings.sources if settings.sources is not None else list(source.config.data.sources)
    how = f"{settings.steps} steps of {settings.batch_size} prompts, from {settings.start}"
    card: dict[str, Any] = {
        "about": f"A LoRA of rank {settings.rank}, distilled from {len(source.experts)} LoRA experts in {how}.",
        "fingerprint": source.experts[0].base_fingerprint,
        "rows": [(e.name, "taught", str(folder)) for e, folder in zip(source.experts, source.folders, strict=True)],
        "config": source.config,
        "sources": [source.config.data.sources[name] for name in used],
        **(measured_of(source.step) if source.step else {}),
    }
    files: dict[str, Any] = {"distill_report.json": report}
    if settings.steps:
        files[LOG] = lambda path, _: shutil.copyfile(work / LOG, path)
    shared: dict[str, Any] = {"report": {"distill": report}, "files": files, "card": card, "verify": verify}
    return export_adapter(str(settings.out), merged, [student], base=source.config.model.name, **shared)


def as_merged(a: Tensor, b: Tensor) -> MergedSite:
    """An adapter's site in the form of a merge of itself alone."""
    own = inner_product((a, b), (a, b))[None]
    relation, kept = Relation(energy=own, overlap=own, span_energy=own), {"kept": float(own), "lost": 0.0}
    return MergedSite(lora_a=a, lora_b=b, weights=torch.ones(1), energy=float(own), experts=relation, **kept)
