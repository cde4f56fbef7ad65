"""Distil a run's routed mixture into ONE LoRA adapter that plain PEFT loads.

    python -m scripts.distill run=runs/demo rank=8 out=OUT
    python -m scripts.distill run=runs/demo rank=8 start=MERGED out=OUT            # from an adapter of scripts.merge
    python -m scripts.distill run=runs/demo answers=data loss=labels out=OUT       # a control: learns the data's labels

The teacher is the run at its own gates. It answers the prompts of the run's training data, without their answers, and
the student learns the probabilities of these tokens. OUT is a PEFT folder with distill_report.json: the losses, and how
often student and teacher agree on prompts of the validation sets, before and after. The same command continues a killed
one from its last saved step (OUT.steps).
"""

from rich.console import Console

from moa.cli.command import command
from moa.merging.settings import DistillConfig


def distill(settings: DistillConfig, console: Console) -> None:
    from moa.merging import distillation

    distillation.distill(settings, console)


main = command(DistillConfig, distill, __doc__, quiet=True)

if __name__ == "__main__":
    main()
