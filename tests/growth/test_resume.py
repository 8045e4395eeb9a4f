"""Checkpoints of grown models: training goes on with the same bits."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from small_networks import batches, cnn, mlp, resnet
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR
from training import adamw, check_that_training_resumes, record, train

from growkernels.growth import LayerInsertion, insertions, rebuild


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def grow_once(model: nn.Module, optimizer: Optimizer) -> None:
    inserter = LayerInsertion(model)
    record(inserter, batches(model, 2, 8))
    choice = inserter.select(inserter.merits())
    assert choice is not None
    inserter.insert(choice, optimizer)
    inserter.close()


@pytest.mark.parametrize("build_optimizer", [sgd, adamw])
@pytest.mark.parametrize("build", [mlp, resnet, cnn])
def test_resumed_training_is_bit_equal(
    build: Callable[[], nn.Sequential], build_optimizer: Callable[[nn.Module], Optimizer]
) -> None:
    model = build()
    optimizer = build_optimizer(model)
    scheduler = StepLR(optimizer, 1, gamma=0.7)
    data = batches(model, 3, 8)
    for _ in range(3):
        train(model, optimizer, data)
        grow_once(model, optimizer)
        scheduler.step()
    train(model, optimizer, data)
    check_that_training_resumes(model, optimizer, scheduler, build, build_optimizer, data)


def test_a_record_that_does_not_fit_changes_nothing() -> None:
    model = mlp()
    optimizer = sgd(model)
    good = {"position": "1", "kind": "linear_relu", "width": 5, "activation": "tanh", "scale": 0.8}
    with pytest.raises(ValueError, match=r"There is no module at 'x\.y'"):
        rebuild(model, [good, {**good, "position": "x.y"}], optimizer)
    assert len(list(model)) == 5
    assert insertions(model) == []
    assert len(optimizer.param_groups[0]["params"]) == 6
    with pytest.raises(ValueError, match="Record 1 of the growth has no 'width'; pass what"):
        rebuild(model, [good, {k: v for k, v in good.items() if k != "width"}], optimizer)
    assert insertions(model) == []


def test_records_that_were_handed_out_are_copies() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    records = [{"kind": "neurons", "form": "pair", "gain": 2.0, "depth": {"0": [1]}, "width": []}]
    rebuild(model, records)
    kept = copy.deepcopy(records)
    for given in (records, insertions(model)):
        given[0]["depth"]["0"].append(2)  # type: ignore[index]
        assert insertions(model) == kept
