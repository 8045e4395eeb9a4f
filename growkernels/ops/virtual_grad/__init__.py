"""Gradients of layers that do not exist yet, at every position of a network, in one call.

A layer that starts as the identity passes the gradient of its output through unchanged. So the
gradient of its own parameters follows from what the ordinary network already has at that position:
the activation h and dL/dh. With sigma an activation function and * elementwise:

    kind            the layer, at its identity     gradient G of its weight
    "linear_relu"   relu(W h),          W = I      (g * [h > 0])^T h
    "residual"      h + W sigma(s h),   W = 0      g^T sigma(s h)
    "conv2d_relu"   relu(conv(h, K)),   K = Dirac  weight gradient of conv for (h, g * [h > 0])
    "linear"        y + W h,            W = 0      g^T h

where h and g = dL/dh are [samples, width], or [N, C, H, W] for the 3 x 3 convolution of padding 1.
In a "linear" position h [samples, inputs] may be any features, y [samples, outputs] what the layer
adds to, and g = dL/dy: the gradient of every layer that starts at zero, and the cross-gradients by
which GradMax and TINY choose neurons. G is [outputs, inputs] there.
NaN in h counts as positive, as in the backward pass of torch's ReLU. Source: Kreis et al.,
"SensLI: Sensitivity-Based Layer Insertion for Neural Networks" (arXiv 2311.15995v2, 2025), where
the extended network is built to obtain the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from growkernels.ops.arguments import (
    check_names,
    check_numbers,
    check_optional_tensors,
    check_tensor_lists,
)
from growkernels.ops.virtual_grad import flops, vmap

__all__ = ["virtual_grad_norms", "virtual_grads"]

_ops = torch.ops.growkernels
_norms = _ops.virtual_grad_norms.default
_grads = _ops.virtual_grads.default
_accumulate = _ops.accumulate_virtual_grads.default
flops.register()
vmap.register()


def virtual_grad_norms(
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    layer: str,
    accumulate: Sequence[Tensor] | None = None,
    *,
    second_moments: Tensor | None = None,
    activation: str = "tanh",
    scale: float = 1.0,
) -> Tensor:
    """Squared Frobenius norm of the virtual layer's weight gradient at every position.

    Args:
        inputs: the activation h at each of L positions, [..., width] (leading dimensions are
            samples) or [N, C, H, W] for "conv2d_relu". Any strides; rows that are contiguous, and
            channels_last images, are read in place. Widths may differ between positions. float32,
            float64, bfloat16 or float16, one dtype and one device for all.
        grads: dL/dh at the same positions, in the shapes of `inputs`; for "linear" dL/dy, with the
            leading dimensions of the inputs and any last one.
        layer: the kind of virtual layer, see the module.
        accumulate: buffers G_sum, one per position, [width, width], [outputs, inputs] or
            [C, C, 3, 3], contiguous, in the dtype of the result. The gradient of this batch is
            added to them and the norms returned are those of the updated sums. SensLI's merit is
            the norm of the mean over B batches: divide by B^2.
        second_moments: with `accumulate` only: [L], to which the squared norm of this batch's own
            gradient is added, for the signal-to-noise ratio over batches.
        activation, scale: sigma ("tanh", "relu", "gelu", "silu" or "sigmoid") and s of the
            "residual" kind; the other kinds ignore them.

    Returns:
        [L], float64 for float64 inputs and float32 for all others, summed in that precision.
        On CPUs with AMX `torch.set_float32_matmul_precision("medium")` lets float32 factors be
        rounded to bfloat16, as torch does then (each product within some 2^-7 of itself); not
        those of convolutions. All else is computed in full.

    Differentiable in `inputs` and `grads`, twice, also under torch.func and in forward mode; not
    when accumulating. The norm alone never writes G to memory on the CPU. Raises ValueError for
    lists, shapes, devices or names that do not fit, TypeError for dtypes. NaN and inf propagate.
    """
    check_tensor_lists("virtual_grad_norms", inputs=inputs, grads=grads)
    check_names("virtual_grad_norms", layer=layer, activation=activation)
    check_numbers("virtual_grad_norms", scale=scale)
    if accumulate is None:
        if second_moments is not None:
            raise ValueError(
                "virtual_grad_norms: second_moments was given without accumulate; pass the "
                "buffers that the gradients are summed in as well"
            )
        norms: Tensor = _norms(inputs, grads, layer, activation, scale)
        return norms
    check_tensor_lists("virtual_grad_norms", accumulate=accumulate)
    check_optional_tensors("virtual_grad_norms", second_moments=second_moments)
    norms = _accumulate(inputs, grads, layer, activation, scale, accumulate, second_moments)
    return norms


def virtual_grads(
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    layer: str,
    out: Sequence[Tensor] | None = None,
    *,
    activation: str = "tanh",
    scale: float = 1.0,
) -> list[Tensor]:
    """The virtual layer's weight gradient G at every position.

    Arguments and errors are those of `virtual_grad_norms`. `out` takes buffers like `accumulate`
    there: the gradients are added to them, and the list of them is returned.

    Returns:
        L tensors, [width, width], [outputs, inputs] or [C, C, 3, 3], contiguous, float64 for
        float64 inputs and float32 for all others. Differentiable in `inputs` and `grads`, twice,
        without `out`.
    """
    check_tensor_lists("virtual_grads", inputs=inputs, grads=grads)
    check_names("virtual_grads", layer=layer, activation=activation)
    check_numbers("virtual_grads", scale=scale)
    if out is None:
        gradients: list[Tensor] = _grads(inputs, grads, layer, activation, scale)
        return gradients
    check_tensor_lists("virtual_grads", out=out)
    _accumulate(inputs, grads, layer, activation, scale, out, None)
    return list(out)
