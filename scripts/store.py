"""A store of experts: publish them, find them, add one to a run, and compose skills as text.

    python -m scripts.store publish store=STORE run=runs/demo
    python -m scripts.store find store=STORE text=caption
    python -m scripts.store show caption store=STORE
    python -m scripts.store equip caption store=STORE run=runs/mine out=runs/more
    python -m scripts.store unequip caption run=runs/more out=runs/less
    python -m scripts.store compose "caption + 2 * ocr_vqa - toxic" store=STORE rank=8 out=OUT

STORE is a folder, or hf:ORG/NAME, a repository of the hub. docs/store.md explains it.
"""

import logging
from collections.abc import Sequence
from importlib import import_module

from rich.console import Console

from moa.cli.command import mistakes_in_one_line, settings_parser
from moa.cli.settings import Override, load
from moa.merging.settings import StoreConfig

# action -> its module, and the settings that it reads; the first may stand alone
ACTIONS = {
    "publish": ("publish", ["name", "store", "run", "adapters", "license", "update"]),
    "find": ("show", ["text", "store", "base"]),
    "show": ("show", ["name", "store"]),
    "equip": ("equip", ["name", "store", "run", "task", "out"]),
    "unequip": ("equip", ["name", "run", "out"]),
    "compose": ("compose", ["expression", "store", "base", "method", "rank", "verify", "out"]),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = settings_parser(StoreConfig, __doc__)
    args = parser.parse_intermixed_args(argv)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with mistakes_in_one_line():
        action, *given = args.overrides or [""]
        if action not in ACTIONS:
            raise ValueError(f"{action or 'action'}: begin with one of {', '.join(ACTIONS)}")
        module, own = ACTIONS[action]
        overrides: list[Override] = []
        for text in given:
            key, sign, _ = text.partition("=")
            if sign and key not in own:
                raise ValueError(f"{key}: has no effect with {action}; choices: {', '.join(own)}")
            overrides.append(text if sign else (own[0], text))
        settings = load(StoreConfig, args.config, overrides)
        getattr(import_module(f"moa.merging.store.{module}"), action)(settings, Console())


if __name__ == "__main__":
    main()
