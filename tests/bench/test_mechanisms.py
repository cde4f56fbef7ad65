"""The benchmark of mechanisms runs each, on the model that its baseline has."""

import pytest
import torch

from bench.contenders import frozen
from bench.mechanisms import MECHANISMS, contender
from tests.bench.test_contenders import SETTING


@pytest.mark.slow
def test_every_mechanism_has_the_loss_of_the_frozen_model_before_its_first_step():
    expected = frozen(SETTING).forward()
    for name, mechanism in MECHANISMS.items():
        found = contender(SETTING, mechanism)
        if mechanism.losses:
            assert found.forward() > expected, name
        else:
            torch.testing.assert_close(found.forward(), expected, msg=lambda text, name=name: f"{name}: {text}")
