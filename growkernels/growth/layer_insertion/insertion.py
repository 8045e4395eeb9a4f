"""Growing a model by one identity layer; growing a model again the same way from its records."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growkernels.growth.neuron_scaling import growing
from growkernels.growth.layer_insertion.positions import Position, layers_before
from growkernels.growth.same_function import TOLERANCE
from growkernels.growth.surgery import (
    append_record,
    groups_for_new_layer,
    growth_records,
    insert_after,
    join_groups,
)
from growkernels.nn import identity_layer
from growkernels.nn.optimizer_surgery import undone_on_error


def insertions(model: nn.Module) -> list[dict[str, Any]]:
    """How a model has grown so far: its inserted layers and grown neurons, in order.

    Plain dicts of strings and numbers, made for checkpoints (``torch.load`` with
    ``weights_only=True`` takes them); ``rebuild`` reads them.
    """
    return growth_records(model)


def rebuild(
    model: nn.Module, records: Sequence[dict[str, Any]], optimizer: Optimizer | None = None
) -> None:
    """Repeat recorded growth on the base model, so that a checkpoint's states fit.

    ::

        model = build_base_model()
        optimizer = build_optimizer(model)
        rebuild(model, checkpoint["insertions"], optimizer)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])

    Raises:
        ValueError: a record that does not fit the model; model and optimizer are untouched.
    """
    with undone_on_error(model, optimizer):
        for number, record in enumerate(records):
            try:
                _repeat(model, record, optimizer)
            except KeyError as error:
                raise ValueError(
                    f"Record {number} of the growth has no {error}; pass what "
                    "gk.growth.insertions(model) gave, whole."
                ) from error


def _repeat(model: nn.Module, record: dict[str, Any], optimizer: Optimizer | None) -> None:
    if record["kind"] == growing.KIND:
        growing.apply(model, record, optimizer)
        return
    grow(
        model,
        Position(record["position"], record["kind"]),
        optimizer,
        width=record["width"],
        activation=record["activation"],
        scale=record["scale"],
    )


def grow(
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
    layers = layers_before(model, position.name)
    like = layers[0].weight if layers else sample
    new = identity_layer(
        position.kind,
        width,
        activation=activation,
        scale=scale,
        device=None if like is None else like.device,
        dtype=None if like is None else like.dtype,
    )
    if sample is not None:
        _check_identity(position, new, sample)
    groups = groups_for_new_layer(model, position.name, optimizer) if optimizer else None
    insert_after(model, position.name, new)
    if optimizer and groups:
        join_groups(model, new, optimizer, groups)
    record = {
        "position": position.name,
        "kind": position.kind,
        "width": width,
        "activation": activation,
        "scale": scale,
    }
    append_record(model, record)
    return new


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
