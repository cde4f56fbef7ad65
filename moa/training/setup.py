"""From a config to a run that is ready to train: accelerator, data, model, run folder, resume."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration

from data.digest import digest_sources
from data.sources import make_collator, open_mixture, open_ocr, open_sources
from moa.build import build_model, check_base, settled
from moa.checkpoint import CONFIG, TrainState, load_train_state, restore_model
from moa.config import RunConfig, load_config
from moa.evaluation.settings import check_gates, check_sources
from moa.sections import TrainConfig
from moa.training.batches import make_layout
from moa.training.distributed import zero
from moa.training.distributed.strategy import asked_for, check_sharding, is_zero_3, kind_of, whole
from moa.training.report import Reporter, mixture_table
from moa.training.run import Run
from moa.training.run_folder import begin, claim, on_main, stages_begun
from moa.training.stages import check_starts
from moa.training.trackers import start_trackers

MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
SETTLED = ("rank", "alpha", "use_rslora")  # of an expert, where its config leaves them out


def make_accelerator(config: RunConfig) -> Accelerator:
    """Accelerate as the launch file sets it; ValueError where that contradicts the run's settings."""
    check_launch(config.train)
    # every trained parameter takes part in every forward, and buffers are the same everywhere
    handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    deepspeed, on_cpu = asked_for("ACCELERATE_USE_DEEPSPEED"), not torch.cuda.is_available()
    if on_cpu and deepspeed:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        zero.compile_nothing()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # alone, a backend would be a mistake
            handlers.append(InitProcessGroupKwargs(backend="gloo"))
    return Accelerator(
        # with cpu=True Accelerate drops DeepSpeed; without it, it does not reduce the gradients on CPUs
        cpu=on_cpu and not deepspeed,
        # DeepSpeed autocasts by itself
        mixed_precision="no" if deepspeed else MIXED[config.train.precision],
        log_with=list(config.logging.trackers) or None,
        project_config=ProjectConfiguration(project_dir=config.out, logging_dir=config.out),
        kwargs_handlers=handlers,
    )


def check_launch(train: TrainConfig) -> None:
    """ValueError for settings of the launch file that this run has by other names, or not at all."""
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed not in ("no", MIXED[train.precision]):
        raise ValueError(
            f"mixed_precision: {mixed} in the launch file, train.precision={train.precision} in the "
            'run; the run decides: leave it "no" in the file'
        )
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation not in ("1", "auto"):
        raise ValueError(
            f"gradient_accumulation_steps: {accumulation} in the launch file; leave it out: it "
            f"follows from train.batch_size={train.batch_size} and train.micro_batch_size"
        )
    for name, variable in (("DeepSpeed", "DEEPSPEED"), ("FSDP2", "FSDP")):
        if train.precision == "fp16" and asked_for(f"ACCELERATE_USE_{variable}"):
            raise ValueError(f"train.precision: fp16 does not run under {name}; choices: bf16, fp32")


def open_run(
    config: RunConfig, accelerator: Accelerator, *, resume: bool = False, overwrite: bool = False
) -> tuple[Run, TrainState | None]:
    """A run at its start, or where its last checkpoint left it (`resume`, and there is one).

    ValueError for a folder that holds a run, a missing file, another config or data, and for what a later stage or the
    evaluation could not use. Nothing of an old run is removed until all is checked.
    """
    check_sharding(accelerator, config)
    if resume and os.path.isfile(os.path.join(config.out, CONFIG)):
        config = filled(config, load_config(Path(config.out) / CONFIG))
    else:
        config = settled(config)
    found = on_main(accelerator, lambda: claim(config, resume=resume, overwrite=overwrite))
    step = Path(found) if found else None
    torch.manual_seed(config.seed)
    model = build_model(config, experts=step / "experts" if step else None, to_train=True)
    ocr = open_ocr(config.data)
    run = Run(
        config=config,
        accelerator=accelerator,
        model=model,
        mixture=open_mixture(config, ocr),
        validation=open_sources(config.data.validation.values(), config.data, ocr),
        collator=make_collator(config, model.backbone.intake, pack_length=config.train.pack_length),
        reporter=Reporter(config, accelerator),
        layout=make_layout(config.train, accelerator.num_processes),
    )
    if config.train.gradient_checkpointing:
        model.enable_gradient_checkpointing(compare=not is_zero_3(accelerator))
    state = None
    with whole(model, config, write=True):
        check_starts(model, config, stages_begun(step))
    on_main(accelerator, lambda: check_evaluation(config))
    data = on_main(accelerator, lambda: digest_sources(run.mixture.sources, config.data))
    clear = overwrite and not resume
    on_main(accelerator, lambda: begin(config, data, found, clear=clear))
    if step is not None:
        with whole(model, config, write=True):  # ZeRO-3 may have sharded it while it was loaded
            restore_model(model, step, config)
        state = load_train_state(step)
        run.restore(state.progress)
        run.reporter.print(f"continues from {step}")
        if line := changed_launch(state.progress, run.progress()):
            run.reporter.print(line)
    run.reporter.print(
        f"{accelerator.num_processes} x {accelerator.device.type}, "
        f"{kind_of(accelerator)}, {config.train.precision}: "
        f"steps of {run.layout.accumulation} x {run.layout.micro_batch_size} samples each"
    )
    for sources, number in draws(config).items():
        run.reporter.print(mixture_table(run.mixture.only(sources), number))
    if config.logging.trackers:
        start_trackers(accelerator, config)
    return run, state


def filled(config: RunConfig, before: RunConfig) -> RunConfig:
    """The config with what the run settled at its start: its base, which is checked here, and experts' ranks."""
    model = replace(config.model, fingerprint=before.model.fingerprint or config.model.fingerprint)
    model = replace(model, fingerprint=check_base(model))
    experts = dict(config.experts)
    for name in experts.keys() & before.experts.keys():
        own, found = experts[name], before.experts[name]
        missing = [key for key in SETTLED if getattr(own, key) is None]
        experts[name] = replace(own, **{key: getattr(found, key) for key in missing})
    return replace(config, model=model, experts=experts)


def check_evaluation(config: RunConfig) -> None:
    """ValueError for data sets that eval.py could not open or score, and for gates that it does not have."""
    check_sources((config.eval.sources or config.data.validation).values(), config.eval.only or ())
    for gates in (config.eval.gates, *config.eval.compare):
        check_gates(gates, list(config.experts), config.router.granularity)
    open_sources(config.eval.sources.values(), config.data, None)


def changed_launch(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What a run keeps that continues with other processes, or shards its model in another way."""
    launches = [(saved["num_processes"], saved["distributed"]) for saved in (before, now)]
    if launches[0] == launches[1]:
        return ""
    was, became = (f"{number} x {kind}" for number, kind in launches)
    random = "random states too"
    if before["num_processes"] != now["num_processes"]:
        random = "random states do not, so dropout draws differ from here on"
    return (
        f"saved by {was}, goes on with {became}: experts, router, data position, learning rates and "
        f"the optimiser's moments and step counts carry over; {random}"
    )


def draws(config: RunConfig) -> Counter[tuple[str, ...] | None]:
    """How many samples the stages of each choice of sources draw together."""
    number: Counter[tuple[str, ...] | None] = Counter()
    for stage in config.stages.values():
        sources = tuple(stage.sources) if stage.sources is not None else None
        number[sources] += config.train.batch_size * stage.steps
    return number
