"""What a launcher starts in test_distributed.py: runs in one process group, one after the other.

    accelerate launch --config_file ... tests/support/distributed.py RUN.json [RUN.json ...] [--resume RUN.json STEP]

A run named spoiled has NaN in its second process: the loss of step 2, and gradients of step 3. `--resume`
takes a copy of the run, named <out>-again, up from its checkpoint STEP.
"""

import faulthandler
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from moa.config import RunConfig, load_config
from moa.training.setup import make_accelerator, open_run
from tests.training.test_non_finite import spoil
from train import train


def run_one(config: RunConfig, *, resume: bool = False) -> None:
    accelerator = make_accelerator(config)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:  # of so small a model ZeRO-3 would keep every tensor whole
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    print(f"{accelerator.process_index}: {config.out}", flush=True)
    run, state = open_run(config, accelerator, resume=resume)
    if Path(config.out).name == "spoiled" and accelerator.process_index == 1:
        spoil(run, loss=2, gradient=3)
    train(run, state)


def resume_copy(config: RunConfig, step: int) -> None:
    again, accelerator = replace(config, out=f"{config.out}-again"), make_accelerator(config)
    if accelerator.is_main_process:
        shutil.copytree(config.out, again.out)
        (Path(again.out) / "checkpoints" / "last").write_text(f"step-{step:06d}\n")
    accelerator.wait_for_everyone()
    run_one(again, resume=True)


def main() -> None:
    faulthandler.enable()
    files, _, again = (arguments := sys.argv[1:]), "", []
    if "--resume" in arguments:
        place = arguments.index("--resume")
        files, again = arguments[:place], arguments[place + 1 :]
    for file in files:
        run_one(load_config(file))
    if again:
        resume_copy(load_config(again[0]), int(again[1]))


if __name__ == "__main__":
    main()
