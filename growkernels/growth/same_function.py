"""Whether a network computes after growing what it computed before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-6  # of the largest |output|


def arguments(sample: Any) -> tuple[Any, ...]:
    """What a model is called with: the sample, or several arguments if it is a tuple."""
    return sample if isinstance(sample, tuple) else (sample,)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's mode is as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def outputs_in_eval_mode(model: nn.Module, sample: Any) -> Tensor:
    """model(sample) in eval mode without gradients.

    Raises:
        TypeError: the output is not a tensor.
    """
    with evaluating(model):
        output = model(*arguments(sample))
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
