"""The oracle: the family's definitions in plain differentiable torch, one position at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from growkernels.ops.activations import ACTIVATIONS


def virtual_grads(
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    layer: str,
    *,
    activation: str = "tanh",
    scale: float = 1.0,
) -> list[Tensor]:
    """G at every position, in the dtype of the inputs (see `growkernels.virtual_grads`)."""
    return [_gradient(h, g, layer, activation, scale) for h, g in zip(inputs, grads, strict=True)]


def virtual_grad_norms(
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    layer: str,
    *,
    activation: str = "tanh",
    scale: float = 1.0,
) -> Tensor:
    """Squared Frobenius norms of G, [L] (see `growkernels.virtual_grad_norms`)."""
    gradients = virtual_grads(inputs, grads, layer, activation=activation, scale=scale)
    return torch.stack([G.square().sum() for G in gradients])


def _gradient(h: Tensor, g: Tensor, layer: str, activation: str, scale: float) -> Tensor:
    if layer == "linear":
        return g.flatten(0, -2).T @ h.flatten(0, -2)
    masked = torch.where(h <= 0, 0, g)
    if layer == "conv2d_relu":
        # Each tap of the kernel sees the zero-padded image shifted by one pixel.
        height, width = h.shape[-2:]
        padded = F.pad(h, (1, 1, 1, 1))
        taps = [
            torch.einsum("noyx,niyx->oi", masked, padded[..., y : y + height, x : x + width])
            for y in range(3)
            for x in range(3)
        ]
        return torch.stack(taps, dim=-1).reshape(*taps[0].shape, 3, 3)
    rows, grad_rows, masked_rows = (t.flatten(0, -2) for t in (h, g, masked))
    if layer == "linear_relu":
        return masked_rows.T @ rows
    return grad_rows.T @ ACTIVATIONS[activation](scale * rows)
