"""A mixing desk in the browser: ask a model, move its gates by hand, take the mix home as one LoRA.

    python -m scripts.playground run=runs/demo
    python -m scripts.playground run=runs/demo adapters=[loras/a,loras/b]
    python -m scripts.playground run=models/base like=runs/demo

One image and question go to the base, to one expert, to the router and to gates set by hand, beside each other. "Export
this mix" merges the experts at these gates and checks the result. Needs the extra `page`. The page is served to this
machine alone, unless `host` names another address: it has no passwords.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from moa.cli.command import command
from moa.cli.ranges import FilePath, Port


@dataclass(frozen=True, kw_only=True)
class PlaygroundSettings:
    run: FilePath = ""  # run or step folder; or an adapter, a checkpoint, ORG/MODEL with `like`
    like: FilePath | None = None  # run or YAML file with the prompt of a model that is not a run
    # PEFT folders in place of the run's experts, mixed without a router; A/* means every one in A
    adapters: list[FilePath] = field(default_factory=list)
    host: str = "127.0.0.1"  # address to serve at
    port: Port = 8080
    device: str = "auto"  # cpu, cuda, cuda:1; auto: a GPU where there is one
    show: bool = False  # open the browser


def playground(settings: PlaygroundSettings, console: Console) -> None:
    if not settings.run:
        raise ValueError("run: missing; run=RUN; see --help")
    from moa.loaded import load
    from moa.playground.desk import Desk
    from moa.playground.page import serve

    model = load(settings.run, like=settings.like, adapters=settings.adapters, device=settings.device)
    with tempfile.TemporaryDirectory(prefix="moa-desk-") as folder:
        desk = Desk(model=model, folder=Path(folder))
        console.print(f"mixing desk: http://{settings.host}:{settings.port}", soft_wrap=True)
        serve(desk, settings.host, settings.port, show=settings.show)


main = command(PlaygroundSettings, playground, __doc__)

if __name__ == "__main__":
    main()
