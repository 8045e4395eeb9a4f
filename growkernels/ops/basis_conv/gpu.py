"""basis_conv2d on a GPU: which of four algorithms computes a call, and the ops' registration.

    triton            our convolution that mixes its maps while they are in registers
    direct            the vendor's convolution for the maps, our one pass for the combinations
    two convolutions  the vendor's convolutions for both, composed of ATen's ops
    reconstruct       one vendor's convolution with the full kernel, composed of ATen's ops

The first two share a backward pass: dz, dcoeff and dbias in one pass of ours (or by the vendor's
matrix products where the coefficients do not fit into one program), then the vendor's convolutions
with R channels for the gradients of x and of the basis.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from growkernels.ops.basis_conv.triton_tiles import backward_tile, most_filters

if TYPE_CHECKING:
    from types import ModuleType

Pair = tuple[int, int]
Images = tuple[int, int, int, int]


class Card(NamedTuple):
    """What the decision needs to know of a GPU."""

    capability: Pair
    multiprocessors: int
    shared_bytes: int  # that a program can have


class Decision(NamedTuple):
    """The algorithm, and the reason for it."""

    algorithm: str
    reason: str


# Fusing saves traffic of some Cout values per position, against sums over Cin kh kw products. On an
# H100 the traffic matters in ResNet's first two stages; beyond, the vendor's convolution is faster
# by more than that (a prediction from bytes and operations).
_LONGEST_SUM = 9 * 128
_FEWEST_PROGRAMS = 0.75  # of the multiprocessors
_POSITIONS = 64  # of a program where there are few
_MOST_POSITIONS = 2**31 - 2**16  # they are counted in 32 bits, with room for the last program's


@lru_cache(maxsize=1024)
def decide(
    x: Images,
    basis: Images,
    coeff: Pair,
    dtype: torch.dtype,
    card: Card,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    include_basis: bool = True,
    tf32: bool = True,
) -> Decision:
    """How a GPU like `card` computes `basis_conv2d` for tensors of these shapes.

    `tf32` says whether convolutions may round float32 to TF32. Forward and backward use the same
    algorithm. The shapes must be such as the op takes.
    """
    filters, mixed = basis[0], coeff[0]
    taps = prod(basis[1:])
    outputs = mixed + (filters if include_basis else 0)
    positions = x[0] * prod(
        (x[2 + i] + 2 * padding[i] - dilation[i] * (basis[2 + i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    if mixed == 0:
        return Decision("two convolutions", "there is nothing to mix")
    # Multiply-adds, as the composed op counts them: it decides between its two forms by the same.
    separate = positions * filters * (taps + mixed)
    together = positions * outputs * taps + filters * mixed * taps
    if together < separate:
        return Decision(
            "reconstruct",
            f"{filters} of {outputs} filters are so many that one convolution with the full "
            "kernel takes fewer operations",
        )
    if obstacle := _obstacle(filters, positions, dtype, card, tf32):
        return Decision("two convolutions", obstacle)
    if taps > _LONGEST_SUM:
        return Decision(
            "direct",
            f"sums over {taps} products take so long that the vendor's faster convolution saves "
            "more than fusing it with the mix",
        )
    programs, wanted = -(-positions // _POSITIONS), _FEWEST_PROGRAMS * card.multiprocessors
    if programs < wanted:
        return Decision(
            "direct",
            f"{positions} positions make {programs} programs, too few for "
            f"{card.multiprocessors} multiprocessors",
        )
    room = max(16, 1 << (filters - 1).bit_length())
    if 4 * filters < 3 * room:
        return Decision(
            "direct", f"{filters} filters leave more than a quarter of {room} columns empty"
        )
    if 10 * room >= 9 * outputs:
        return Decision(
            "direct", f"{filters} of {outputs} filters leave our convolution too little to save"
        )
    return Decision(
        "triton",
        f"{filters} of {outputs} filters, mixed in registers: the maps are never read again",
    )


def _obstacle(
    filters: int, positions: int, dtype: torch.dtype, card: Card, tf32: bool
) -> str | None:
    if positions == 0:
        return "there are no images"
    if dtype == torch.float64:
        return "our kernels are for 16-bit types and float32, not float64"
    if dtype == torch.float32 and not tf32:
        return (
            "TF32 is off for convolutions (torch.backends.cudnn.allow_tf32), and our kernels have "
            "no other float32"
        )
    if card.capability < (8, 0):
        return (
            f"the GPU has compute capability {card.capability[0]}.{card.capability[1]}; our "
            "kernels need 8.0"
        )
    if positions > _MOST_POSITIONS:
        return f"{positions} positions are more than our kernels count"
    most = most_filters(dtype, card.shared_bytes)
    if filters > most:
        return f"{filters} filters do not fit into one program, {most} do"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


@lru_cache
def _card(device: torch.device) -> Card:
    properties: Any = torch.cuda.get_device_properties(device)
    return Card(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def decide_for(
    x: Tensor,
    basis: Tensor,
    coeff: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    include_basis: bool,
) -> Decision:
    """`decide` for tensors on a GPU, under the present settings."""
    precisions: Any = torch.backends.cudnn
    shapes: tuple[Any, ...] = (tuple(x.shape), tuple(basis.shape), tuple(coeff.shape))
    form: tuple[Any, ...] = (tuple(stride), tuple(padding), tuple(dilation))
    tf32 = precisions.conv.fp32_precision == "tf32"
    return decide(*shapes, x.dtype, _card(x.device), *form, include_basis, tf32)


def _launch() -> ModuleType:
    from growkernels.ops.basis_conv import triton_launch

    return triton_launch


_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
_COMPOSED = ("two convolutions", "reconstruct")


def _kernel(op: str, key: str) -> Callable[..., Any]:
    kernel = torch.library.get_kernel(f"growkernels::{op}", key)
    return lambda *arguments: kernel.call_boxed(_KEYS, *arguments)


def register() -> None:
    """Registers the family's ops for tensors on a GPU; neither Triton nor a GPU is needed for it.

    What Triton is not for goes to the composed kernels, which are what the dispatcher has for CUDA
    until now. The kernels for fake tensors, called with real ones, check the arguments and
    allocate the outputs.
    """
    family = ("basis_conv2d", "basis_conv2d_with_maps", "basis_conv2d_backward")
    composed = {op: _kernel(op, "CUDA") for op in (*family, "basis_conv2d_algorithm")}
    checked = {op: _kernel(op, "Meta") for op in family}

    def basis_conv2d(
        x: Tensor, basis: Tensor, coeff: Tensor, bias: Tensor | None, *form: Any
    ) -> Tensor:
        y: Tensor = checked["basis_conv2d"](x, basis, coeff, bias, *form)
        algorithm = decide_for(x, basis, coeff, *form).algorithm
        if algorithm in _COMPOSED:
            del y  # its memory is free again
            y = composed["basis_conv2d"](x, basis, coeff, bias, *form)
        else:
            forward(algorithm, x, basis, coeff, bias, form[:3], y, None, _multiprocessors(x))
        return y

    def basis_conv2d_with_maps(
        x: Tensor, basis: Tensor, coeff: Tensor, bias: Tensor | None, *form: Any
    ) -> tuple[Tensor, Tensor]:
        y, z = checked["basis_conv2d_with_maps"](x, basis, coeff, bias, *form)
        algorithm = decide_for(x, basis, coeff, *form).algorithm
        if algorithm in _COMPOSED:
            del y, z
            y, z = composed["basis_conv2d_with_maps"](x, basis, coeff, bias, *form)
        else:
            forward(algorithm, x, basis, coeff, bias, form[:3], y, z, _multiprocessors(x))
        return y, z

    def basis_conv2d_backward(
        grad: Tensor,
        x: Tensor,
        basis: Tensor,
        coeff: Tensor,
        z: Tensor,
        z_bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        include_basis: bool,
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        form = (stride, padding, dilation, include_basis)
        arguments = (grad, x, basis, coeff, z, z_bias, *form)
        sums = [False, False, wanted[2], wanted[3]]
        _, _, dcoeff, dbias = checked["basis_conv2d_backward"](*arguments, sums)
        if decide_for(x, basis, coeff, *form).algorithm in _COMPOSED:
            result: tuple[Tensor | None, ...] = composed["basis_conv2d_backward"](
                *arguments, wanted
            )
            return result
        return backward(
            grad, x, basis, coeff, z, z_bias, form[:3], dcoeff, dbias, wanted[:2],
            _multiprocessors(x),
        )  # fmt: skip

    def basis_conv2d_algorithm(x: Tensor, basis: Tensor, coeff: Tensor, *form: Any) -> str:
        composed["basis_conv2d_algorithm"](x, basis, coeff, *form)  # checks the arguments
        return decide_for(x, basis, coeff, *form).algorithm

    for function in (
        basis_conv2d, basis_conv2d_with_maps, basis_conv2d_backward, basis_conv2d_algorithm
    ):  # fmt: skip
        torch.library.impl(f"growkernels::{function.__name__}", "CUDA", function)


def _multiprocessors(x: Tensor) -> int:
    return _card(x.device).multiprocessors


def forward(
    algorithm: str,
    x: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    form: Sequence[Sequence[int]],
    y: Tensor,
    z: Tensor | None,
    multiprocessors: int,
) -> None:
    """Writes y, and the maps to z where it is given, by "triton" or "direct".

    `form` is stride, padding and dilation. The outputs are contiguous or channels_last.
    """
    launch = _launch()
    y_rows = _channels_last(y)
    with torch.cuda.device_of(x):
        if algorithm == "triton":
            z_rows = None if z is None else _channels_last(z)
            launch.convolve(x, basis, coeff, bias, *form, y_rows, z_rows, multiprocessors)
        else:
            z_rows = torch.ops.aten.convolution(x, basis, None, *form, False, [0, 0], 1)
            launch.mix(z_rows, coeff, bias, y_rows, multiprocessors)
    if y_rows is not y:
        y.copy_(y_rows)
    if z is not None and z_rows is not None and z_rows is not z:
        z.copy_(z_rows)


def backward(
    grad: Tensor,
    x: Tensor,
    basis: Tensor,
    coeff: Tensor,
    z: Tensor,
    z_bias: Tensor | None,
    form: Sequence[Sequence[int]],
    dcoeff: Tensor | None,
    dbias: Tensor | None,
    wanted: Sequence[bool],
    multiprocessors: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x and basis, as `wanted`, and dcoeff and dbias, written where given."""
    launch = _launch()
    dz = torch.empty_like(z, memory_format=torch.channels_last) if any(wanted) else None
    if backward_tile(coeff.shape[1], len(coeff), coeff.dtype) is not None:
        with torch.cuda.device_of(x):
            launch.coefficient_backward(grad, z, z_bias, coeff, dz, dcoeff, dbias, multiprocessors)
    else:
        _matrix_products(grad, z, z_bias, coeff, dz, dcoeff, dbias)
    dx = dbasis = None
    if dz is not None:
        dx, dbasis, _ = torch.ops.aten.convolution_backward(
            dz, x, basis, None, *form, False, [0, 0], 1, [*wanted, False]
        )
    return (
        None if dx is None else _laid_out(dx, suggest_memory_format(x)),
        None if dbasis is None else _laid_out(dbasis, suggest_memory_format(basis)),
        dcoeff,
        dbias,
    )


def _matrix_products(
    grad: Tensor,
    z: Tensor,
    z_bias: Tensor | None,
    coeff: Tensor,
    dz: Tensor | None,
    dcoeff: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """`coefficient_backward` by the vendor's matrix products, which read slices where they lie."""
    as_rows = _launch().as_rows
    combinations, filters = coeff.shape
    rows = as_rows(grad)
    rest = rows[:, -combinations:]
    if dz is not None:
        if rows.shape[1] > combinations:
            torch.addmm(rows[:, :filters], rest, coeff, out=as_rows(dz))
        else:
            torch.mm(rest, coeff, out=as_rows(dz))
    if dcoeff is not None:
        maps = as_rows(z)
        torch.mm(rest.t(), maps if z_bias is None else maps - z_bias, out=dcoeff)
    if dbias is not None:
        torch.sum(rows, 0, out=dbias)


def _channels_last(out: Tensor) -> Tensor:
    """The tensor itself, or a new one for its values."""
    if out.is_contiguous(memory_format=torch.channels_last):
        return out
    return torch.empty_like(out, memory_format=torch.channels_last)


def _laid_out(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The tensor with the strides of a fresh one, also along dimensions of size 1."""
    _, channels, height, width = tensor.shape
    if memory_format == torch.channels_last:
        strides = (channels * height * width, 1, width * channels, channels)
    else:
        strides = (channels * height * width, height * width, width, 1)
    if tensor.stride() == strides:
        return tensor
    return tensor.contiguous(memory_format=memory_format).as_strided(tensor.shape, strides)
