"""`train_step` by itself, as another loop than that of train.py would call it."""

import pytest
from accelerate.state import AcceleratorState

from moa.training.setup import make_accelerator, open_run
from moa.training.step import StepResult, train_step
from tests.support.toy import toy_config


def first_step(folder, drift: float | None) -> StepResult:
    """The first step with a proximal term around weights that are `drift` away; None: without one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = toy_config(folder, out=str(folder / f"run-{drift}"), stages={"joint": {"steps": 3}})
    run, state = open_run(config, make_accelerator(config))
    trainer = run.begin_stage(state)
    trained = [p for group in trainer.groups.values() for p in group.values()]
    anchors = [p.detach().clone() + (drift or 0.0) for p in trained]

    def proximal():
        pairs = zip(trained, anchors, strict=True)
        return sum(((p - anchor) ** 2).sum() for p, anchor in pairs) / 2

    extra = None if drift is None else proximal
    return train_step(trainer, next(run.steps()), 1, extra_loss=extra)


@pytest.mark.slow
def test_a_term_of_ones_own_adds_its_gradient_to_the_step(tmp_path):
    plain, still, pulled = (first_step(tmp_path, drift) for drift in (None, 0.0, 10.0))
    assert plain.problem is None and not plain.stopping and plain.metrics["samples"] == 4
    assert still.metrics == plain.metrics  # a proximal term has no gradient where it begins
    assert pulled.metrics["loss"] == plain.metrics["loss"]
    assert pulled.metrics["grad_norm"] > 10 * plain.metrics["grad_norm"]
