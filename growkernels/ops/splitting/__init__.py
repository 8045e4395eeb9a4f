"""Splitting matrices: the curvature that decides which neurons are worth adding, for all at once.

Let neuron i of a layer see the rows x_m and feed an activation function, z = theta_i . x_m. To
second order, splitting it into two neurons changes the loss by the quadratic form of its splitting
matrix

    S_i = sum_m w[m, i] x_m x_m^T,      w[m, i] = dL/d act(z)[m, i] * act''(z[m, i]),

so the sign of the smallest eigenvalue tells whether splitting it helps, and the eigenvector how.
Neither the S_i nor the products x_m . v_i are ever stored here. Source: Wu, Wang and Liu,
"Splitting Steepest Descent for Growing Neural Architectures" (2019), section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from growkernels.ops.arguments import check_names, check_numbers, check_tensors, pair
from growkernels.ops.splitting import flops, gpu, vmap
from growkernels.ops.splitting.gpu import wide_product

__all__ = ["splitting_hvp", "splitting_hvp_conv2d", "splitting_weight", "wide_product"]

_ops = torch.ops.growkernels
_weight = _ops.splitting_weight.default
_hvp = _ops.splitting_hvp.default
_hvp_conv2d = _ops.splitting_hvp_conv2d.default
flops.register()
vmap.register()
gpu.register()


def splitting_weight(
    grad: Tensor, preact: Tensor, activation: str = "gelu", *, beta: float | None = None
) -> Tensor:
    """w = grad * act''(preact), elementwise: the weights of the splitting matrices.

    Args:
        grad: dL/d act(preact), any shape. float32, float64, bfloat16 or float16.
        preact: the activation's input, of the same shape, dtype and device.
        activation: "gelu", "gelu_tanh" (its tanh approximation), "silu", "tanh", "sigmoid",
            "softplus", or "relu".
        beta: sharpness of "softplus", log(1 + exp(beta z)) / beta; 1 when not given. "relu" has no
            second derivative, so it needs a surrogate: it is treated as softplus of the beta given
            (Wu et al. take 3). Other activations take none.

    Returns:
        w, shaped like `preact`. Differentiable in `grad` and `preact`, twice, also under torch.func
        and in forward mode. Raises ValueError for shapes, devices and names that do not fit,
        TypeError for dtypes. NaN and inf propagate.
    """
    check_tensors("splitting_weight", grad=grad, preact=preact)
    check_names("splitting_weight", activation=activation)
    if beta is not None:
        check_numbers("splitting_weight", beta=beta)
    w: Tensor = _weight(grad, preact, activation, beta)
    return w


def splitting_hvp(x: Tensor, w: Tensor, v: Tensor, *, full_precision: bool = False) -> Tensor:
    """y_i = S_i v_i for all n neurons at once, S_i = sum_m w[m, i] x_m x_m^T (no 1/M).

    Args:
        x: [M, d], the layer's inputs. float32, float64, bfloat16 or float16, any strides.
        w: [M, n], see `splitting_weight`; the dtype and device of `x`.
        v: [n, d], one vector for each neuron, or [n, k, d], k vectors for each.
        full_precision: do not follow torch's setting for float32 matrix products, which otherwise
            allows to round factors: to bfloat16 on CPUs with AMX under
            `torch.set_float32_matmul_precision("medium")`, to TF32 on GPUs. Eigensolvers ask for
            it, as rounded products do not converge to 1e-4.

    Returns:
        y, shaped like `v`, contiguous, in the dtype of the inputs; 16-bit inputs are summed in
        float32. Differentiable in x, w and v, twice, also under torch.func and in forward mode.
        Raises ValueError for shapes and devices that do not fit, TypeError for dtypes. NaN and inf
        propagate.
    """
    check_tensors("splitting_hvp", x=x, w=w, v=v)
    y: Tensor = _hvp(x, w, v, full_precision=full_precision)
    return y


def splitting_hvp_conv2d(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """`splitting_hvp` for the filters of a convolution: the rows are the patches of images.

    Args:
        x: [N, C, H, W], the convolution's input, any strides; dtypes as in `splitting_hvp`.
        w: [N, n, Ho, Wo], where Ho x Wo is the size of the convolution's output.
        v: [n, C, kh, kw], or [n, k, C, kh, kw] for k filters for each neuron.
        stride, padding, dilation: of the convolution, one number or (vertical, horizontal).

    Returns:
        y, shaped like `v`. Derivatives and errors as in `splitting_hvp`.

    On the CPU, 3 x 3 filters with stride and dilation 1 in float32 go through Winograd's algorithm
    where it is faster; `set_conv_algorithm` decides otherwise and states the rounding error.
    """
    check_tensors("splitting_hvp_conv2d", x=x, w=w, v=v)
    y: Tensor = _hvp_conv2d(
        x,
        w,
        v,
        pair("splitting_hvp_conv2d: stride", stride),
        pair("splitting_hvp_conv2d: padding", padding),
        pair("splitting_hvp_conv2d: dilation", dilation),
    )
    return y
