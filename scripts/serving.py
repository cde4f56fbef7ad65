"""A run's routed mixture for engines that take one LoRA, or scales of several, per request.

    python -m scripts.serving run=runs/demo out=OUT
    python -m scripts.serving run=runs/demo precision=0.05 max_vectors=16 out=OUT

Routes the run's validation samples, and writes the experts as PEFT folders, the weights {adapter: weight} of every
sample, and for each frequent vector of gates one exact adapter. vLLM, PEFT and others load all of them.
"""

from rich.console import Console

from moa.cli.command import command
from moa.merging.settings import ServingConfig


def serve(settings: ServingConfig, console: Console) -> None:
    from moa.merging.serving import write_serving

    write_serving(settings, console)


main = command(ServingConfig, serve, __doc__)

if __name__ == "__main__":
    main()
