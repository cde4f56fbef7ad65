"""The loop of a run: stages -> step -> log -> validate -> save; train.py is its command line."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is loaded once the command line is read
    from moa.checkpoint import TrainState
    from moa.config import RunConfig
    from moa.training.run import Run


def train(run: "Run", state: "TrainState | None") -> None:
    """Run all stages, or what a checkpoint's `state` leaves of them, until they are done or a signal stops the run.
    Raises TrainingError, BadSampleError or OSError where it cannot continue; the last checkpoint is whole."""
    from moa.training.step import train_step

    with run.reporting():
        while not run.done and not run.stopping:
            # weights to start from -> trainable groups -> optimiser -> one process, DDP, ZeRO or FSDP2
            trainer = run.begin_stage(state)
            state = None
            for micro_batches in run.steps():
                # forward, backward, check, clip, update
                result = train_step(trainer, micro_batches, run.stage_step, stop=run.stop.is_set)
                run.log(result)
                improved = run.validation_due and run.validate()
                run.end_stage()
                if improved or run.save_due:
                    run.save(trainer, improved)
                if run.stopping:
                    break
            if run.done:
                run.write_statistics()
            trainer.close()


def train_here(config: "RunConfig") -> None:
    """A whole run in this process, which may have trained others before."""
    from accelerate.state import AcceleratorState

    from moa.training.setup import make_accelerator, open_run

    AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier run, maybe of another precision
    accelerator = make_accelerator(config)
    run, state = open_run(config, accelerator)
    train(run, state)
    accelerator.end_training()
