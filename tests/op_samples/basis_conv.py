"""basis_conv2d for the tests: samples of its calls, and what they should give."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import growkernels as gk
from growkernels.ops.basis_conv import reference
from op_samples.table import Op, Sample, refused

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# max |error| / max |oracle|, float32; see set_conv_algorithm.
WINOGRAD_ERROR = 1e-5


class Shape(NamedTuple):
    """Sizes of one call: `mixed` is the number of output channels beside the basis's own."""

    x: tuple[int, int, int, int]
    filters: int
    mixed: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        return "-".join("x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in self)

    @property
    def form(self) -> tuple[tuple[int, int], ...]:
        return self.stride, self.padding, self.dilation

    def sample(self, include_basis: bool = True, bias: bool = True, unit: bool = False) -> Sample:
        """As many outputs in both forms. With `unit`, maps and outputs have a variance of 1."""
        outputs = self.filters + self.mixed
        shapes: list[tuple[int, ...]] = [
            self.x,
            (self.filters, self.x[1], *self.kernel),
            (self.mixed if include_basis else outputs, self.filters),
        ]
        taps = math.prod(self.kernel) * self.x[1]
        scales = (1.0, taps**-0.5, self.filters**-0.5)
        if bias:
            shapes.append((outputs,))
            scales += (1.0,)
        arguments = {
            "stride": self.stride, "padding": self.padding, "dilation": self.dilation,
            "include_basis": include_basis,
        }  # fmt: skip
        return Sample(tuple(shapes), arguments, scales if unit else ())


# Channels beside multiples of 16, images beside multiples of Winograd's tile, all on purpose.
SHAPES = [
    Shape((2, 3, 8, 8), 2, 3),
    Shape((2, 16, 7, 9), 8, 8),
    Shape((1, 17, 13, 6), 1, 32),
    Shape((2, 5, 6, 5), 7, 0),
    Shape((1, 1, 1, 1), 1, 0, (1, 1), padding=(0, 0)),
    Shape((0, 4, 6, 6), 3, 3),
    Shape((2, 8, 1, 1), 4, 4),
    Shape((1, 40, 10, 10), 24, 46, padding=(0, 0)),
    Shape((2, 33, 5, 3), 20, 27, padding=(2, 2)),
    Shape((3, 64, 8, 8), 32, 32),
    Shape((2, 6, 9, 8), 4, 5, stride=(2, 2)),
    Shape((2, 6, 9, 8), 4, 5, padding=(2, 2), dilation=(2, 2)),
    Shape((2, 6, 9, 8), 4, 5, (1, 1), padding=(0, 0)),
    Shape((2, 16, 8, 8), 8, 24, (1, 1), (2, 2), (0, 0)),
    Shape((2, 6, 9, 8), 4, 5, (5, 5), padding=(2, 2)),
    Shape((1, 3, 12, 10), 4, 4, (2, 3), (2, 1), (1, 0), (1, 2)),
]
# So many positions that an H100 mixes the maps in registers, where the basis is a part of y.
CHOSEN = [
    Shape((64, 64, 16, 16), 32, 32),
    Shape((40, 48, 17, 19), 62, 70),
    Shape((96, 32, 18, 16), 16, 48, stride=(2, 2)),
    Shape((64, 80, 16, 16), 28, 37, (1, 1), padding=(0, 0)),
]
BEYOND_32_BITS = Shape((132, 32, 512, 512), 28, 36, (1, 1), padding=(0, 0))


def plain_torch(
    x: Tensor, basis: Tensor, coeff: Tensor, bias: Tensor | None = None, *form: Any,
    include_basis: bool, **sliding: Any,
) -> Tensor:  # fmt: skip
    z = F.conv2d(x, basis, None, **sliding)
    mixed = F.conv2d(z, coeff[:, :, None, None]) if len(coeff) else z[:, :0]
    y = torch.cat([z, mixed], dim=1) if include_basis else mixed
    return y if bias is None else y + bias[:, None, None]


def registered(tensors: list[Tensor], arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    bias = None if len(tensors) == 3 else tensors[3]
    form = (list(arguments[name]) for name in ("stride", "padding", "dilation"))
    return (*tensors[:3], bias, *form, arguments["include_basis"])


def both(*shapes: Shape) -> list[Sample]:
    return [shape.sample(include_basis) for shape in shapes for include_basis in (True, False)]


@st.composite
def drawn(draw: st.DrawFn) -> Sample:
    """Images that the dilated kernel fits into."""
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)) | st.just((3, 3)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)) | st.just((1, 1)))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)) | st.just((1, 1)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)) | st.just((1, 1)))
    least = (
        max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)
    )
    height, width = (draw(st.integers(size, 14)) for size in least)
    image = (draw(st.integers(0, 3)), draw(st.integers(1, 20)), height, width)
    filters, mixed = draw(st.integers(1, 20)), draw(st.integers(0, 20))
    shape = Shape(image, filters, mixed, kernel, stride, padding, dilation)
    return shape.sample(draw(st.booleans()), draw(st.booleans()))


X, B, C = torch.ones(2, 3, 8, 8), torch.ones(2, 3, 3, 3), torch.ones(4, 2)
MIXED = {"include_basis": False}


bad = partial(refused, gk.basis_conv2d)
BAD = {
    "no filters": bad(ValueError, "at least one filter", X, B[:0], C[:, :0]),
    "more filters than channels": bad(
        ValueError, "2 basis filters for 1 output", X, B, C[:1], **MIXED
    ),
    "coeff": bad(
        ValueError, r"coeff has shape \[2, 4\].*\[Cout - R, R\] with R = 2", X, B, C.T
    ),
    "coeff of the mixed form": bad(
        ValueError, r"it needs \[Cout, R\] with R = 2", X, B, C.T, **MIXED
    ),
    "coeff dimensions": bad(ValueError, r"coeff has shape \[2\]", X, B, C[0]),
    "channels": bad(ValueError, "basis has 2 input channels but x has 3", X, B[:, :2], C),
    "groups": bad(ValueError, "grouped convolutions are not supported", X, B[:, :1], C),
    "bias": bad(ValueError, "each of 6 output channels", X, B, C, torch.ones(4)),
    "bias of the mixed form": bad(
        ValueError, "each of 4 output channels", X, B, C, torch.ones(6), **MIXED
    ),
    "bias dimensions": bad(ValueError, r"bias has shape \[6, 1\]", X, B, C, torch.ones(6, 1)),
    "one image": bad(ValueError, r"it needs \[N, Cin, H, W\]", X[0], B, C),
    "basis dimensions": bad(ValueError, r"it needs \[R, Cin, kh, kw\]", X, B[0], C),
    "no pixels": bad(ValueError, "only the batch may be empty", X[:, :, :0], B, C, padding=2),
    "empty kernel": bad(ValueError, "height and width must be at least 1", X, B[:, :, :0], C),
    "small image": bad(
        ValueError, "8 x 2 pixels.*smaller than the kernel.*the output would be empty",
        X[..., :2], B, C,
    ),
    "small image for the dilation": bad(
        ValueError, "the output would be empty", X, B, C, dilation=4
    ),
    "integers": bad(TypeError, "x has dtype Int; pass float16", X.int(), B.int(), C.int()),
    "complex": bad(TypeError, "x has dtype ComplexFloat", X + 0j, B + 0j, C + 0j),
    "dtypes": bad(TypeError, "basis has dtype Double but x has Float", X, B.double(), C),
    "coeff dtype": bad(TypeError, "coeff has dtype Half but x has Float", X, B, C.half()),
    "bias dtype": bad(TypeError, "bias has dtype Half", X, B, C, torch.ones(6).half()),
    "devices": bad(ValueError, "basis is on meta but x is on cpu", X, B.to("meta"), C),
    "stride": bad(ValueError, r"stride is \[1, 0\]; it must be at lea", X, B, C, stride=(1, 0)),
    "padding": bad(ValueError, r"padding is \[-1, -1\]; it must be at l", X, B, C, padding=-1),
    "dilation": bad(ValueError, "dilation is .*must be at least 1", X, B, C, dilation=0),
    "padding by name": bad(ValueError, "padding is 'same'; pass an", X, B, C, padding="same"),
    "three strides": bad(ValueError, "pass an int or a pair", X, B, C, stride=(1, 1, 1)),
    "no coefficients": bad(
        TypeError, "basis_conv2d: coeff is a NoneType; pass a torch.Tensor", X, B, None
    ),
}  # fmt: skip

# 2 images of 30 pixels, 4 filters of 27 numbers and 6 combinations of them.
CONVOLUTION, MIXING = 2 * 2 * 30 * 4 * 3 * 9, 2 * 2 * 30 * 6 * 4

OPS = [
    Op(
        name="basis_conv2d",
        function=gk.basis_conv2d,
        oracle=reference.basis_conv2d,
        plain=plain_torch,
        registered=registered,
        samples=[
            shape.sample(include_basis, bias)
            for shape in SHAPES
            for include_basis in (True, False)
            for bias in (True, False)
        ],
        few=both(SHAPES[0], SHAPES[1], SHAPES[9], SHAPES[10], SHAPES[12], SHAPES[15]),
        small=[
            *both(Shape((2, 2, 4, 3), 2, 1, (3, 2), (2, 1), (1, 1))),
            Shape((2, 2, 3, 4), 2, 2).sample(bias=False),
        ],
        large=both(Shape((4, 32, 12, 14), 24, 24)),
        empty=both(SHAPES[5]),
        resized=lambda size: both(Shape((size, 3, size + 3, 2 * size), 2, 3)),
        drawn=drawn(),
        bad=BAD,
        flops=[
            (
                Shape((2, 3, 6, 5), 4, 6).sample(bias=False),
                CONVOLUTION + MIXING,
                2 * (CONVOLUTION + MIXING),
            )
        ],
        convolved=both(*SHAPES),
        tolerance={
            torch.float32: WINOGRAD_ERROR,
            # A few roundings of the result, whatever the algorithm.
            **{dtype: 2 * torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)},
        },
        poisoned=[SHAPES[1].sample(), SHAPES[10].sample()],
        spreads=frozenset({1}),
        keeps_layout=True,
    )
]
