"""The family of virtual gradients for the tests: samples of calls, and what they should give."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import growkernels as gk
from growkernels.ops.virtual_grad import reference
from op_samples.table import Op, Sample, refused

KINDS = [
    ("linear_relu", "tanh", 1.0),
    ("residual", "tanh", 0.8),
    ("residual", "relu", 1.0),
    ("residual", "gelu", 1.3),
    ("residual", "silu", 1.0),
    ("residual", "sigmoid", -0.5),
    ("linear", "tanh", 1.0),
    ("conv2d_relu", "tanh", 1.0),
]
LAYERS = [KINDS[0], KINDS[1], KINDS[-2], KINDS[-1]]
# Ragged widths on purpose: one register, one vector and a bit, several tiles of G and of samples.
LINEAR = [(450, 5), (1, 1), (7, 16), (129, 33), (3, 4, 20), (50, 401), (4100, 9)]
IMAGES = [(2, 3, 5, 5), (1, 4, 1, 1), (3, 16, 8, 6)]
WINOGRAD = [
    (1, 1, 1, 1),
    (2, 3, 5, 6),
    (3, 17, 9, 7),
    (5, 20, 4, 13),
    (40, 32, 11, 10),  # several parts
    (9, 200, 8, 8),  # the threads share every group of tiles
]


def positions(
    shapes: Sequence[tuple[int, ...]],
    layer: str = "linear_relu",
    activation: str = "tanh",
    scale: float = 1.0,
) -> Sample:
    arguments = {"layer": layer, "activation": activation, "scale": scale}
    name = f"{layer} {activation} {scale} of {len(shapes)}, {shapes[0]}"
    of_grads = shapes
    if layer == "linear":  # more outputs than inputs, and fewer
        of_grads = [(*s[:-1], s[-1] // 3 if s[-1] > 100 else 2 * s[-1] + 3) for s in shapes]
    return Sample((*shapes, *of_grads), arguments, name=name)


def of_kinds(
    kinds: Sequence[tuple[str, str, float]],
    linear: Sequence[tuple[int, ...]],
    images: Sequence[tuple[int, ...]],
) -> list[Sample]:
    return [positions(images if kind[0] == "conv2d_relu" else linear, *kind) for kind in kinds]


def plain_torch(
    inputs: list[Tensor], grads: list[Tensor], layer: str, activation: str, scale: float
) -> list[Tensor]:
    return [
        plain_gradient(h, g, layer, activation, scale) for h, g in zip(inputs, grads, strict=True)
    ]


def plain_gradient(h: Tensor, g: Tensor, layer: str, activation: str, scale: float) -> Tensor:
    if layer == "linear":
        return g.flatten(0, -2).T @ h.flatten(0, -2)
    masked = torch.where(h > 0, g, 0)
    if layer == "conv2d_relu":
        size = (h.shape[1], h.shape[1], 3, 3)
        return torch.nn.grad.conv2d_weight(h, size, masked, padding=1)
    rows, grad_rows = h.flatten(0, -2), g.flatten(0, -2)
    if layer == "linear_relu":
        return masked.flatten(0, -2).T @ rows
    return grad_rows.T @ reference.ACTIVATIONS[activation](scale * rows)


def wide(tensor: Tensor) -> Tensor:
    """In the dtype of sums."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def plain_norms(inputs: list[Tensor], grads: list[Tensor], **params: Any) -> Tensor:
    gradients = plain_torch(inputs, grads, **params)
    return torch.stack([wide(gradient).square().sum() for gradient in gradients])


def registered(tensors: list[Tensor], arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    half = len(tensors) // 2
    return (tensors[:half], tensors[half:], *arguments.values())


def squares_of_kernels(sample: Sample) -> int:
    """Gradients of convolutions are squared and added by torch's dot product, others by ours."""
    if sample.arguments["layer"] != "conv2d_relu":
        return 0
    return max(9 * shape[1] ** 2 for shape in sample.shapes)


def samples_of_positions(sample: Sample) -> int:
    """Rows of linear positions, of which few columns leave a vendor's product its own order."""
    if sample.arguments["layer"] == "conv2d_relu":
        return 0
    return max(math.prod(shape[:-1]) for shape in sample.shapes)


H = torch.ones(4, 3)
FLOAT8 = H.to(torch.float8_e5m2)
bad = partial(refused, gk.virtual_grad_norms)
BAD = {
    "no positions": bad(ValueError, "list of inputs is empty", [], [], "residual"),
    "list lengths": bad(ValueError, "got 2 inputs but 1 grads", [H, H], [H], "residual"),
    "shapes": bad(ValueError, r"shape \[4, 3\] but grads\[0\]", [H], [H[:2]], "residual"),
    "samples of a linear position": bad(
        ValueError, "same leading dimensions", [H], [H[:2]], "linear"
    ),
    "dimensions of a linear position": bad(
        ValueError, "same leading dimensions", [H[0]], [H[0]], "linear"
    ),
    "kind": bad(ValueError, "unknown layer 'dense'", [H], [H], "dense"),
    "dimensions": bad(ValueError, "at least one leading", [H[0]], [H[0]], "residual"),
    "images": bad(ValueError, r"needs \[N, C, H, W\]", [H], [H], "conv2d_relu"),
    "integers": bad(TypeError, "dtype Int", [H.int()], [H.int()], "residual"),
    "dtypes": bad(TypeError, "cast all positions", [H], [H.double()], "residual"),
    "positions' dtypes": bad(
        TypeError, r"inputs\[1\]", [H, H.half()], [H, H.half()], "residual"
    ),
    "float8": bad(
        TypeError, "has dtype Float8_e5m2; pass float16, bfloat16, float32 or float64",
        [FLOAT8], [H], "residual",
    ),
    "devices": bad(ValueError, "grads.0. is on meta", [H], [H.to("meta")], "residual"),
    "activation": bad(
        ValueError, "unknown activation 'softmax'", [H], [H], "residual", activation="softmax"
    ),
    "scale": bad(
        ValueError, "scale must be finite", [H], [H], "residual", scale=float("nan")
    ),
    "second moments alone": bad(
        ValueError, "without accumulate", [H], [H], "residual", second_moments=torch.zeros(1)
    ),
    "second moments": bad(
        ValueError, "one entry for each of 1 positions", [H], [H], "residual",
        [torch.zeros(3, 3)], second_moments=torch.zeros(2),
    ),
    "buffers": bad(ValueError, "got 0 buffers", [H], [H], "residual", []),
    "buffer shape": bad(ValueError, r"has shape \[3, 3\]", [H], [H], "residual", [H]),
    "buffer dtype": bad(
        TypeError, "accumulated in Float",
        [H.half()], [H.half()], "residual", [torch.zeros(3, 3).half()],
    ),
    "buffer strides": bad(
        ValueError, "not contiguous", [H], [H], "residual", [torch.zeros(3, 6)[:, ::2]]
    ),
    "buffers that overlap": bad(
        ValueError, "share memory", [H, H], [H, H], "residual", [torch.zeros(3, 3)] * 2
    ),
    "buffer grad": bad(
        ValueError, "not differentiable",
        [H], [H], "residual", [torch.zeros(3, 3, requires_grad=True)],
    ),
    "one tensor": bad(
        TypeError,
        "virtual_grad_norms: inputs is a Tensor; pass a list of tensors, one for every position",
        H, [H], "linear_relu",
    ),
}  # fmt: skip

drawn = st.builds(
    lambda sizes, kind: positions(sizes, *kind),
    st.lists(st.tuples(st.integers(0, 70), st.integers(1, 50)), min_size=1, max_size=5),
    st.sampled_from(KINDS[:-1]),
) | st.builds(
    lambda sizes: positions(sizes, "conv2d_relu"),
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9)),
        min_size=1,
        max_size=3,
    ),
)

SHARED: dict[str, Any] = {
    "registered": registered,
    "samples": of_kinds(KINDS, LINEAR, IMAGES),
    "few": of_kinds(LAYERS, LINEAR[:5], IMAGES),
    "small": of_kinds(KINDS, [(5, 3), (4, 2)], [(2, 2, 3, 3)]),
    "large": of_kinds(LAYERS, [(9000, 64), (700, 500), (30, 5)], [(4, 40, 12, 12)]),
    "empty": [
        *(
            positions([shape, (3, 2)], *kind)
            for shape in ((0, 4), (5, 0), (0, 0), (2, 3, 0), (2, 0, 4))
            for kind in LAYERS[:-1]
        ),
        positions([(0, 4, 6, 6)], "conv2d_relu"),
    ],
    "drawn": drawn,
    "poisoned": of_kinds(LAYERS, LINEAR[-1:], IMAGES[-1:]),
    "spreads": frozenset({0, 1}),
    "takes_lists": True,
    "float32_results": True,
    "convolved": [positions([shape], "conv2d_relu") for shape in WINOGRAD],
}

OPS = [
    Op(
        name="virtual_grads",
        function=gk.virtual_grads,
        oracle=reference.virtual_grads,
        plain=plain_torch,
        bad={
            "None in a list": refused(
                gk.virtual_grads, TypeError,
                r"virtual_grads: grads\[1\] is a NoneType; pass a torch.Tensor",
                [H, H], [H, None], "linear_relu",
            )
        },
        resized=lambda size: of_kinds(LAYERS, [(size, 6), (2, size, 3)], [(size, 3, 4, 5)]),
        flops=[(positions([(2, 3, 4, 5)], "conv2d_relu"), 2 * 2 * 4 * 5 * 9 * 3 * 3, 0)],
        summands=samples_of_positions,
        **SHARED,
    ),
    Op(
        name="virtual_grad_norms",
        function=gk.virtual_grad_norms,
        oracle=reference.virtual_grad_norms,
        plain=plain_norms,
        bad=BAD,
        resized=lambda size: [positions([(size, 6)], "residual")],
        squares=squares_of_kernels,
        flops=[
            (positions([(10, 4), (2, 3, 5)]), 2 * (10 * 4 * 4 + 6 * 5 * 5), 0),
            (positions([(10, 4)], "linear"), 2 * 10 * 4 * 11, 0),
        ],
        summands=samples_of_positions,
        **SHARED,
    ),
]  # fmt: skip
