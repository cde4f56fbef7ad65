"""A text LoRA, or what a whole text model learned, on the language model of a VLM of the same family.

    python -m scripts.transplant adapter=TEXT_LORA vlm=VLM out=OUT
    python -m scripts.transplant model=TEXT_TUNED text=TEXT_BASE vlm=VLM weight=0.5 out=OUT
    python -m scripts.transplant adapter=TEXT_LORA text=TEXT_BASE vlm=VLM carry=activations texts=TEXTS.txt out=OUT

Layers are found by the VLM family's own names and must have the same shapes; vision tower and projector stay as they
are. A config that computes otherwise is refused; rows of tokens go to the same token, and `carry` takes a LoRA to a VLM
that was made from another base of the family, with other tokens or not. An adapter becomes a PEFT folder, which plain
PEFT loads and scripts.merge takes with others of the VLM; a model becomes a checkpoint with manifest.json.
"""

from rich.console import Console

from moa.cli.command import command
from moa.merging.settings import TransplantConfig


def transplant(settings: TransplantConfig, console: Console) -> None:
    from moa.merging.transplant import transplant as run

    run(settings, console)


main = command(TransplantConfig, transplant, __doc__)

if __name__ == "__main__":
    main()
