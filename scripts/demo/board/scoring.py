"""Score the rows of one seed on every column, and merge what is to be scored merged."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from data.ocr import OcrCache, build_cache
from data.ocr_engines import RapidOcr
from data.world.scene_dataset import TRAINED_TASKS
from moa.analysis.routing import leave_one_out
from moa.build import build_model, only_adapter
from moa.checkpoint import git_commit, load_model, pointed, step_folder, weights_fingerprint
from moa.config import EvalConfig, RunConfig
from moa.evaluation.fingerprints import digest
from moa.evaluation.predict import prompt_collator
from moa.evaluation.report import routing_record, write_routing
from moa.evaluation.result import Result
from moa.evaluation.run import evaluate
from moa.files.atomic import write_file, write_json
from moa.model import MixtureModel
from moa.parts import PARTS
from scripts.demo.board.plan import EVIDENCE, MERGES, ROOT, ROWS, Plan


def score_rows(plan: Plan) -> None:
    """Score what is not there yet, or was measured on other weights, questions or settings."""
    ocr = OcrCache(plan.ocr_file, engine=engine_of(plan.config()))
    settings = plan.fingerprint()
    for row in ROWS:
        file = plan.folder / "scores" / f"{row}.json"
        wanted = fingerprint_of(plan, row, settings)
        about = {"fingerprint": wanted, "num_samples": plan.num_samples}
        if (read_score(file) or {}).get("fingerprint") == wanted:
            continue
        print(f"seed {plan.seed}: scoring {row}", flush=True)
        write_json(file, score_row(plan, row, ocr) | about | {"commit": git_commit()})


def fingerprint_of(plan: Plan, row: str, settings: str) -> str:
    """What a row's scores belong to: the weights, how they are merged, the questions, the settings."""
    weights = weights_fingerprint(step_folder(plan.folder / run_of(row)))
    columns = {name: asdict(column) for name, column in plan.columns.items()}
    return digest(json.dumps([weights, row, MERGES.get(row), columns, plan.num_samples, settings]))


def read_score(file: Path) -> dict[str, Any] | None:
    """The record of a row; None where there is none, or one that was cut off."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def run_of(row: str) -> str:
    """The trained run that a row is about."""
    if row in MERGES:
        return "router_all"
    return {"base": "experts", "oracle": "experts", "router_no_prefix": "router_all"}.get(row, row)


def score_row(plan: Plan, row: str, ocr: OcrCache) -> dict[str, Any]:
    model, config, gates = open_row(plan, row)
    withheld = row == "router_no_prefix"
    by_column = {name: score_column(plan, name, model, config, ocr, gates, withheld) for name in plan.columns}
    scores = {name: mean_score(found) for name, found in by_column.items()}
    results = [result for found in by_column.values() for result in found]
    record: dict[str, Any] = {
        "columns": {"trained_mean": mean(scores[task] for task in TRAINED_TASKS), **scores},
        "adapter_parameters": sum(p.numel() for p in adapter_parameters(model, gates)),
        "tokens_per_second": sum(r.num_tokens for r in results) / sum(r.seconds for r in results),
    }
    if row in EVIDENCE or row == "router_no_prefix":
        trained = [r for task in (*TRAINED_TASKS, "line") for r in by_column[task]]
        record["routing"] = routing_record(model, config, trained)
    if row == "router_all":
        step = step_folder(plan.folder / row)
        about = {"checkpoint": str(step), "weights": weights_fingerprint(step)}
        write_routing(plan.folder / row / "eval", record["routing"], True, about)  # for the merges
        half = replace(plan, num_samples=plan.num_samples // 2)

        def score(expert: str | None) -> dict[str, float]:
            rule = "router" if expert is None else f"without:{expert}"
            tasks = (*TRAINED_TASKS, "line")
            return {t: mean_score(score_column(half, t, model, config, ocr, rule)) for t in tasks}

        record["lost_without"] = leave_one_out(score, model.bank.names)
    return record


def score_column(
    plan: Plan,
    name: str,
    model: MixtureModel,
    config: RunConfig,
    ocr: OcrCache,
    gates: str,
    withheld: bool = False,
) -> list[Result]:
    """The results on the data sets of a column."""
    column, length = plan.columns[name], config.eval.max_new_tokens
    settings = EvalConfig(gates=gates, batch_size=64, max_new_tokens=length, num_images=0)
    collator = prompt_collator(model, config, withhold_task=withheld or column.withhold_task)
    datasets = column.datasets(plan.num_samples, ocr)
    return [evaluate(model, dataset, collator, settings, name=name) for dataset in datasets]


def mean_score(results: Sequence[Result]) -> float:
    return mean(result.score["value"] or 0.0 for result in results)


def open_row(plan: Plan, row: str) -> tuple[MixtureModel, RunConfig, str]:
    """The model of a row, its config, and who decides its gates."""
    if row in MERGES:
        config = plan.config(*only_adapter(merge(plan, row)))
        return build_model(config).eval(), config, "router"
    model, _, config = load_model(plan.folder / run_of(row), "cpu")
    return model, config, {"base": "off", "oracle": "oracle"}.get(row, "router")


def adapter_parameters(model: MixtureModel, gates: str) -> list[torch.nn.Parameter]:
    if gates == "off":
        return []
    parts = ("experts", "router") if gates == "router" else ("experts",)
    return [p for part in parts for p in PARTS[part].parameters(model).values()]


def merge(plan: Plan, row: str) -> Path:
    """A merged adapter of router_all's experts by scripts.merge, verified by itself."""
    weights, rank = MERGES[row]
    out, run = plan.folder / "merged" / row, plan.folder / "router_all"
    experts = run / "checkpoints" / str(pointed(run, "last")) / "experts"
    names = list(plan.config().experts)
    count = next(iter(plan.config().experts.values())).rank if rank == "r" else rank
    source = [f"run={run}", "weights=gates"]
    if weights == "uniform":
        source = [f"adapters={[str(experts / n) for n in names]}"]  # linear's own default: 1/N each
    command = [sys.executable, "-m", "scripts.merge", *source, f"rank={count}", f"out={out}",
               "verify=false"]  # scored below on every question, a stronger check  # fmt: skip
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        raise ValueError(f"{out}: the merge of {run} failed, see the line above")
    return out


def engine_of(config: RunConfig) -> RapidOcr:
    return RapidOcr(min_confidence=config.data.ocr_min_confidence)


def read_images(plan: Plan, num_workers: int) -> None:
    """Read every image of every column once, before the seeds share the cache."""
    config = plan.config()
    if not plan.ocr_file.is_file() and config.data.ocr_cache:
        write_file(plan.ocr_file, (ROOT / config.data.ocr_cache).read_bytes())
    images = {}
    for column in plan.columns.values():
        for dataset in column.datasets(plan.num_samples, None):
            for index in range(len(dataset)):
                sample = dataset[index]
                if sample.image is not None:
                    images[sample.image_id] = sample.image
    engine = engine_of(config)
    build_cache([*images.values()], plan.ocr_file, engine=engine, num_workers=num_workers)
