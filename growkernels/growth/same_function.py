"""Whether a network computes after growing what it computed before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-6  # of the largest |output|


def outputs_in_eval_mode(model: nn.Module, sample: Any) -> Tensor:
    """model(sample) in eval mode without gradients; every module's mode is as before afterwards.

    Raises:
        TypeError: the output is not a tensor.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            output = model(*sample) if isinstance(sample, tuple) else model(sample)
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(output, Tensor):
        raise TypeError(
            f"The model returns a {type(output).__name__}; the check with `sample` needs a tensor."
        )
    return output


def check_same_output(before: Tensor, after: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raise RuntimeError unless max |after - before| is within tolerance * the largest |before|.

    Types with less precision are allowed four units in the last place.
    """
    tolerance = max(tolerance, 4 * torch.finfo(before.dtype).eps)
    error = float((after.double() - before.double()).abs().max())
    largest = float(before.double().abs().max())
    if not error <= tolerance * largest:
        raise RuntimeError(
            f"Growing would change the network's output by {error:.3g} (largest output "
            f"{largest:.3g}): its forward does more with the grown layer than pass on its output. "
            "Model and optimizer are as before."
        )
