"""Answers to a folder of images, or to a file of questions: a JSON line each, which a killed command continues.

    rows, a batch at a time -> answered before? -> answer_batch -> OUT.partial -> OUT, in the order of the input

A row is answered before where its id stands in OUT or OUT.partial with the same digest: of the model, prompt, gates and
lengths, and of the row's texts and pixels.
"""

import fcntl
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from rich.progress import track

from data.checks import BadSampleError
from data.config import MADE, SourceConfig
from data.mixture import Mapped, Source, read_sample
from data.ocr import OcrCache, words_on
from data.readers.folders import open_images
from data.readers.record import RecordDataset
from data.readers.table import open_records
from data.sample import Sample
from data.sources import open_ocr
from moa.checkpoint import sha256, versions
from moa.config import RunConfig
from moa.evaluation.fingerprints import digest, sample_digest, settings_digest
from moa.evaluation.models import EvaluatedModel
from moa.evaluation.predict import Prediction, prediction_of, prompt_collator
from moa.evaluation.processes import Processes
from moa.evaluation.run import answer_batch, asked_of, rows_of_batches
from moa.evaluation.settings import benchmark_of, check_gates
from moa.evaluation.sources import trained_experts
from moa.files.atomic import write_file, write_json
from moa.model import MixtureModel

ASKED = "asked"  # key of a row: the digest of what its answer depends on


@dataclass(kw_only=True)
class Part:
    """What became of some rows of the input."""

    kept: list[str] = field(default_factory=list)  # ids of rows that were answered before
    answered: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)  # of the rows that were answered
    skipped: list[tuple[str, BadSampleError]] = field(default_factory=list)  # file and reason


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The input, without the run's OCR words: they cost too much to read again for rows that are answered."""

    dataset: RecordDataset
    benchmark: str | None
    ocr: OcrCache | None
    ids: list[str]  # of the rows that can be read

    def file(self, row: int, error: BadSampleError) -> str:
        """The image file of a row, or where else its error is."""
        with suppress(BadSampleError):
            stored = self.dataset.records.read(row)[0].images
            if len(stored) == 1 and isinstance(stored[0], Path):
                return str(stored[0])
        return error.where


def open_questions(source: SourceConfig | Path, question: str | None, task: str | None, config: RunConfig) -> Questions:
    """Of a source, or of a folder of images with one question; ValueError for ids that two rows share."""
    if isinstance(source, Path):
        dataset, benchmark, cache = open_images(source, question or "", task or ""), None, None
    elif source.format in MADE:
        raise ValueError(f"source.format: {source.format} has no files; eval.py answers it")
    else:
        dataset, benchmark, cache = open_records(source, source.expert), benchmark_of(source), source.ocr_cache
    ids: dict[str, None] = {}
    for row in range(len(dataset)):
        with suppress(BadSampleError):  # counted where it is answered
            record, where = dataset.records.read(row)
            if record.id in ids:
                raise ValueError(f"{where}: the id {record.id!r} is not unique; give each row an id of its own")
            ids[record.id] = None
    return Questions(dataset=dataset, benchmark=benchmark, ocr=open_ocr(config.data, cache), ids=[*ids])


def answer_questions(
    network: MixtureModel,
    model: EvaluatedModel,
    config: RunConfig,
    questions: Questions,
    out: Path,
    *,
    progress: bool,
    processes: Processes,
) -> dict[str, Any]:
    """Write the answers to `out`; a record of what was answered, kept and skipped, on the main process. `config` has
    the gates, lengths and batch size in its `eval`; what is skipped stops all by `eval.on_bad_sample`."""
    settings = replace(config.eval, score=False)
    check_gates(settings.gates, network.bank.names, network.routing.granularity)
    collator = prompt_collator(network, config, withhold_task=settings.withhold_task)
    dataset: Source = questions.dataset
    if network.routing.kind.by_expert:
        dataset = Mapped(dataset, trained_experts(config))
    about = about_of(network, model, config, questions, collator)
    before = processes.from_main(lambda: read_before(out))
    asked_before = {name: row[ASKED] for name, row in before.items()}

    def answer(rows: range) -> Part:
        part, asked, new = Part(), {}, []
        for row in rows:
            sample = read_sample(dataset, row, questions.dataset.source)
            if isinstance(sample, BadSampleError):
                if settings.on_bad_sample != "skip":
                    raise sample
                part.skipped.append((questions.file(row, sample), sample))
                continue
            asked[sample.id] = digest(f"{about} {sample_digest(sample)}")
            if asked_before.get(sample.id) == asked[sample.id]:
                part.kept.append(sample.id)
            else:
                new.append(with_words(sample, questions.ocr))
        if new:
            done = answer_batch(network, new, collator, settings, questions.benchmark)
            part.skipped += [(error.where, error) for error in done.rejected]
            part.answered = [r.sample.id for r in done.responses]
            found = [(r.sample, prediction_of(network, collator, r)) for r in done.responses]
            part.lines = [line_of(answer_row(sample, said, asked[sample.id])) for sample, said in found]
        return part

    batches = rows_of_batches(len(dataset), settings.batch_size)
    turns = [batches[start : start + processes.size] for start in range(0, len(batches), processes.size)]
    hidden = not (progress and processes.is_main and sys.stdout.isatty())
    parts: list[Part] = []
    with partial_file(out, processes.is_main) as file:
        for turn in track(turns, out.name, disable=hidden, transient=True):
            made = processes.map(answer, turn)
            if file is not None:
                file.write("".join(line for part in made for line in part.lines).encode())
                file.flush()
            parts += [replace(part, lines=[]) for part in made]
        if file is None:
            return {}
        weights, base = model.fingerprint(), network.backbone.fingerprint
        named = {"model": model.path, "weights": weights, "base": base, "gates": settings.gates, ASKED: about}
        return finish(out, questions, parts, named | {"versions": versions()})


def about_of(
    network: MixtureModel, model: EvaluatedModel, config: RunConfig, questions: Questions, collator: Any
) -> str:
    """The digest of what all answers depend on: weights, base, prompt, gates, lengths, and the source of OCR words."""
    ocr = questions.ocr
    words = None if ocr is None else (ocr.settings, ocr.path and ocr.path.is_file() and sha256(ocr.path))
    asked = asked_of(replace(config.eval, score=False, on_bad_sample=None), questions.benchmark, collator)
    asked |= {"prompt": asdict(config.prompt) | {"withhold_task": collator.withhold_task}, "ocr": words}
    return digest(f"{model.fingerprint()} {network.backbone.fingerprint} {settings_digest(asked)}")


def with_words(sample: Sample, ocr: OcrCache | None) -> Sample:
    if ocr is None or sample.ocr is not None:
        return sample
    return replace(sample, ocr=words_on(sample.images, ocr))


def answer_row(sample: Sample, found: Prediction, asked: str) -> dict[str, Any]:
    """A line of the file, with the keys that scripts.score reads."""
    gates = None if found.gates is None else {name: round(gate, 5) for name, gate in found.gates.items()}
    own = {"id": sample.id, "image_id": sample.image_id, "task": sample.task, "question": sample.asked}
    box = None if found.box is None else list(found.box)
    return {**own, "answer": found.text, "predicted_box": box, "gates": gates, ASKED: asked}


def line_of(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def partial_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


@contextmanager
def partial_file(out: Path, is_main: bool) -> Iterator[BinaryIO | None]:
    """The file of new answers, open for more, on the main process; ValueError where another command writes it."""
    if not is_main:
        yield None
        return
    path = partial_of(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            rule = "another command writes it; wait for its end, or choose another out="
            raise ValueError(f"out={out}: {rule}") from None
        except OSError:  # a disk without locks
            pass
        content = path.read_bytes()
        file.truncate(content.rfind(b"\n") + 1)  # without half a line that a kill left
        try:
            yield file
        finally:
            file.flush()
            if path.is_file() and not path.stat().st_size:
                path.unlink()


def read_before(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of `out` and of what a killed command left, the later ones of an id; ValueError for another file."""
    found: dict[str, dict[str, Any]] = {}
    for path in (out, partial_of(out)):
        for line in path.read_bytes().split(b"\n") if path.is_file() else ():
            row: Any = None
            with suppress(ValueError):
                row = json.loads(line) if line.strip() else None
            if isinstance(row, dict) and isinstance(row.get("id"), str) and isinstance(row.get(ASKED), str):
                found[row["id"]] = row
            elif line.strip() and path == out:
                raise ValueError(f"out={out}: holds other things than answers of scripts.predict; choose another out=")
    return found


def finish(out: Path, questions: Questions, parts: Sequence[Part], about: Mapping[str, Any]) -> dict[str, Any]:
    """Write `out` whole, in the order of the input, and beside it the record of what was done."""
    kept, new = ({name for part in parts for name in getattr(part, key)} for key in ("kept", "answered"))
    skipped = [pair for part in parts for pair in part.skipped]
    if not kept and not new:
        raise skipped[0][1]
    rows, done = read_before(out), kept | new
    write_file(out, "".join(line_of(rows[name]) for name in questions.ids if name in done))
    partial_of(out).unlink(missing_ok=True)
    record = {
        **about,
        "num_answered": len(new),
        "num_kept": len(kept),
        "num_skipped": len(skipped),
        "skipped": dict(Counter(error.rule for _, error in skipped)),
        "skipped_files": [
            {"file": file, "count": count, "reason": next(str(error) for name, error in skipped if name == file)}
            for file, count in Counter(file for file, _ in skipped).most_common()
        ],
    }
    write_json(report_of(out), record)
    return record


def report_of(out: Path) -> Path:
    return out.with_name(f"{out.stem}.report.json")
