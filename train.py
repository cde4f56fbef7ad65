"""Train experts and router: config -> model and data -> stages -> checkpoints.

accelerate launch train.py --config configs/demo.yaml [key.sub=value ...] [--resume]
"""

import argparse
import os
import sys

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes are forked

from data.checks import BadSampleError
from moa.cli.command import mistakes_in_one_line
from moa.cli.settings import describe
from moa.config import RunConfig, load_config
from moa.training.loop import train
from moa.training.setup import make_accelerator, open_run
from moa.training.signals import EXIT_STATUS
from moa.training.step import TrainingError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="settings, with their defaults:\n\n" + describe(RunConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        action="append",
        help="YAML file of settings; a second one is laid over the first",
    )
    known = parser.add_mutually_exclusive_group()
    known.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    known.add_argument(
        "--overwrite", action="store_true", help="delete the run in out= once the new one can begin"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="one setting")
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse_arguments()
    with mistakes_in_one_line():
        config = load_config(arguments.config, arguments.overrides)
        accelerator = make_accelerator(config)
        run, state = open_run(
            config, accelerator, resume=arguments.resume, overwrite=arguments.overwrite
        )
    try:
        with run.stop.on_signals():
            train(run, state)
    except (TrainingError, BadSampleError, OSError) as error:
        sys.exit(f"error: {error}\n{run.how_to_go_on()}")
    accelerator.end_training()
    if not run.done:
        run.reporter.say(f"\nstopped by {run.stop} after step {run.step}: {run.how_to_go_on()}")
        sys.exit(EXIT_STATUS)
    run.reporter.say(f"\ndone: {run.step} steps in {run.folder}")


if __name__ == "__main__":
    main()
