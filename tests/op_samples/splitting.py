"""The family of splitting matrices for the tests: samples of calls, and what they should give."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import growkernels as gk
from growkernels.ops.splitting import reference
from op_samples.table import Op, Sample, refused

# Every activation: its name, its beta, and the function itself as torch has it.
ACTIVATIONS: dict[str, tuple[str, float | None, Callable[[Tensor], Tensor]]] = {
    "gelu": ("gelu", None, F.gelu),
    "gelu_tanh": ("gelu_tanh", None, lambda z: F.gelu(z, approximate="tanh")),
    "silu": ("silu", None, F.silu),
    "tanh": ("tanh", None, torch.tanh),
    "sigmoid": ("sigmoid", None, torch.sigmoid),
    "softplus": ("softplus", None, F.softplus),
    "softplus beta 0.7": ("softplus", 0.7, lambda z: F.softplus(z, beta=0.7, threshold=200)),
    "relu as softplus": ("relu", 3.0, lambda z: F.softplus(z, beta=3.0, threshold=200)),
}


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def weight(*shape: int, name: str = "gelu") -> Sample:
    """Of one activation, over its whole curve."""
    activation, beta, _ = ACTIVATIONS[name]
    return Sample((shape, shape), {"activation": activation, "beta": beta}, (1.0, 3.0))


def product(rows: int, neurons: int, k: int, width: int) -> Sample:
    """Of k vectors for every neuron; without that dimension where k is 1."""
    vectors = (neurons, width) if k == 1 else (neurons, k, width)
    return Sample(((rows, width), (rows, neurons), vectors))


def convolution(
    images: tuple[int, int, int, int],
    filters: tuple[int, int, int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> Sample:
    """Images [N, C, H, W], and `filters` of (neurons, k, kh, kw)."""
    neurons, k, *kernel = filters
    sides = zip(images[2:], kernel, map(pair, (stride, padding, dilation)), strict=False)
    sliding = {"stride": stride, "padding": padding, "dilation": dilation}
    output = tuple(
        (side + 2 * pair(padding)[i] - pair(dilation)[i] * (taps - 1) - 1) // pair(stride)[i] + 1
        for i, (side, taps, _) in enumerate(sides)
    )
    count = (neurons,) if k == 1 else (neurons, k)
    shapes = (images, (images[0], neurons, *output), (*count, images[1], *kernel))
    return Sample(shapes, sliding)


# One element, odd sizes, edges of registers, several tiles and blocks of each.
PRODUCTS = [
    product(1, 1, 1, 1),
    product(5, 3, 1, 7),
    product(17, 20, 2, 16),
    product(300, 70, 1, 33),
    product(530, 101, 1, 49),
    product(270, 130, 4, 20),
    product(40, 3, 1, 1100),
]
CONVOLUTIONS = [
    convolution((2, 3, 5, 6), (4, 1, 3, 3), 1, 1, 1),
    convolution((3, 8, 9, 7), (5, 2, 3, 2), (2, 1), (0, 2), (1, 2)),
    convolution((2, 4, 4, 4), (3, 1, 1, 1), 1, 0, 1),
    convolution((2, 4, 5, 4), (3, 1, 1, 1), 2, 1, 1),
    convolution((30, 16, 4, 4), (33, 1, 3, 3), 1, 1, 1),
    convolution((1, 2, 3, 3), (2, 3, 3, 3), 1, 0, 1),
]
# Filters of 3 x 3 with a stride of 1, by the sizes of their outputs.
WINOGRAD = [
    convolution((1, 1, 1, 1), (1, 1, 3, 3), 1, 1),
    convolution((2, 3, 5, 6), (4, 1, 3, 3), 1, 1),
    convolution((3, 17, 9, 7), (5, 3, 3, 3), 1, 1),
    convolution((2, 16, 10, 10), (33, 2, 3, 3)),
    convolution((5, 20, 2, 15), (19, 1, 3, 3), 1, (2, 0)),
    convolution((3, 8, 2, 4), (70, 1, 3, 3), 1, (3, 2)),
    convolution((40, 32, 11, 10), (9, 1, 3, 3), 1, 1),  # several parts
    convolution((9, 256, 8, 8), (130, 1, 3, 3), 1, 1),  # the threads share every group of tiles
    convolution((4, 512, 4, 4), (240, 1, 3, 3), 1, 1),  # more neurons than one pass takes
]


def plain_product(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    vectors = v.reshape(-1, v.shape[-1])
    k = v.shape[1] if v.dim() == 3 else 1
    return (((x @ vectors.T) * w.repeat_interleave(k, 1)).T @ x).view(v.shape)


def plain_convolution(x: Tensor, w: Tensor, v: Tensor, **sliding: Any) -> Tensor:
    filters = v.reshape(-1, *v.shape[-3:])
    products = F.conv2d(x, filters, None, **sliding)
    products = products * w.repeat_interleave(filters.shape[0] // w.shape[1], 1)
    weights = torch.nn.grad.conv2d_weight(x, list(filters.shape), products, **sliding)
    return weights.view(v.shape)


def plain_weight(grad: Tensor, preact: Tensor, **arguments: Any) -> Tensor:
    return reference.splitting_weight(grad, preact, **arguments)


X, W, V = torch.ones(4, 3), torch.ones(4, 2), torch.ones(2, 3)
IMAGES, OUTPUT, FILTERS = torch.ones(1, 2, 5, 5), torch.ones(1, 3, 3, 3), torch.ones(3, 2, 3, 3)
FLOAT8 = X.to(torch.float8_e5m2)
bad_weight = partial(refused, gk.splitting_weight)
bad_product = partial(refused, gk.splitting_hvp)
bad_convolution = partial(refused, gk.splitting_hvp_conv2d)

BAD_WEIGHTS = {
    "activation": bad_weight(ValueError, "unknown activation 'swish'", X, X, "swish"),
    "relu": bad_weight(ValueError, "ReLU's second derivative is zero", X, X, "relu"),
    "beta not wanted": bad_weight(ValueError, "'gelu' takes none", X, X, beta=1.0),
    "beta": bad_weight(ValueError, "beta must be positive", X, X, "relu", beta=0.0),
    "nan beta": bad_weight(ValueError, "positive and finite", X, X, "relu", beta=math.nan),
    "shapes": bad_weight(ValueError, "they must be equal", X, X[:3]),
    "dtypes": bad_weight(TypeError, "cast them to one dtype", X, X.half()),
    "integers": bad_weight(TypeError, "preact has dtype Int", X.int(), X.int()),
    "number": bad_weight(
        TypeError, "splitting_weight: preact is a float; pass a torch.Tensor", X, 1.0
    ),
}
BAD_PRODUCTS = {
    "rows": bad_product(ValueError, "w has 3 rows but x has 4", X, W[:3], V),
    "neurons": bad_product(ValueError, "vectors for 1 neurons but w has 2", X, W, V[:1]),
    "length": bad_product(ValueError, "vectors of length 2 but x has", X, W, V[:, :2]),
    "x's dimensions": bad_product(ValueError, r"needs \[M, d\]", X[None], W, V),
    "w's dimensions": bad_product(ValueError, r"needs \[M, n\]", X, W[0], V),
    "v's dimensions": bad_product(ValueError, r"needs \[n, d\]", X, W, V[0]),
    "integers": bad_product(TypeError, "x has dtype Int", X.int(), W, V),
    "dtypes": bad_product(TypeError, "w has dtype Double but x", X, W.double(), V),
    "devices": bad_product(ValueError, "v is on meta but x", X, W, V.to("meta")),
    "array": bad_product(
        TypeError, "splitting_hvp: x is a ndarray; pass a torch.Tensor", np.ones((2, 3)), X, X
    ),
    "float8": bad_product(
        TypeError, "x has dtype Float8_e5m2; pass float16, bfloat16, float32 or float64",
        FLOAT8, X, X,
    ),
}  # fmt: skip
BAD_CONVOLUTIONS = {
    "images": bad_convolution(ValueError, r"needs \[N, C, H, W\]", IMAGES[0], OUTPUT, FILTERS),
    "output": bad_convolution(ValueError, r"needs \[N, n, Ho, Wo\]", IMAGES, OUTPUT[0], FILTERS),
    "filters": bad_convolution(ValueError, r"needs \[n, C, kh, kw\]", IMAGES, OUTPUT, FILTERS[0]),
    "batch": bad_convolution(
        ValueError, "w has 0 images but x has 1", IMAGES, OUTPUT[:0], FILTERS
    ),
    "channels": bad_convolution(
        ValueError, "filters of 1 channels", IMAGES, OUTPUT, FILTERS[:, :1]
    ),
    "neurons": bad_convolution(ValueError, "filters for 2 neurons", IMAGES, OUTPUT, FILTERS[:2]),
    "output size": bad_convolution(
        ValueError, "output has size 5 along dimension 2", IMAGES, OUTPUT, FILTERS, padding=1
    ),
    "filter too large": bad_convolution(
        ValueError, "does not fit into a padded image of size 5", IMAGES, OUTPUT, FILTERS,
        dilation=3,
    ),
    "no taps": bad_convolution(
        ValueError, "at least one tap", IMAGES, OUTPUT, FILTERS[..., :0]
    ),
    "stride": bad_convolution(ValueError, "stride must be from 1", IMAGES, OUTPUT, FILTERS, 0),
    "padding": bad_convolution(
        ValueError, "padding must be from 0", IMAGES, OUTPUT, FILTERS, 1, -1
    ),
    "three strides": bad_convolution(
        ValueError, r"stride is \(1, 1, 1\); pass an int or a pair of ints",
        IMAGES, OUTPUT, FILTERS, (1, 1, 1),
    ),
    "fractional stride": bad_convolution(
        ValueError, "pass an int or a pair of ints", IMAGES, OUTPUT, FILTERS, (1.5, 1)
    ),
    "no weights": bad_convolution(
        TypeError, "splitting_hvp_conv2d: w is a NoneType; pass a torch.Tensor",
        IMAGES, None, IMAGES,
    ),
}  # fmt: skip


def registered_weight(tensors: list[Tensor], arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*tensors, arguments["activation"], arguments["beta"])


def registered_convolution(tensors: list[Tensor], arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*tensors, *(list(pair(arguments[n])) for n in ("stride", "padding", "dilation")))


sizes = st.integers

OPS = [
    Op(
        name="splitting_weight",
        function=gk.splitting_weight,
        oracle=reference.splitting_weight,
        plain=plain_weight,
        registered=registered_weight,
        samples=[weight(37, 129, name=name) for name in ACTIVATIONS],
        few=[weight(7, 6, name=name) for name in ACTIVATIONS] + [weight(2, 5, 3, 4)],
        small=[weight(3, 4, name=name) for name in ACTIVATIONS],
        large=[weight(300, 700)],
        empty=[weight(*shape, name=name) for shape in ((0, 3), (3, 0)) for name in ACTIVATIONS],
        resized=lambda size: [weight(2, size, name="silu")],
        drawn=st.builds(
            lambda shape, name: weight(*shape, name=name),
            st.lists(sizes(0, 40), min_size=1, max_size=3),
            st.sampled_from(list(ACTIVATIONS)),
        ),
        bad=BAD_WEIGHTS,
        flops=[],
        promotes=True,
        keeps_layout=True,
    ),
    Op(
        name="splitting_hvp",
        function=gk.splitting_hvp,
        oracle=reference.splitting_hvp,
        plain=plain_product,
        registered=lambda tensors, arguments: tuple(tensors),
        samples=PRODUCTS,
        few=PRODUCTS[1:5],
        small=[product(5, 3, 1, 4), product(4, 2, 3, 2)],
        large=[product(3000, 40, 1, 64), product(600, 700, 1, 40)],
        empty=[
            product(0, 3, 1, 4), product(5, 3, 1, 0), product(5, 0, 1, 4),
            Sample(((5, 4), (5, 3), (3, 0, 4))), product(0, 0, 2, 0),
        ],
        resized=lambda size: [product(size, 2, 2, size + 1)],
        drawn=st.builds(product, sizes(0, 70), sizes(0, 40), sizes(1, 3), sizes(1, 50)),
        bad=BAD_PRODUCTS,
        poisoned=[product(30, 19, 1, 21)],
        flops=[(product(10, 3, 2, 4), 4 * 10 * 3 * 2 * 4, 0)],
    ),
    Op(
        name="splitting_hvp_conv2d",
        function=gk.splitting_hvp_conv2d,
        oracle=reference.splitting_hvp_conv2d,
        plain=plain_convolution,
        registered=registered_convolution,
        samples=CONVOLUTIONS,
        few=CONVOLUTIONS,
        small=[CONVOLUTIONS[5], convolution((2, 2, 4, 3), (2, 1, 3, 2), (2, 1), (1, 0))],
        large=[CONVOLUTIONS[4]],
        empty=[convolution((0, 2, 4, 4), (3, 1, 3, 3))],
        empty_for_torch=[
            convolution((1, 0, 4, 4), (3, 1, 3, 3)),
            convolution((1, 2, 4, 4), (0, 1, 3, 3)),
        ],
        resized=lambda size: [convolution((size, 2, size + 3, 6), (3, 1, 3, 3), 1, 1)],
        drawn=st.builds(
            convolution,
            st.tuples(sizes(0, 3), sizes(1, 12), sizes(5, 12), sizes(5, 12)),
            st.tuples(sizes(1, 12), sizes(1, 3), sizes(1, 3), sizes(1, 3)),
            st.tuples(sizes(1, 3), sizes(1, 3)),
            st.tuples(sizes(0, 2), sizes(0, 2)),
            st.tuples(sizes(1, 2), sizes(1, 2)),
        ),
        bad=BAD_CONVOLUTIONS,
        flops=[(CONVOLUTIONS[0], 4 * 2 * 5 * 6 * 4 * 3 * 3 * 3, 0)],
        convolved=[*CONVOLUTIONS, *WINOGRAD],
    ),
]  # fmt: skip
