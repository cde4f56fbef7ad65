"""What an evaluation writes: JSON files, the routing record, images."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from rich.console import Console

from data.config import SourceConfig
from moa.analysis.gallery import Card, gallery, seen_image
from moa.analysis.plots import gate_heat_map, layer_heat_map, loss_curves, read_log
from moa.analysis.routing import delta_cosines, summary
from moa.benchmarks.table import benchmark_called, submission_rows
from moa.checkpoint import versions
from moa.config import RunConfig
from moa.evaluation.card_parts import put_scores
from moa.evaluation.fingerprints import digest, settings_digest
from moa.evaluation.gates_file import PARTIAL, ROUTING
from moa.evaluation.models import EvaluatedModel
from moa.evaluation.result import Result, response_record, scores_by_task, table
from moa.evaluation.settings import chosen_sources, variant_of
from moa.files.atomic import write_file, write_json
from moa.model import MixtureModel
from moa.training.trackers import Rows, send

PARTIAL_GATES = " (not of all trained tasks and samples: weights=gates reads those of a full `eval.py` of the run)"


def report(
    model: EvaluatedModel,
    network: MixtureModel,
    config: RunConfig,
    results: Sequence[Result],
    label: str,
    *,
    full: bool,
) -> None:
    """Files, table and images of one model with one kind of gates; `full`: of all its samples."""
    console, variant = Console(), variant_of(config.eval)
    show = partial(console.print, soft_wrap=True, markup=False)
    folder = model.folder / "eval" / variant
    about = {
        "checkpoint": model.weights,
        "weights": model.fingerprint(),
        "base": network.backbone.fingerprint,
        "versions": versions(),
    }
    write_results(folder, results, chosen_sources(config), about)
    console.print(table(results, f"{label}: scores"))
    for result in results:
        if turns := sum(bool(r.sample.turns) for r in result.responses):
            count = f"{turns} of {len(result.responses)} samples"
            show(f"{result.name}: {count} are conversations: only the first question is scored")
    show(f"scores: {folder}/*.json")
    if model.kind != "run" and not variant:
        put_scores(Path(model.path), (result.record() for result in results))
    routing = routing_record(network, config, results, trained_tasks(config, model.folder))
    if routing is not None:
        full = full and not routing["missing_tasks"]
        # those of a full evaluation where others look for them, those of any other beside
        file = folder / ROUTING if full else folder / PARTIAL / ROUTING
        write_json(file, {**routing, **about})
        show(f"gates: {file}{'' if full else PARTIAL_GATES}")
    cards, drawn = make_cards(network, results, config.eval.num_images), list[Path]()
    if config.eval.num_images:
        drawn = draw_images(model.folder, variant, network, cards, routing)
        show("images: " + " ".join(map(str, drawn)))
    if config.logging.trackers and model.kind == "run":
        numbers = {f"score/{result.name}": result.score["value"] or 0.0 for result in results}
        tables = {"scores": score_rows(results), "samples": sample_rows(cards, network.bank.names)}
        images, step = {file.stem: file for file in drawn}, Path(model.weights).name.rpartition("-")[2]
        send(
            config, model.folder, f"eval {variant}".strip(), int(step) if step.isdigit() else 0, numbers, images, tables
        )


def routing_record(
    model: MixtureModel, config: RunConfig, results: Sequence[Result], trained: Collection[str] = ()
) -> dict[str, Any] | None:
    """Gates by task and their statistics; None for token routing, and for a base without experts."""
    responses = [r for result in results for r in result.responses if r.gates is not None]
    if not responses:
        return None
    names = model.bank.names
    factors = {
        name: {
            site: (layer.lora_A[name] * layer.scalings[name], layer.lora_B[name])
            for site, layer in model.bank.sites.items()
            if name in layer.scalings and layer.kind == "lora"
        }
        for name in names
    }
    with torch.no_grad():
        record = summary(
            torch.tensor([r.gates for r in responses]),
            [r.sample.task for r in responses],
            [r.sample.expert for r in responses],
            names,
            trained_tasks=config.data.tasks,
            chosen_among=config.choices,
            sites=list(model.bank.sites),
            cosines=delta_cosines(factors),
        )
    return record | {"missing_tasks": sorted(set(trained) - record["per_task"].keys())}


def trained_tasks(config: RunConfig, run: Path) -> set[str]:
    """The tasks that training sources name, and those that the run's log has a loss of."""
    named = {source.task for source in config.data.sources.values() if source.task is not None}
    log = read_log(run / "log.jsonl")
    return named | {key[5:] for row in log for key in row if key.startswith("loss/")}


def write_results(
    folder: Path, results: Sequence[Result], sources: Sequence[SourceConfig], about: dict[str, Any]
) -> None:
    """NAME.jsonl, and then NAME.json, which has its digest: only together are they one result."""
    for result, source in zip(results, sources, strict=True):
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows())
        splits = {r.sample.split for r in result.responses if r.sample.split is not None}
        described = {
            "submissions": write_submissions(folder, result),
            "split": "+".join(sorted(splits)) or source.split,
            "source": asdict(source),
            "fingerprints": {
                "weights": about.get("weights"),
                "base": about.get("base"),
                "data": result.data,
                "settings": settings_digest(result.settings),
                "rows": digest(rows),
            },
        }
        write_file(folder / f"{result.name}.jsonl", rows)
        write_json(folder / f"{result.name}.json", result.record() | described | about)


def write_submissions(folder: Path, result: Result) -> dict[str, str]:
    """By benchmark with a server of its own, the file of answers for it, or why there is none."""
    made: dict[str, str] = {}
    for name, (responses, _) in result.tasks.items():
        row = benchmark_called(name).submission
        if row is None:
            continue
        file = folder / f"{result.name}.{name}.submission.json"
        try:
            rows = submission_rows(row, responses)
        except ValueError as error:
            made[name] = f"not written: {error}"
            continue
        write_file(file, json.dumps(rows, ensure_ascii=False))
        made[name] = file.name
    return made


def score_rows(results: Sequence[Result]) -> Rows:
    """The scores by data set and task as a table, its head first."""
    head = ["data set", "task", "metric", "score", "standard error", "n"]
    return [head, *(row[: len(head)] for row in scores_by_task(results))]


def sample_rows(cards: Sequence[Card], experts: Sequence[str]) -> Rows:
    """The samples of the gallery as a table, its head first."""
    head = ["task", "question", "answer", "true", "score", "true boxes", "box", *(f"gate {name}" for name in experts)]
    rows: list[list[Any]] = [head]
    for card in cards:
        row = response_record(card.response, card.score)
        gates = row["gates"] or [None] * len(experts)
        texts = row["task"], row["question"], row["prediction"], " / ".join(row["answers"])
        rows.append([*texts, card.score, str(row["boxes"] or ""), str(row["predicted_box"] or ""), *gates])
    return rows


def make_cards(model: MixtureModel, results: Sequence[Result], count: int) -> list[Card]:
    """The first samples of each data set and task in turn, as the vision tower got them."""
    columns = [
        [pair for pair in zip(found, scores.values[scores.primary], strict=True) if pair[0].sample.image]
        for result in results
        for task, (found, scores) in result.tasks.items()
        if task != "text_to_image"  # its answers are images, for which a card has no place
    ]
    any_ocr = any(r.sample.ocr is not None for column in columns for r, _ in column)
    reads = any_ocr and model.router is not None and "ocr" in model.router.evidence
    turns = [pair for row in zip_longest(*columns) for pair in row if pair is not None]
    processor = model.backbone.processor.image_processor
    return [
        Card(image=seen_by_tower(r.sample.main_image, processor), response=r, score=score, reads=reads)
        for r, score in turns[:count]
        if r.sample.main_image is not None
    ]


def seen_by_tower(image: Image, processor: Any) -> Image:
    """The vision tower's input; the image itself where that is cut into patches or tiles."""
    pixels = torch.as_tensor(processor(images=[image], return_tensors="pt")["pixel_values"])
    if pixels.dim() != 4 or len(pixels) != 1:
        return image
    return seen_image(pixels[0], processor.image_mean, processor.image_std)


def draw_images(
    run: Path, variant: str, model: MixtureModel, cards: Sequence[Card], routing: dict[str, Any] | None
) -> list[Path]:
    folder, names = run / "pictures" / variant, model.bank.names
    made = [folder / "samples.png"]
    gallery(made[0], cards, names, "What the model saw, and said")
    if routing is not None:
        made.append(folder / "gates.png")
        gate_heat_map(made[-1], routing, model.routing.null_expert)
    if routing is not None and "per_site" in routing:
        made.append(folder / "gates_by_layer.png")
        layer_heat_map(made[-1], routing, list(model.bank.sites))
    log = read_log(run / "log.jsonl")
    if any(key.startswith("loss/") for row in log for key in row):
        made.append(folder / "losses.png")
        loss_curves(made[-1], log, names)
    return made
