"""How large new neurons that change the function start: tried on copies of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from growkernels.growth.processes import Ranks

SCALES = tuple(2.0**-k for k in range(-2, 13))  # 4 down to 1 / 4096


def best_scale(
    model: nn.Module,
    grow: Callable[[nn.Module, float], None],
    loss: Callable[[nn.Module], float],
    ranks: Ranks,
) -> float:
    """The scale whose grown copy has the smallest loss, summed over the ranks.

    Args:
        grow: grows a copy of the model at a scale.
        loss: of a model, such as the mean over a few batches.

    Raises:
        RuntimeError: no scale lowers the loss.
    """

    device = next(model.parameters()).device

    def of(candidate: nn.Module) -> float:
        return ranks.sum(torch.tensor(float(loss(candidate)), device=device)).item()

    least, best = of(copy.deepcopy(model)), 0.0  # a batch norm in training mode notes what it sees
    rising = 0
    for scale in SCALES:
        grown = copy.deepcopy(model)
        grow(grown, scale)
        value = of(grown)
        rising = 0 if value < least else rising + 1
        if value < least:
            least, best = value, scale
        elif best and rising > 1:  # past the minimum
            break
    if not best:
        raise RuntimeError(
            "The new neurons lower the loss at no scale from 4 down to 1/4096, on the data of "
            "loss=. Record more batches, or grow fewer."
        )
    return best
