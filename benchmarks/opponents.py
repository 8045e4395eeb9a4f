"""Every opponent of the benchmarks, in the one place they are imported from.

An opponent is what a good user of plain PyTorch writes, or what a paper's authors do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight

Tensors = Sequence[Tensor]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile, static shapes; a graph break is an error."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def squared_norm(gradient: Tensor) -> Tensor:
    """Squared Frobenius norm, accumulated in float32 for 16-bit gradients."""
    dtype = torch.float32 if gradient.dtype.itemsize == 2 else None
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=dtype)
    return norm.square()


def linear_relu_gradients(inputs: Tensors, grads: Tensors) -> list[Tensor]:
    """dL/dW of relu(W h) at W = I, one position after the other."""
    return [((h > 0) * g).T @ h for h, g in zip(inputs, grads, strict=True)]


def linear_relu_norms(inputs: Tensors, grads: Tensors) -> Tensor:
    """Squared norms of `linear_relu_gradients`, keeping one gradient at a time."""
    pairs = zip(inputs, grads, strict=True)
    return torch.stack([squared_norm(((h > 0) * g).T @ h) for h, g in pairs])


def linear_relu_accumulate(
    inputs: Tensors, grads: Tensors, buffers: Tensors, second_moments: Tensor
) -> Tensor:
    """Squared norms of `buffers`, after adding the gradients; `second_moments` adds their norms."""
    norms = []
    for position, (h, g) in enumerate(zip(inputs, grads, strict=True)):
        gradient = ((h > 0) * g).T @ h
        second_moments[position] += squared_norm(gradient)
        buffers[position].add_(gradient)
        norms.append(squared_norm(buffers[position]))
    return torch.stack(norms)


def residual_tanh_norms(inputs: Tensors, grads: Tensors, scale: float) -> Tensor:
    """Squared norms of dL/dW2 of h + W2 tanh(scale h) at W2 = 0."""
    pairs = zip(inputs, grads, strict=True)
    return torch.stack([squared_norm(g.T @ torch.tanh(scale * h)) for h, g in pairs])


def conv2d_relu_norms(inputs: Tensors, grads: Tensors) -> Tensor:
    """Squared norms of the weight gradient of a 3x3 convolution by the vendor's own kernel.

    This is the kernel autograd runs for that gradient, without the forward pass autograd needs.
    """
    norms = []
    for h, g in zip(inputs, grads, strict=True):
        channels = h.shape[1]
        gradient = conv2d_weight(h, (channels, channels, 3, 3), (h > 0) * g, padding=1)
        norms.append(squared_norm(gradient))
    return torch.stack(norms)


def conv2d_relu_norms_autograd(inputs: Tensors, grads: Tensors) -> Tensor:
    """The same by inserting the Dirac layer: forward through it, backward to its weight."""
    norms = []
    for h, g in zip(inputs, grads, strict=True):
        channels = h.shape[1]
        weight = torch.zeros(channels, channels, 3, 3, dtype=h.dtype, device=h.device)
        torch.nn.init.dirac_(weight).requires_grad_()
        out = functional.relu(functional.conv2d(h, weight, padding=1))
        (gradient,) = torch.autograd.grad(out, weight, g)
        norms.append(squared_norm(gradient))
    return torch.stack(norms)


class ZeroResidual(nn.Module):
    """The authors' virtual residual layer, h + W2 tanh(W1 h) with W1 = scale I and W2 = 0."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.inner = nn.Parameter(scale * torch.eye(width))
        self.outer = nn.Parameter(torch.zeros(width, width))

    def forward(self, h: Tensor) -> Tensor:
        return h + functional.linear(torch.tanh(functional.linear(h, self.inner)), self.outer)


def extended_network_merits(
    model: nn.Module, blocks: str, width: int, scale: float, images: Tensor, labels: Tensor
) -> Tensor:
    """The authors' merit pass: extend a copy of the network, run it forward and backward whole.

    A zero layer follows every child of the Sequential `model.<blocks>`. As in the authors' code
    the gradients of all parameters are moved to the host, where the squared norms of the zero
    layers' W2 are taken. Returns [positions].
    """
    extended = copy.deepcopy(model)
    zero_layers = []
    for name, block in list(extended.get_submodule(blocks).named_children()):
        zero_layers.append(ZeroResidual(width, scale).to(images))
        extended.get_submodule(blocks).register_module(name, nn.Sequential(block, zero_layers[-1]))
    torch.autograd.backward(functional.cross_entropy(extended(images), labels))
    host = {
        parameter: parameter.grad.cpu().clone()
        for parameter in extended.parameters()
        if parameter.grad is not None
    }
    return torch.stack([squared_norm(host[layer.outer]) for layer in zero_layers])
