"""Train experts and router: config -> model and data -> stages -> step -> log -> validate -> save.

accelerate launch train.py --config configs/demo.yaml [--config OVER_IT.yaml] [key.sub=value ...] [--resume]
"""

import argparse
import os
import sys

from moa.cli.command import mistakes_in_one_line, settings_parser
from moa.config import RunConfig, load_config
from moa.training.loop import train

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes are forked


def main() -> None:
    arguments = parse_arguments()
    from data.checks import BadSampleError
    from moa.training.setup import make_accelerator, open_run
    from moa.training.signals import EXIT_STATUS
    from moa.training.step import TrainingError

    with mistakes_in_one_line():
        config = load_config(arguments.config, arguments.overrides)
        accelerator = make_accelerator(config)
        # run folder, frozen backbone with experts and router, mixture of data sets: all checked first
        run, state = open_run(config, accelerator, resume=arguments.resume, overwrite=arguments.overwrite)
    try:
        with run.stop.on_signals():
            train(run, state)  # stages of steps, each logged, validated and saved where due
    except (TrainingError, BadSampleError, OSError) as error:
        sys.exit(f"error: {error}\n{run.resume_hint()}")
    accelerator.end_training()
    if not run.done:
        run.reporter.print(f"\nstopped by {run.stop} after step {run.step}: {run.resume_hint()}")
        sys.exit(EXIT_STATUS)
    run.reporter.print(f"\ndone: {run.step} steps in {run.folder}")


def parse_arguments() -> argparse.Namespace:
    parser = settings_parser(RunConfig, __doc__)
    known = parser.add_mutually_exclusive_group()
    known.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    known.add_argument("--overwrite", action="store_true", help="delete the run in out= once the new one can begin")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    main()
