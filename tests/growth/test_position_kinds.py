"""A layer is inserted where it is known what the axes of h are, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from growkernels.growth import LayerInsertion, find_positions
from growkernels.growth.layer_insertion.positions import named_positions
from growkernels.growth.neuron_scaling.candidates import find_candidates
from growkernels.nn import (
    Attention,
    BasisConv2d,
    Conv2dReLU,
    GrownConv2d,
    LinearReLU,
    ResidualBlock,
)
from growkernels.nn.grown_layers import Branch, with_branches


class View(nn.Module):
    """A reshape as people write it, without parameters or children."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), *self.shape)


class Transposing(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).transpose(-1, -2)


class Reversed(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return -super().forward(-input)


class OtherConvolution(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight, bias).flatten(2)


def replaced_forward() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: F.linear(x, layer.weight).T  # type: ignore[method-assign]
    return layer


def found(*modules: nn.Module) -> dict[str, str]:
    return {p.name: p.kind for p in find_positions(nn.Sequential(*modules))}


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "view": lambda: View(4, 4),
    "flatten": nn.Flatten,
    "unflatten": lambda: nn.Unflatten(1, (2, 2)),
    "conv1d": lambda: nn.Conv1d(4, 4, 3),
    "conv3d": lambda: nn.Conv3d(4, 4, 3),
    "conv_transpose1d": lambda: nn.ConvTranspose1d(4, 4, 3),
    "conv_transpose3d": lambda: nn.ConvTranspose3d(4, 4, 3),
    "lstm": lambda: nn.LSTM(4, 4),
    "gru": lambda: nn.GRU(4, 4),
    "embedding": lambda: nn.Embedding(4, 4),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "fold": lambda: nn.Fold((4, 4), 2),
    "unfold": lambda: nn.Unfold(2),
    "max_pool1d": lambda: nn.MaxPool1d(2),
    "glu": lambda: nn.GLU(1),
    "custom container": lambda: nn.ModuleList([nn.Linear(4, 4)]),
    "own forward": lambda: Transposing(4, 4),
    "own convolution": lambda: OtherConvolution(4, 4, 3),
    "forward of the object": replaced_forward,
    "bilinear": lambda: nn.Bilinear(4, 4, 4),
}


@pytest.mark.parametrize("between", UNKNOWN.values(), ids=UNKNOWN)
def test_no_position_behind_what_is_not_known(between: Callable[[], nn.Module]) -> None:
    assert found(nn.Linear(4, 4), between(), nn.ReLU()) == {}
    assert found(nn.Conv2d(4, 4, 3), between(), nn.ReLU()) == {}
    assert found(nn.Linear(4, 4), between(), nn.BatchNorm1d(4), nn.ReLU()) == {}
    assert found(nn.Linear(4, 4), nn.ReLU(), between(), nn.Linear(4, 4), nn.ReLU()) == {
        "1": "linear_relu",
        "4": "linear_relu",
    }


def test_pooling_mixes_features_but_not_channels() -> None:
    for pool in (nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Upsample(scale_factor=2), nn.ZeroPad2d(1)):
        assert found(nn.Conv2d(4, 4, 3), pool, nn.ReLU()) == {"2": "conv2d_relu"}
        assert found(nn.Linear(4, 4), pool, nn.ReLU()) == {}


def test_a_relu_of_its_own_kind_is_none() -> None:
    assert found(nn.Linear(4, 4), Reversed()) == {}


def normed() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(4, 4))


def branched(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    new = with_branches(layer)
    new.branches.append(Branch(layer, [1], "single"))
    return new


KNOWN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "linear": (lambda: nn.Linear(4, 4), "linear_relu"),
    "weight norm": (normed, "linear_relu"),
    "linear_relu": (lambda: LinearReLU(4, 4), "linear_relu"),
    "grown linear": (lambda: branched(nn.Linear(4, 4)), "linear_relu"),
    "residual": (lambda: ResidualBlock(4), "linear_relu"),
    "attention": (lambda: Attention(4, 2), "linear_relu"),
    "conv2d": (lambda: nn.Conv2d(4, 4, 3), "conv2d_relu"),
    "conv2d_relu": (lambda: Conv2dReLU(4, 4, 3), "conv2d_relu"),
    "grown conv2d": (lambda: branched(nn.Conv2d(4, 4, 3)), "conv2d_relu"),
    "basis": (lambda: BasisConv2d(4, 4, 3, 2), "conv2d_relu"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 3), "conv2d_relu"),
}


@pytest.mark.parametrize(("build", "kind"), KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize("norm", [nn.Identity, nn.Dropout, nn.PReLU, lambda: nn.GroupNorm(2, 4)])
def test_positions_behind_known_layers(
    build: Callable[[], nn.Module], kind: str, norm: Callable[[], nn.Module]
) -> None:
    for model in ((build(), nn.ReLU()), (build(), norm(), nn.ReLU())):
        assert found(*model)[str(len(model) - 1)] == kind
    assert isinstance(branched(nn.Conv2d(4, 4, 3)), GrownConv2d)


class HandWritten(nn.Module):
    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        for index, module in enumerate(modules):
            setattr(self, f"m{index}", module)
        self.act = nn.ReLU()


def test_a_named_relu_behind_what_is_not_known_needs_its_kind() -> None:
    def kind(*modules: nn.Module) -> str:
        return named_positions(HandWritten(*modules), ["act"])[0].kind

    assert kind(nn.Linear(4, 4), nn.LayerNorm(4)) == "linear_relu"
    assert kind(nn.Linear(4, 4), BasisConv2d(4, 4, 3, 2), nn.MaxPool2d(2)) == "conv2d_relu"
    assert kind(nn.Sequential(nn.Linear(4, 4), nn.Identity())) == "linear_relu"
    for between in UNKNOWN.values():
        with pytest.raises(ValueError, match=r"'act' \(ReLU\) cannot be inferred"):
            kind(nn.Linear(4, 4), between())
    with pytest.raises(ValueError, match=r"'act' \(ReLU\) cannot be inferred"):
        kind(nn.Linear(4, 4), HandWritten(nn.Conv2d(4, 4, 3)))
    first = nn.Module()
    first.act, first.fc, first.out = nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4)
    assert named_positions(first, ["act"])[0].kind == "linear_relu"
    first.conv = nn.Conv1d(4, 4, 3)
    with pytest.raises(ValueError, match=r"'act' \(ReLU\) cannot be inferred"):
        named_positions(first, ["act"])


def test_the_example_from_the_field() -> None:
    """A linear layer whose outputs become channels and a length: a new layer would mix lengths."""
    model = nn.Sequential(nn.Linear(6, 12), View(3, 4), nn.Conv1d(3, 2, 1), nn.ReLU())
    with pytest.raises(ValueError, match="No candidate positions were found"):
        LayerInsertion(model)


@pytest.mark.parametrize("layer", [nn.Conv1d(3, 2, 1), nn.Bilinear(4, 4, 4), nn.LSTM(4, 4)])
def test_a_named_position_joins_the_group_of_the_layer_in_front(layer: nn.Module) -> None:
    """Whatever kind of layer has the weights there."""
    from growkernels.growth.surgery import groups_for_new_layer

    model = nn.Module()
    model.front, model.act, model.head = layer, nn.ReLU(), nn.Linear(4, 2)
    optimizer = torch.optim.SGD(
        [{"params": list(layer.parameters()), "lr": 0.001}, {"params": model.head.parameters()}],
        lr=0.1,
    )
    assert [g["lr"] for g in groups_for_new_layer(model, "act", optimizer)] == [0.001, 0.001]


def test_this_package_s_layers_are_known_to_neuron_scaling() -> None:
    model = nn.Sequential(
        BasisConv2d(3, 6, 3, 2),
        Conv2dReLU(6, 4, 3),
        nn.Flatten(),
        LinearReLU(4, 4),
        ResidualBlock(4),
        nn.Linear(4, 2),
    )
    found, left_out = find_candidates(model, None, ("linear", "conv2d"), ())
    assert [candidate.name for candidate in found] == ["1", "3", "4.linear1", "4.linear2"]
    assert "filters are mixed out of few common ones" in left_out["0"]
