"""Train a mixture with clients that keep their data: config -> clients -> rounds -> a run and a table.

python federate.py --config configs/federated/demo.yaml [--config OVER_IT.yaml] [key.sub=value ...] [--resume]

All clients are simulated in this process, one after the other. The result is a run folder as train.py leaves it, with
the global model, and the table of clients and tasks in federated.json.
"""

import argparse
import os
import sys

from moa.cli.command import mistakes_in_one_line, settings_parser
from moa.cli.settings import load
from moa.federated.config import FederateConfig

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes are forked


def main() -> None:
    arguments = parse_arguments()
    from moa.federated.matrix import report
    from moa.federated.simulate import federate
    from moa.federated.start import open_federation
    from moa.training.setup import make_accelerator
    from moa.training.signals import EXIT_STATUS

    with mistakes_in_one_line():
        config = load(FederateConfig, arguments.config, arguments.overrides)
        # run folder, model, partition and table of roles: all checked first
        options = {"resume": arguments.resume, "overwrite": arguments.overwrite}
        federation = open_federation(config, make_accelerator(config), **options)
    hint = "the same command with --resume continues"
    try:
        with federation.stop.on_signals():
            federate(federation)  # all rounds, each stored
    except OSError as error:
        sys.exit(f"error: {error}\n{hint}")
    if not federation.done:
        federation.reporter.print(f"\nstopped by {federation.stop}: {hint}")
        sys.exit(EXIT_STATUS)
    report(federation)


def parse_arguments() -> argparse.Namespace:
    parser = settings_parser(FederateConfig, __doc__)
    known = parser.add_mutually_exclusive_group()
    known.add_argument("--resume", action="store_true", help="continue after the last update that was stored")
    known.add_argument("--overwrite", action="store_true", help="delete the run in out= once the new one can begin")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    main()
