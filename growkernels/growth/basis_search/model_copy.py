"""Copies of a model to measure and train, which leave the model itself alone."""

from __future__ import annotations

import copy

from torch import Tensor, nn


def model_copy(model: nn.Module) -> nn.Module:
    """A deep copy, also where a module keeps a tensor that was computed.

    Pruning and hooks of weight norm set such a weight before each forward pass; torch refuses to
    copy it, and the copy computes its own.
    """
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, computed)
