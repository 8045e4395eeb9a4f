"""Convolutions whose weights a model reads without calling them become no basis convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.growth import BasisSearch, describe
from growkernels.nn import BasisConv2d, convert


class Reading(nn.Module):
    """conv2 runs by its weight alone, conv3 is asked for its weight's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.conv3, self.depthwise = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv2d(self.conv1(x), self.conv2.weight)
        out: Tensor = self.conv3(self.depthwise(h).to(self.conv3.weight.dtype))
        return out


X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def test_they_are_left_out_with_a_reason() -> None:
    model = Reading()
    assert "conv2" in BasisSearch(model).candidates
    search = BasisSearch(model, sample=X)
    assert list(search.candidates) == ["conv1", "conv3"]
    assert search.left_out["conv2"] == "Its weight is also used in the model's own forward."
    assert "groups=8" in search.left_out["depthwise"]
    found = describe(model, X)
    assert set(found.possible("basis")) == {"conv1", "conv3"}
    assert found.why_not("conv2")["basis"] == "its weight is also used in the model's own forward"
    with pytest.raises(ValueError, match="'conv2' cannot be a candidate: Its weight is also used"):
        BasisSearch(model, layers=["conv2"], sample=X)


def test_convert_checks_on_a_sample() -> None:
    model = Reading()
    before = model.conv1, model.conv2, model.conv3
    with pytest.raises(ValueError, match=r"'conv2' cannot be converted\. Its weight is also used"):
        convert(model, {"conv1": 2, "conv2": 2}, sample=X)
    with pytest.raises(ValueError, match="does not run on the sample with 'conv1', 'conv3'"):
        convert(model, {"conv1": 2, "conv3": 2}, sample=X)
    with pytest.raises(ValueError, match="The model raises RuntimeError on the sample"):
        convert(model, {"conv1": 2}, sample=X[:, :2])
    assert (model.conv1, model.conv2, model.conv3) == before
    done = convert(model, {"conv1": 2}, sample=X)
    assert list(done.converted) == ["conv1"]
    assert isinstance(model.conv1, BasisConv2d)
    assert model(X).isfinite().all()
