"""What the callbacks of all trainers share."""

from __future__ import annotations

import pytest
import torch
from small_networks import batches, mlp
from torch.nn import functional as F

from growkernels.growth import FixedStep, NeuronScaling, insertions
from growkernels.integrations.growth_steps import GrowthSteps


def test_a_batch_that_overflows_is_recorded_again() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    steps = GrowthSteps(FixedStep([1]))
    for step, (x, y) in enumerate(batches(model, 3, 4), start=1):
        steps.watch(model, model)
        loss = F.cross_entropy(model(x), y) * 2.0**10
        steps.begin_pass(2.0**10)
        (loss * (torch.inf if step == 2 else 1)).backward()
        steps.end_pass()
        grew = steps.end_step(step, float(loss), model, optimizer)
        assert grew == (step == 3)
    assert steps.grown == [3]
    assert len(insertions(model)) == 1


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="batches is 0"):
        GrowthSteps(FixedStep([1]), batches=0)
    model = mlp()
    steps = GrowthSteps(FixedStep([1]), lambda module: NeuronScaling(module, "magnitude"))
    optimizer = torch.optim.Adam(model.parameters())
    assert not steps.end_step(1, 0.0, model, optimizer)
    steps.watch(model, model)
    steps.begin_pass()
    x, y = batches(model, 1, 4)[0]
    F.cross_entropy(model(x), y).backward()
    steps.end_pass()
    with pytest.raises(ValueError, match="needs budget="):
        steps.end_step(2, 0.0, model, optimizer)
