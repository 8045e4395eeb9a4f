"""Whether a network computes after growing what it computed before."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from growkernels.nn.tracing import call, evaluating, tensors_in

TOLERANCE = 1e-6  # of the largest |output|


def outputs_in_eval_mode(model: nn.Module, sample: Any) -> list[Tensor]:
    """The floating-point tensors in what the model returns, in eval mode without gradients.

    Raises:
        TypeError: there is none.
    """
    with evaluating(model):
        output = call(model, sample)
    found = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
    if not found:
        raise TypeError(
            f"The model returns a {type(output).__name__} without a floating-point tensor; the "
            "check with `sample` needs one."
        )
    return found


def largest_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """max |after - before| over pairs of tensors; infinite where they are of other shapes."""
    if [t.shape for t in before] != [t.shape for t in after]:
        return math.inf
    changes = [
        (a.double() - b.double()).abs().max().cpu()
        for a, b in zip(before, after, strict=True)
        if a.numel()
    ]
    return float(torch.stack(changes).max()) if changes else 0.0  # of torch, for NaN


def check_same_output(
    before: Sequence[Tensor], after: Sequence[Tensor], tolerance: float = TOLERANCE
) -> None:
    """Raise RuntimeError unless max |after - before| is within tolerance * the largest |before|.

    Types with less precision are allowed four units in the last place.
    """
    tolerance = max([tolerance, *(4 * torch.finfo(tensor.dtype).eps for tensor in before)])
    error = largest_change(before, after)
    largest = largest_change([torch.zeros_like(tensor) for tensor in before], before)
    if not error <= tolerance * largest:
        raise RuntimeError(
            f"Growing would change the network's output by {error:.3g} (largest output "
            f"{largest:.3g}): its forward does more with the grown layer than pass on its output. "
            "Model and optimizer are as before."
        )


@contextmanager
def running_once(new: nn.Module, position: str) -> Iterator[None]:
    """Raise RuntimeError unless the module ran exactly once in the block."""
    runs: list[None] = []
    handle = new.register_forward_hook(lambda *_: runs.append(None))
    try:
        yield
    finally:
        handle.remove()
    if len(runs) != 1:
        raise RuntimeError(
            f"What was inserted behind {position!r} ran {len(runs)} times in one pass of the model "
            "instead of once: the forward does not run the modules there one after the other. "
            "Model and optimizer are as before."
        )
