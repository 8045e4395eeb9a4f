"""The oracle: the family's definitions in plain differentiable torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = int | tuple[int, int]


def second_derivative(z: Tensor, activation: str, beta: float | None = None) -> Tensor:
    """act''(z) of every activation `growkernels.splitting_weight` knows."""
    if activation == "gelu":
        density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return density * (2 - z * z)
    if activation == "gelu_tanh":
        scale, cubic = math.sqrt(2 / math.pi), 0.044715
        t = torch.tanh(scale * (z + cubic * z**3))
        first, second = scale * (1 + 3 * cubic * z * z), 6 * scale * cubic * z
        return (1 - t * t) * (first + 0.5 * z * (second - 2 * t * first * first))
    if activation == "tanh":
        t = torch.tanh(z)
        return -2 * t * (1 - t * t)
    slope = torch.sigmoid(z if beta is None else beta * z)
    bell = slope * (1 - slope)
    if activation == "sigmoid":
        return bell * (1 - 2 * slope)
    if activation == "silu":
        return bell * (2 + z * (1 - 2 * slope))
    if activation in ("softplus", "relu"):
        return bell if beta is None else beta * bell
    raise ValueError(f"unknown activation {activation!r}")


def splitting_weight(
    grad: Tensor, preact: Tensor, activation: str = "gelu", *, beta: float | None = None
) -> Tensor:
    """grad * act''(preact) (see `growkernels.splitting_weight`)."""
    return grad * second_derivative(preact, activation, beta)


def splitting_hvp(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """S_i v_i for all i (see `growkernels.splitting_hvp`)."""
    vectors = v if v.dim() == 3 else v.unsqueeze(1)
    projections = torch.einsum("md,nkd->mnk", x, vectors)
    products = torch.einsum("mnk,md->nkd", projections * w.unsqueeze(-1), x)
    return products.reshape(v.shape)


def splitting_hvp_conv2d(
    x: Tensor, w: Tensor, v: Tensor, stride: SIZE = 1, padding: SIZE = 0, dilation: SIZE = 1
) -> Tensor:
    """The same on the patches of images (see `growkernels.splitting_hvp_conv2d`)."""
    kernel = (v.shape[-2], v.shape[-1])
    columns = F.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride)
    patches = columns.transpose(1, 2).reshape(-1, columns.shape[1])
    weights = w.flatten(2).transpose(1, 2).reshape(-1, w.shape[1])
    return splitting_hvp(patches, weights, v.flatten(-3)).reshape(v.shape)
