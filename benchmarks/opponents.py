"""Every opponent of the benchmarks, in the one place they are imported from.

An opponent is what a good user of plain PyTorch writes, or what a paper's authors do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from growkernels.experiments.sensli.authors_merits import ExtendedNetwork

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


def linear_norms(inputs: Tensors, grads: Tensors) -> Tensor:
    """Squared norms of dL/dW of y + W h at W = 0."""
    pairs = zip(inputs, grads, strict=True)
    return torch.stack([squared_norm(g.T @ h) for h, g in pairs])


def linear_accumulate(
    inputs: Tensors, grads: Tensors, buffers: Tensors, second_moments: Tensor
) -> Tensor:
    """`linear_relu_accumulate` without the mask."""
    norms = []
    for position, (h, g) in enumerate(zip(inputs, grads, strict=True)):
        gradient = g.T @ h
        second_moments[position] += squared_norm(gradient)
        buffers[position].add_(gradient)
        norms.append(squared_norm(buffers[position]))
    return torch.stack(norms)


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


def two_convolutions(
    x: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    include_basis: bool = True,
) -> Tensor:
    """basis_conv2d as a convolution, a 1x1 convolution for the mix, and cat."""
    maps = functional.conv2d(x, basis, None, stride, padding, dilation)
    mix = coeff[:, :, None, None]
    if not include_basis:
        return functional.conv2d(maps, mix, bias)
    if bias is None:
        return torch.cat([maps, functional.conv2d(maps, mix)], 1)
    filters = len(basis)
    mixed = functional.conv2d(maps, mix, bias[filters:])
    return torch.cat([maps + bias[:filters, None, None], mixed], 1)


def reconstructed(
    x: Tensor, basis: Tensor, coeff: Tensor, stride: int = 1, padding: int = 0
) -> Tensor:
    """basis_conv2d as one convolution with the whole kernel, which is built from basis and mix."""
    mixed = (coeff @ basis.flatten(1)).view(-1, *basis.shape[1:])
    return functional.conv2d(x, torch.cat([basis, mixed]), None, stride, padding)


def explicit_smallest_eigenvalues(x: Tensor, w: Tensor) -> Tensor:
    """Smallest eigenvalue of every splitting matrix x^T diag(w_i) x, each formed and solved, [n].

    One matrix at a time: all of DeiT-S's would take 900 MB, and are no faster batched.
    """
    return torch.stack([torch.linalg.eigh((x * weight[:, None]).T @ x)[0][0] for weight in w.T])


def explicit_smallest_eigenvalues_batched(x: Tensor, w: Tensor, at_a_time: int = 64) -> Tensor:
    """The same on a GPU, where several matrices at a time are formed and solved together, [n]."""
    values = []
    for weights in w.split(at_a_time, 1):
        matrices = (x.T * weights.T[:, None]) @ x
        values.append(torch.linalg.eigh(matrices)[0][:, 0])
    return torch.cat(values)


def authors_smallest_eigenvalues(x: Tensor, w: Tensor) -> Tensor:
    """The same as the code of Beyond Uniform Scaling does it: by a solver for any matrix, [n]."""
    return torch.stack(
        [torch.linalg.eig((x * weight[:, None]).T @ x)[0].real.min() for weight in w.T]
    )


def splitting_hvp(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """S_i v_i by two matrix products, w repeated for several vectors per neuron."""
    vectors = v.reshape(-1, x.shape[1])
    weights = w if v.dim() == 2 else w.repeat_interleave(v.shape[1], 1)
    return (((x @ vectors.T) * weights).T @ x).view(v.shape)


def splitting_hvp_projected(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """The same on a GPU by our own two kernels: w multiplied in the first product's epilogue."""
    from growkernels.ops.splitting import triton_launch, triton_tiles

    properties = torch.cuda.get_device_properties(x.device)
    generation = triton_tiles.generation((properties.major, properties.minor))
    out = torch.empty_like(v)
    triton_launch.projected(
        triton_launch.linear_product(x, w, v),
        out,
        triton_tiles.PROJECT[generation],
        triton_tiles.COMBINE[generation],
        properties.multi_processor_count,
    )
    return out


def splitting_hvp_conv2d(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """The same for 3x3 filters of padding 1: a convolution, and the vendor's weight gradient."""
    products = functional.conv2d(x, v, padding=1)
    result: Tensor = conv2d_weight(x, v.shape, products * w, padding=1)
    return result


def splitting_hvp_double_backward(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Neuron by neuron, as published code does: differentiate sum w (x . theta)^2 / 2 twice."""
    rows = []
    for weights, vector in zip(w.T, v, strict=True):
        theta = torch.zeros_like(vector, requires_grad=True)
        curvature = (weights * (x @ theta).square()).sum() / 2
        (slope,) = torch.autograd.grad(curvature, theta, create_graph=True)
        rows.append(torch.autograd.grad(slope, theta, vector)[0])
    return torch.stack(rows)


def splitting_hvp_functional(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """The same for all neurons at once: torch.func's vmap of jvp of grad."""

    def product(weights: Tensor, vector: Tensor) -> Tensor:
        def curvature(theta: Tensor) -> Tensor:
            return (weights * (x @ theta).square()).sum() / 2

        slope = torch.func.grad(curvature)
        along: Tensor = torch.func.jvp(slope, (torch.zeros_like(vector),), (vector,))[1]
        return along

    result: Tensor = torch.func.vmap(product, in_dims=(1, 0))(w, v)
    return result


def authors_merits(
    model: nn.Module, positions: Mapping[str, int], kind: str, inputs: Tensor, targets: Tensor
) -> Tensor:
    """SensLI's authors' merit pass over one batch, the extended network's construction included.

    `positions` maps module paths to widths. Returns the squared norms, [positions] float64.
    """
    extended = ExtendedNetwork(model, positions, kind)
    merits = extended.merits([(inputs, targets)], functional.cross_entropy)
    return torch.tensor(merits, dtype=torch.float64)
