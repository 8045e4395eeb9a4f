"""A study's training by two processes together is that of one on the whole batches."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks, raised
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "experiments"))

import tiny_scaling_study

from growkernels.experiments.image_training import train_epoch
from growkernels.experiments.images.synthetic_images import synthetic_images
from growkernels.experiments.scaling.training import ScalingTraining
from growkernels.growth import insertions


def growing(rank: int) -> dict[str, Any]:
    """Without dropped paths, which are other ones for each part of a batch."""
    setting = tiny_scaling_study.setting(drop_path=0.0)
    images = synthetic_images(40, 20, torch.Generator().manual_seed(1))
    training = ScalingTraining(setting, setting.variant("splitting"), 0, images)
    for step in range(setting.epochs):
        training.advance(step)
    steps = training.measured["steps"]
    return {
        "losses": torch.tensor(steps["loss"] + [loss for loss in steps["test_loss"] if loss]),
        "parameters": steps["parameters"],
        "records": insertions(training.model),
        "values": [p.detach() for p in training.model.parameters()],
    }


def uneven(rank: int) -> dict[str, Any]:
    """A batch of five for two; and one that is too small."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(5, 4), torch.arange(5) % 3
    cpu = torch.device("cpu")

    def epoch(data: list[tuple[Tensor, Tensor]]) -> float:
        return train_epoch(model, optimizer, data, cpu, by_image=True)

    loss = epoch([(x, y), (x[:3], y[:3])])
    values = copy.deepcopy(list(model.parameters()))
    return {"loss": loss, "values": values, "small": raised(lambda: epoch([(x[:1], y[:1])]))}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    checks = {"growing": growing, "uneven": uneven}
    return on_ranks(checks, 2, tmp_path_factory.mktemp("together"))


def test_a_training_that_grows(found: dict[str, list[Any]]) -> None:
    alone = growing(0)
    assert len(alone["records"]) == 1
    for told in found["growing"]:
        torch.testing.assert_close(told["losses"], alone["losses"], rtol=1e-4, atol=0)
        assert told["parameters"] == alone["parameters"]
        assert told["records"] == alone["records"]
    # Not those of one process: Adam moves what has no gradient but rounding (biases of keys).
    mine, other = found["growing"]
    for one, two in zip(mine["values"], other["values"], strict=True):
        assert torch.equal(one, two)


def test_batches_that_cannot_be_halved(found: dict[str, list[Any]]) -> None:
    alone = uneven(0)
    assert alone["small"] == "nothing"
    for told in found["uneven"]:
        assert told["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        assert "A batch of 1 images cannot be shared out among 2 processes" in told["small"]
        for mine, expected in zip(told["values"], alone["values"], strict=True):
            torch.testing.assert_close(mine, expected)
