"""Layers that can start as the identity map, so that inserting one keeps the network's function."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.nn.residual_block import ResidualBlock


class LinearReLU(nn.Linear):
    """relu(h Wᵀ + b) for h [..., in_features]; arguments and parameters are those of nn.Linear."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


class Conv2dReLU(nn.Conv2d):
    """relu(conv2d(h) + b) for h [N, C, H, W]; arguments and parameters are those of nn.Conv2d."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


def identity_layer(
    kind: str,
    width: int,
    *,
    activation: str = "tanh",
    scale: float = 0.8,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LinearReLU | Conv2dReLU | ResidualBlock:
    """A new layer that maps its input to itself, with a gradient that is not structurally zero.

    The initial values are those of SensLI (arXiv 2311.15995, section on virtual layers; the
    scale 0.8 is the one of the authors' experiments):

    * ``"linear_relu"``: W = I, b = 0. The identity on inputs >= 0, so it belongs after a ReLU.
    * ``"conv2d_relu"``: 3x3 Dirac kernel, padding 1, b = 0. As above, for [N, width, H, W].
    * ``"residual"``: h + W2 act(W1 h + b) with W2 = 0, W1 = scale * I, b = 0. Only W2 has a
      gradient at first. The identity on every input.

    ``activation`` and ``scale`` matter for ``"residual"`` only.

    Raises:
        ValueError: unknown kind, or a width below 1.
    """
    if width < 1:
        raise ValueError(f"width is {width}; a layer needs at least one feature.")
    # Built on the meta device first: no random numbers are drawn for values that are replaced.
    place = device or torch.get_default_device()
    if kind == "linear_relu":
        linear = LinearReLU(width, width, device="meta", dtype=dtype).to_empty(device=place)
        with torch.no_grad():  # nn.init.eye_ makes a matrix on the default device
            nn.init.zeros_(linear.weight).fill_diagonal_(1.0)
        nn.init.zeros_(linear.bias)
        return linear
    if kind == "conv2d_relu":
        conv = Conv2dReLU(width, width, 3, padding=1, device="meta", dtype=dtype)
        conv = conv.to_empty(device=place)
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(cast(Tensor, conv.bias))
        return conv
    if kind == "residual":
        return ResidualBlock.identity(
            width, activation=activation, scale=scale, device=place, dtype=dtype
        )
    raise ValueError(
        f"Unknown layer kind {kind!r}; choose 'linear_relu', 'conv2d_relu' or 'residual'."
    )
