"""Shares of a step's time: all of it, each op in its kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.step_shares import KINDS, shares
from growkernels.nn import BasisConv2d


def test_all_time_is_shared_out_and_ops_are_of_their_kinds() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), BasisConv2d(8, 8, 3, 4))
    images = torch.randn(2, 3, 12, 12)
    milliseconds, found = shares(lambda: model(images).square().sum().backward())
    assert milliseconds > 0
    assert sum(found.values()) == pytest.approx(100)
    present = {
        "ours, backward", "ours, forward", "torch's convolutions, backward",
        "torch's convolutions, forward", "batch norm", "ReLU",
    }  # fmt: skip
    assert all(found[kind] > 0 for kind in present)
    assert set(found) == {*KINDS, "rest"}
    assert found["optimizer"] == 0
