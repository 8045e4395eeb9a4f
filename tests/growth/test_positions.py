"""Which candidate positions are found, and how named ones get their kind."""

from __future__ import annotations

import pytest
import torch
from small_networks import cnn, mlp, resnet
from torch import Tensor, nn

from growkernels.growth import LayerInsertion, describe, find_positions
from growkernels.growth.layer_insertion.positions import named_positions
from growkernels.nn import Conv2dReLU, LinearReLU, ResidualBlock


def found(model: nn.Module) -> dict[str, str]:
    return {position.name: position.kind for position in find_positions(model)}


class HandWritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, 4)
        self.act1 = nn.ReLU()
        self.blocks = nn.ModuleList([ResidualBlock(4), ResidualBlock(4)])
        self.fc2 = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(self.fc1(x))
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.fc2(h)
        return out


def test_found_positions() -> None:
    assert found(mlp()) == {"1": "linear_relu", "3": "linear_relu"}
    assert found(resnet()) == {"1": "residual", "2": "residual", "3": "residual"}
    assert found(cnn()) == {"0.1": "conv2d_relu", "0.5": "conv2d_relu"}
    assert found(HandWritten()) == {"blocks.0": "residual", "blocks.1": "residual"}
    grown = nn.Sequential(LinearReLU(2, 3), nn.Sequential(LinearReLU(3, 3), nn.Dropout()))
    assert found(grown) == {"0": "linear_relu", "1.0": "linear_relu"}
    assert found(nn.Sequential(Conv2dReLU(3, 3, 3), nn.Conv2d(3, 3, 3))) == {"0": "conv2d_relu"}


def test_nested_sequentials_are_one_chain() -> None:
    stem = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    model = nn.Sequential(stem, nn.Sequential(ResidualBlock(3)), nn.Linear(3, 2))
    assert found(model) == {"0.1": "residual", "1.0": "residual"}
    assert found(nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU()))) == {"1.0": "linear_relu"}


def test_what_a_relu_acts_on_must_be_known() -> None:
    flattened = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten(), nn.ReLU(), nn.Linear(4, 2))
    assert found(flattened) == {}
    assert found(nn.Sequential(nn.Linear(2, 2), HandWritten(), nn.ReLU())) == {
        "1.blocks.0": "residual",
        "1.blocks.1": "residual",
    }


def test_named_positions() -> None:
    model = HandWritten()
    kinds = [(p.name, p.kind) for p in named_positions(model, ["act1", "blocks.1"])]
    assert kinds == [("act1", "linear_relu"), ("blocks.1", "residual")]
    assert named_positions(model, {"act1": "residual"})[0].kind == "residual"
    inserter = LayerInsertion(model, ["act1"])
    assert [p.name for p in inserter.positions] == ["act1"]


def test_bad_positions() -> None:
    model = HandWritten()
    with pytest.raises(ValueError, match="Position 'act9' is not in the model"):
        LayerInsertion(model, ["act9"])
    with pytest.raises(ValueError, match=r"'fc1' \(Linear\) cannot be inferred"):
        LayerInsertion(model, ["fc1"])
    with pytest.raises(ValueError, match="Unknown kind 'conv' for position 'act1'"):
        LayerInsertion(model, {"act1": "conv"})
    with pytest.raises(ValueError, match="positions is empty"):
        LayerInsertion(model, [])
    with pytest.raises(TypeError, match="list of module paths"):
        LayerInsertion(model, "act1")
    with pytest.raises(ValueError, match="No candidate positions were found"):
        LayerInsertion(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="No candidate positions were found"):
        LayerInsertion(mlp(), kinds=("conv2d_relu",))
    with pytest.raises(ValueError, match=r"Unknown kinds \['dense'\]"):
        LayerInsertion(mlp(), kinds=("dense",))
    with pytest.raises(ValueError, match="do not name both"):
        LayerInsertion(mlp(), ["1"], kinds=("linear_relu",))
    with pytest.raises(ValueError, match="Unknown norm 'l1'"):
        LayerInsertion(mlp(), norm="l1")
    relu = nn.ReLU()
    with pytest.raises(ValueError, match="'1' and '3' are the same module object"):
        LayerInsertion(nn.Sequential(nn.Linear(2, 2), relu, nn.Linear(2, 2), relu))
    with pytest.raises(ValueError, match="different activations"):
        LayerInsertion(nn.Sequential(ResidualBlock(2, "tanh"), ResidualBlock(2, "gelu")))


def test_a_module_in_several_places_is_no_position_and_said_to_be_none() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 4), nn.ReLU())
    x = torch.randn(2, 3)
    found = describe(model, x)
    assert found.possible("insert") == {"5": "linear_relu"}
    for path in ("1", "3"):
        assert "the same module is at '1' and '3'" in found.why_not(path)["insert"]
    assert [position.name for position in LayerInsertion(model, sample=x).positions] == ["5"]
