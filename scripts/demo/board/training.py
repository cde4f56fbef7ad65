"""Train the rows of one seed, each a run of train.py in its own process."""

import json
import subprocess
import sys
from typing import Any

from moa.build import ALPHA, RANK
from moa.files.atomic import write_file
from scripts.demo.board.plan import CONFIG, EVIDENCE, ROOT, Plan

SCHEDULE = ("steps", "warmup_steps", "lr_end")


def train_rows(plan: Plan) -> None:
    """Every run of a seed: two plain LoRAs, the experts, and a router for each set of evidence."""
    config, steps = plan.config(), plan.steps()
    ranks = [expert.rank or RANK for expert in config.experts.values()]
    first = next(iter(config.experts.values()))
    rates: dict[str, dict[str, Any]] = {
        name: {key: getattr(stage, key) for key in SCHEDULE} | {"lr": vars(stage.lr)}
        for name, stage in config.stages.items()
    }
    for row, rank in (("lora", ranks[0]), ("lora_equal_rank", sum(ranks))):
        alpha = (first.alpha or ALPHA) / ranks[0] * rank
        stage = rates["experts"] | {"steps": sum(steps.values())}
        train(plan, row, f"experts={{lora: {{rank: {rank}, alpha: {alpha}}}}}", "data.expert=lora",
              "router={kind: fixed}", f"stages={json.dumps({'experts': stage})}")  # fmt: skip
    train(plan, "experts", f"stages={json.dumps({'experts': rates['experts']})}")
    start = {"init_from": str(plan.folder / "experts")}
    routed = json.dumps({"router": rates["router"] | start, "joint": rates["joint"]})
    for row, evidence in EVIDENCE.items():
        train(plan, row, f"router.evidence={json.dumps(evidence)}", f"stages={routed}")
    joint = rates["joint"] | start | {"steps": steps["router"] + steps["joint"]}
    token = "{kind: top_k, top_k: 2, granularity: token}"
    train(plan, "router_token_top2", f"router={token}", f"stages={json.dumps({'joint': joint})}")


def train(plan: Plan, row: str, *overrides: str) -> None:
    """One run of train.py, unless it is there; a half-trained one is continued, one of other settings refused."""
    out = plan.folder / row
    settings = [*overrides, f"out={out}", f"data.ocr_cache={plan.ocr_file}", "eval.every=0"]
    done, wanted = out / "done", plan.fingerprint(*settings)
    if done.is_file():
        if done.read_text() != wanted:
            raise ValueError(
                f"{out}: was trained with other settings or on another base; use another `out`, or delete "
                "the folder to train it again"
            )
        return
    command = [sys.executable, "train.py", "--config", CONFIG, "--resume", *plan.overrides,
               f"seed={plan.seed}", *settings]  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    print(f"seed {plan.seed}: training {row}", flush=True)
    with (out / "train.log").open("a") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise ValueError(f"training of {out} failed; see {out / 'train.log'}")
    write_file(done, wanted)
