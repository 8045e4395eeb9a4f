"""Layers' weights as one row for each neuron, however a layer keeps them.

transformers' Conv1D (in GPT-2) is a linear layer whose weight is [inputs, outputs]. It has no
branches, because nothing of this package is made of it, but can be widened.
"""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn

from growkernels.nn.grown_layers import can_have_branches
from growkernels.nn.linear_from_conv1d import is_transposed_linear
from growkernels.nn.weights import current_value

# A Conv1D is none of these, and has the same ``weight`` and ``bias`` but for the order of axes.
Layer = nn.Linear | nn.Conv2d


def has_neurons(module: nn.Module) -> TypeGuard[Layer]:
    """Whether it is a linear layer or a convolution of images, of any subclass, or a Conv1D."""
    return isinstance(module, nn.Linear | nn.Conv2d) or is_transposed_linear(module)


def can_be_widened(module: nn.Module) -> TypeGuard[Layer]:
    """Whether what its forward does with its weights is known, by its exact type."""
    return can_have_branches(module) or is_transposed_linear(module)


def output_axis(layer: nn.Module) -> int:
    """The axis of its weight along which its outputs are; that of its inputs is the other of two.

    (Of a convolution's four, those of the kernel follow.)
    """
    return int(is_transposed_linear(layer))


def as_rows(layer: nn.Module, values: Tensor) -> Tensor:
    """Values in the shape of a layer's weight as [outputs, inputs, ...], and back again."""
    return values.T if output_axis(layer) else values


def rows_of(layer: Layer) -> Tensor:
    """The parameter itself as [outputs, inputs, ...]."""
    return as_rows(layer, layer.weight)


def current_rows(layer: Layer) -> Tensor:
    """The weight that an evaluation would compute with now, as [outputs, inputs, ...]."""
    return as_rows(layer, current_value(layer))


def resize(layer: Layer, axis: int, new: int) -> None:
    """Tell a layer that its weight has more outputs (axis 0) or inputs (axis 1)."""
    names = ("nf", "nx") if output_axis(layer) else ("out_features", "in_features")
    if isinstance(layer, nn.Conv2d):
        names = "out_channels", "in_channels"
    setattr(layer, names[axis], getattr(layer, names[axis]) + new)
