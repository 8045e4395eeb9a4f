"""Inserting one identity layer, and the same again from a record."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growkernels.growth.layer_insertion.positions import KINDS, Position
from growkernels.growth.module_graph import weight_layers
from growkernels.growth.same_function import TOLERANCE
from growkernels.growth.surgery import groups_for_new_layer, insert_after, join_groups
from growkernels.nn import identity_layer
from growkernels.nn.record_fields import COUNT, FLAG, NUMBER, TEXT, one_of
from growkernels.nn.records import Record, new_record, repeats
from growkernels.nn.weights import weight_parameters
from growkernels.ops.activations import ACTIVATIONS


def insertion_record(position: Position, *, width: int, activation: str, scale: float) -> Record:
    """What `insert_identity` is called with, as a record."""
    called = {"relu_called": True} if position.relu_called else {}
    return new_record(
        position.kind, position=position.name, width=width, activation=activation, scale=scale,
        **called,
    )  # fmt: skip


@repeats(
    *KINDS,
    fields={
        "position": TEXT,
        "width": COUNT,
        "activation": one_of(tuple(ACTIVATIONS)),
        "scale": NUMBER,
        "relu_called": FLAG,
    },
)
def repeat_insertion(
    model: nn.Module, record: Mapping[str, Any], optimizer: Optimizer | None
) -> None:
    """Insert what a record says; not undone on error."""
    insert_identity(
        model,
        Position(record["position"], record["kind"], relu_called=record.get("relu_called", False)),
        optimizer,
        width=record["width"],
        activation=record["activation"],
        scale=record["scale"],
    )


def insert_identity(
    model: nn.Module,
    position: Position,
    optimizer: Optimizer | None,
    *,
    width: int,
    activation: str,
    scale: float,
    sample: Tensor | None = None,
) -> nn.Module:
    """Insert an identity layer and let its parameters join the optimizer; not undone on error.

    With ``sample``, an h of this position, the new layer is checked on it first.
    """
    # Under autocast h has another dtype than the parameters: those of the layer in front decide.
    layers = chain(*weight_layers(model, position.name))
    weights = [p for layer in layers for p in weight_parameters(layer)]
    like = weights[0] if weights else sample
    new: nn.Module = identity_layer(
        position.kind,
        width,
        activation=activation,
        scale=scale,
        device=None if like is None else like.device,
        dtype=None if like is None else like.dtype,
    )
    if position.relu_called:
        new = _without_relu(new)
    if sample is not None:
        _check_identity(position, new, sample)
    groups = groups_for_new_layer(model, position.name, optimizer) if optimizer else None
    place = position.name
    if position.relu_called:
        place = insert_after(model, place, nn.ReLU())
    insert_after(model, place, new)
    if optimizer and groups:
        join_groups(model, new, optimizer, groups)
    return new


def _without_relu(layer: nn.Module) -> nn.Module:
    """A LinearReLU or Conv2dReLU as a plain layer with the same parameters."""
    plain: nn.Linear | nn.Conv2d
    if isinstance(layer, nn.Conv2d):
        plain = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1, device="meta")
    else:
        assert isinstance(layer, nn.Linear)
        plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain


def _check_identity(position: Position, new: nn.Module, h: Tensor) -> None:
    # In float64, because TF32 and 16-bit arithmetic would blur what is a check of structure.
    exact = h.double()
    with torch.no_grad():
        error = float((copy.deepcopy(new).to(h.device).double()(exact) - exact).abs().max())
    if not error <= TOLERANCE * float(exact.abs().max()):
        raise RuntimeError(
            f"The new layer at {position.name!r} would not be the identity on the recorded h "
            f"(error {error:.3g}); a {position.kind} layer needs h >= 0 there. "
            "Model and optimizer are as before."
        )
