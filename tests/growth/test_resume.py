"""Checkpoints of grown models: training goes on with the same bits."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from small_networks import batches, cnn, mlp, resnet
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from growkernels.growth import LayerInsertion, insertions, rebuild


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adamw(model: nn.Module) -> Optimizer:
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-2
    )


def train(model: nn.Module, optimizer: Optimizer) -> None:
    for x, y in batches(model, 3, 8):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def grow_once(model: nn.Module, optimizer: Optimizer) -> None:
    inserter = LayerInsertion(model)
    for x, y in batches(model, 2, 8):
        with inserter.recording():
            F.cross_entropy(model(x), y).backward()
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
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)
    for _ in range(3):
        train(model, optimizer)
        grow_once(model, optimizer)
        scheduler.step()
    train(model, optimizer)
    file = io.BytesIO()
    torch.save(
        {
            "insertions": insertions(model),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        },
        file,
    )
    train(model, optimizer)

    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    resumed = build()
    resumed_optimizer = build_optimizer(resumed)
    resumed_scheduler = torch.optim.lr_scheduler.StepLR(resumed_optimizer, 1, gamma=0.7)
    rebuild(resumed, checkpoint["insertions"], resumed_optimizer)
    resumed.load_state_dict(checkpoint["model"])
    resumed_optimizer.load_state_dict(checkpoint["optimizer"])
    resumed_scheduler.load_state_dict(checkpoint["scheduler"])
    assert insertions(resumed) == insertions(model)
    train(resumed, resumed_optimizer)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)

    # The optimizer may also be built after the rebuild: its order is the same.
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)  # the first optimizer took its tensors
    later = build()
    rebuild(later, checkpoint["insertions"])
    later_optimizer = build_optimizer(later)
    later.load_state_dict(checkpoint["model"])
    later_optimizer.load_state_dict(checkpoint["optimizer"])
    train(later, later_optimizer)
    for a, b in zip(model.parameters(), later.parameters(), strict=True):
        assert torch.equal(a, b)


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
