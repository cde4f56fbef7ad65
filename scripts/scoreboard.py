"""Does routing pay? Train every row on the same data with the same steps, score all on the same questions.

    python scripts/scoreboard.py --out runs/scoreboard [--seeds 0 1 2] [--jobs 2] [key.sub=value ...]

Writes results/scoreboard.json, its table in Markdown and its chart. Trained runs and scored rows lie in --out, one
folder a seed: a killed scoreboard goes on where it stopped. `key.sub=value` changes every run's config.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.ocr import OcrCache, build_cache
from data.ocr_engines import RapidOcr
from data.scene_dataset import TRAINED_TASKS, SceneDataset
from moa.analysis.plots import scoreboard_chart
from moa.analysis.routing import leave_one_out
from moa.atomic import write_json
from moa.benchmarks.report import routing_record
from moa.benchmarks.result import Result
from moa.benchmarks.run import evaluate
from moa.benchmarks.sources import prompt_collator
from moa.build import build_model, only_adapter
from moa.checkpoint import load_model, pointed
from moa.config import RunConfig, load_config
from moa.model import MixtureModel

CONFIG = "configs/demo.yaml"
EVIDENCE = {
    "router_image": ["image"],
    "router_image_text": ["image", "text"],
    "router_image_text_ocr": ["image", "text", "ocr"],
    "router_all": ["image", "text", "ocr", "task"],
}
ROWS = (
    "base", "lora", "lora_equal_rank", "oracle", *EVIDENCE, "router_no_prefix", "router_token_top2",
    "merged_uniform_rank_r", "merged_exact", "merged_rank_r",
)  # fmt: skip
MERGES = {  # row -> weights and rank of the merge of router_all's experts; r is one expert's rank
    "merged_uniform_rank_r": ("uniform", "r"),
    "merged_exact": ("gates", "sum"),
    "merged_rank_r": ("gates", "r"),
}


@dataclass(frozen=True, kw_only=True)
class Column:
    """One set of questions; without a task, the mean over the trained ones."""

    split: str
    task: str | None = None
    style: str | None = None
    withhold_task: bool = False

    def datasets(self, num_samples: int, ocr: OcrCache | None) -> list[SceneDataset]:
        of_slice = self.split.startswith("slice_")
        tasks = [self.task] if self.task or of_slice else list(TRAINED_TASKS)
        count = num_samples if len(tasks) == 1 else num_samples // 2
        return [
            SceneDataset(self.split, task, num_samples=count, style=self.style, ocr=ocr)
            for task in tasks
        ]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one seed needs to train and score its rows."""

    out: Path
    seed: int
    columns: dict[str, Column]
    num_samples: int
    overrides: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.out / f"seed-{self.seed}"

    @property
    def ocr_file(self) -> Path:
        return self.out / "ocr.parquet"

    def config(self, *more: str) -> RunConfig:
        return load_config(ROOT / CONFIG, [*self.overrides, f"seed={self.seed}", *more])

    def steps(self) -> dict[str, int]:
        """Optimiser steps by stage name; every row but `base` trains for their sum."""
        return {stage.name: stage.steps for stage in self.config().stages}


# Training ---------------------------------------------------------------------------------------


def train_rows(plan: Plan) -> None:
    """Every run of a seed: two plain LoRAs, the experts, and a router for each set of evidence."""
    config, steps = plan.config(), plan.steps()
    ranks = [expert.rank for expert in config.experts.values()]
    first = next(iter(config.experts.values()))
    rates = stage_settings(config)
    for row, rank in (("lora", first.rank), ("lora_equal_rank", sum(ranks))):
        alpha = first.alpha / first.rank * rank
        stage = rates["experts"] | {"steps": sum(steps.values())}
        train(plan, row, f"experts={{lora: {{rank: {rank}, alpha: {alpha}}}}}", "data.expert=lora",
              "router={kind: fixed}", f"stages={json.dumps([stage])}")  # fmt: skip
    train(plan, "experts", f"stages={json.dumps([rates['experts']])}")
    start = {"init_from": str(plan.folder / "experts")}
    routed = json.dumps([rates["router"] | start, rates["joint"]])
    for row, evidence in EVIDENCE.items():
        train(plan, row, f"router.evidence={json.dumps(evidence)}", f"stages={routed}")
    joint = rates["joint"] | start | {"steps": steps["router"] + steps["joint"]}
    token = "{kind: top_k, top_k: 2, granularity: token}"
    train(plan, "router_token_top2", f"router={token}", f"stages={json.dumps([joint])}")


def stage_settings(config: RunConfig) -> dict[str, dict[str, Any]]:
    return {
        stage.name: {
            "name": stage.name,
            "steps": stage.steps,
            "lr": vars(stage.lr),
            "warmup_steps": stage.warmup_steps,
            "lr_end": stage.lr_end,
        }
        for stage in config.stages
    }


def train(plan: Plan, row: str, *overrides: str) -> None:
    """One run of train.py, unless it is there; a half-trained one is continued."""
    out, done = plan.folder / row, plan.folder / row / "done"
    if done.is_file():
        return
    command = [sys.executable, "train.py", "--config", CONFIG, "--resume", *plan.overrides,
               *overrides, f"seed={plan.seed}", f"out={out}", f"data.ocr_cache={plan.ocr_file}",
               "eval.every=0"]  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    print(f"seed {plan.seed}: training {row}", flush=True)
    with (out / "train.log").open("a") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise RuntimeError(f"training of {out} failed; see {out / 'train.log'}")
    done.touch()


def merge(plan: Plan, row: str) -> Path:
    """A merged adapter of router_all's experts by scripts/merge.py, verified by itself."""
    weights, rank = MERGES[row]
    out, run = plan.folder / "merged" / row, plan.folder / "router_all"
    if out.is_dir():
        return out
    experts = run / "checkpoints" / str(pointed(run, "last")) / "experts"
    names = list(plan.config().experts)
    count = next(iter(plan.config().experts.values())).rank if rank == "r" else rank
    source = [f"run={run}", "weights=gates"]
    if weights == "uniform":
        source = [f"adapters={[str(experts / n) for n in names]}"]  # linear's own default: 1/N each
    command = [sys.executable, "scripts/merge.py", *source, f"rank={count}", f"out={out}",
               "verify=false"]  # scored below on every question, which says more  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return out


# Scoring ----------------------------------------------------------------------------------------


def score_rows(plan: Plan) -> None:
    ocr = OcrCache(plan.ocr_file, engine=engine_of(plan.config()))
    for row in ROWS:
        file = plan.folder / "scores" / f"{row}.json"
        if file.is_file():
            continue
        print(f"seed {plan.seed}: scoring {row}", flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, score_row(plan, row, ocr))


def score_row(plan: Plan, row: str, ocr: OcrCache) -> dict[str, Any]:
    model, config, gates = open_row(plan, row)
    withheld = row == "router_no_prefix"
    by_column = {
        name: [
            evaluate(
                model,
                dataset,
                prompt_collator(model, config, withhold_task=withheld or column.withhold_task),
                name=name,
                gates=gates,
                batch_size=64,
                max_new_tokens=config.eval.max_new_tokens,
                progress=False,
            )
            for dataset in column.datasets(plan.num_samples, ocr)
        ]
        for name, column in plan.columns.items()
    }
    scores = {
        name: mean(r.score["value"] or 0.0 for r in found) for name, found in by_column.items()
    }
    record: dict[str, Any] = {
        "columns": {"trained_mean": mean(scores[task] for task in TRAINED_TASKS), **scores},
        "adapter_parameters": sum(p.numel() for p in adapter_parameters(model, gates)),
        "tokens_per_second": tokens_per_second(by_column),
    }
    if row in EVIDENCE or row == "router_no_prefix":
        trained = [r for task in (*TRAINED_TASKS, "line") for r in by_column[task]]
        record["routing"] = routing_record(model, config, trained)
    if row == "router_all":
        (plan.folder / row / "eval").mkdir(exist_ok=True)
        write_json(plan.folder / row / "eval" / "routing.json", record["routing"])  # for the merges
        record["lost_without"] = worth_of_experts(plan, model, config, ocr)
    return record


def open_row(plan: Plan, row: str) -> tuple[MixtureModel, RunConfig, str]:
    """The model of a row, its config, and who decides its gates."""
    if row in MERGES:
        config = plan.config(*only_adapter(merge(plan, row)))
        return build_model(config).eval(), config, "router"
    run = {"base": "experts", "oracle": "experts", "router_no_prefix": "router_all"}.get(row, row)
    model, _, config = load_model(plan.folder / run, "cpu")
    return model, config, {"base": "off", "oracle": "oracle"}.get(row, "router")


def adapter_parameters(model: MixtureModel, gates: str) -> list[torch.nn.Parameter]:
    if gates == "off":
        return []
    router = (
        list(model.router.parameters()) if model.router is not None and gates == "router" else []
    )
    return [*model.bank.parameters(), *model.bank.token_routers().values(), *router]


def tokens_per_second(by_column: dict[str, list[Result]]) -> float:
    results = [result for found in by_column.values() for result in found]
    return sum(r.num_tokens for r in results) / sum(r.seconds for r in results)


def worth_of_experts(
    plan: Plan, model: MixtureModel, config: RunConfig, ocr: OcrCache
) -> dict[str, dict[str, float]]:
    """Expert -> task -> what the task's score loses when that expert is taken away."""
    collator = prompt_collator(model, config, withhold_task=False)

    def score(expert: str | None) -> dict[str, float]:
        gates, found = "router" if expert is None else f"without:{expert}", {}
        for task in (*TRAINED_TASKS, "line"):
            dataset = plan.columns[task].datasets(plan.num_samples // 2, ocr)[0]
            result = evaluate(
                model, dataset, collator, name=task, gates=gates, batch_size=64,
                max_new_tokens=config.eval.max_new_tokens, progress=False,
            )  # fmt: skip
            found[task] = float(result.score["value"] or 0.0)
        return found

    return leave_one_out(score, model.bank.names)


# The table --------------------------------------------------------------------------------------


def collect(plans: Sequence[Plan]) -> dict[str, Any]:
    """Mean and standard error over the seeds, by row and column."""
    found = {
        row: [json.loads((p.folder / "scores" / f"{row}.json").read_text()) for p in plans]
        for row in ROWS
    }
    rows = {
        row: {
            column: over_seeds([r["columns"][column] for r in records])
            for column in records[0]["columns"]
        }
        | {
            name: over_seeds([r[name] for r in records])
            for name in ("adapter_parameters", "tokens_per_second")
        }
        for row, records in found.items()
    }
    diagnostics = {
        row: [{k: r[k] for k in ("routing", "lost_without") if k in r} for r in records]
        for row, records in found.items()
        if "routing" in records[0]
    }
    return {
        "rows": rows,
        "seeds": [plan.seed for plan in plans],
        "commit": commit(),
        "samples_per_column": plans[0].num_samples,
        "steps": plans[0].steps(),
        "routing": diagnostics,
    }


def over_seeds(values: Sequence[float]) -> dict[str, float | None]:
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": mean(values), "se": error}


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def markdown(board: dict[str, Any], columns: Sequence[str]) -> str:
    """The columns of every row as a Markdown table, in per cent with standard errors."""
    lines = ["| row | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row, cells in board["rows"].items():
        shown = [
            f"{100 * cells[c]['mean']:.1f}"
            + ("" if cells[c]["se"] is None else f" ± {100 * cells[c]['se']:.1f}")
            for c in columns
        ]
        lines.append(f"| `{row}` | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def engine_of(config: RunConfig) -> RapidOcr:
    return RapidOcr(min_confidence=config.data.ocr_min_confidence)


def read_pictures(plan: Plan, num_workers: int) -> None:
    """Read every picture of every column once, before the seeds share the cache."""
    config = plan.config()
    if not plan.ocr_file.is_file() and config.data.ocr_cache:
        plan.out.mkdir(parents=True, exist_ok=True)
        plan.ocr_file.write_bytes((ROOT / config.data.ocr_cache).read_bytes())
    pictures = {}
    for column in plan.columns.values():
        for dataset in column.datasets(plan.num_samples, None):
            for index in range(len(dataset)):
                sample = dataset[index]
                if sample.image is not None:
                    pictures[sample.image_id] = sample.image
    build_cache(
        list(pictures.values()), plan.ocr_file, engine=engine_of(config), num_workers=num_workers
    )


def run_seed(plan: Plan) -> None:
    train_rows(plan)
    score_rows(plan)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/scoreboard"), help="runs and scores by seed"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="table, JSON and chart"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--jobs", type=int, default=1, help="seeds at a time, each in its own process"
    )
    parser.add_argument("--num-samples", type=int, default=128, help="questions a column")
    parser.add_argument("--only-seed", type=int, help="train and score this seed, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="for every run")
    return parser.parse_intermixed_args()


def main() -> None:
    args = arguments()
    raw = yaml.safe_load((ROOT / "configs/scoreboard.yaml").read_text())
    columns = {name: Column(**column) for name, column in raw["columns"].items()}
    plans = [
        Plan(out=args.out.resolve(), seed=seed, columns=columns, num_samples=args.num_samples,
             overrides=args.overrides)
        for seed in args.seeds
    ]  # fmt: skip
    if args.only_seed is not None:
        return run_seed(replace(plans[0], seed=args.only_seed))
    read_pictures(plans[0], num_workers=args.jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
    with ThreadPoolExecutor(args.jobs) as pool:
        commands = [
            [sys.executable, __file__, *sys.argv[1:], "--only-seed", str(p.seed)] for p in plans
        ]
        list(pool.map(lambda c: subprocess.run(c, check=True, env=environment), commands))
    board = collect(plans)
    args.results.mkdir(parents=True, exist_ok=True)
    write_json(args.results / "scoreboard.json", board)
    table = markdown(board, ["trained_mean", *columns])
    (args.results / "scoreboard.md").write_text(table, encoding="utf-8")
    scoreboard_chart(args.results / "scoreboard.png", board)
    print(table)


if __name__ == "__main__":
    main()
