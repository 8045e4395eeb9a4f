"""The basis convolution as a module, and its exchange with nn.Conv2d."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from growkernels.nn.kernel_factors import (
    kernel_matrix,
    leading_rows_factors,
    low_rank_factors,
    selected_rows_factors,
)
from growkernels.nn.weights import why_computed
from growkernels.ops import basis_conv2d
from growkernels.ops.arguments import pair

Size = int | Sequence[int]


class BasisConv2d(nn.Module):
    """A convolution with R trained filters; the other channels are mixed out of their outputs.

    z = conv2d(x, basis); y = cat(z, coeff z) over the channels, plus the bias. With
    ``include_basis=False``, y = coeff z plus the bias. Takes the place of an ``nn.Conv2d`` without
    groups: x [N, in_channels, H, W] or [in_channels, H, W] to y [(N,) out_channels, Ho, Wo], see
    :func:`growkernels.basis_conv2d` for dtypes, layouts and what is differentiable. Per output
    pixel it takes as many multiplications as it has weights (bias aside).

    Source: Alekseev et al., "Layer-Specific Optimization: Sensitivity Based Convolution Layers
    Basis Search" (arXiv 2408.06024).

    Args:
        in_channels, out_channels, kernel_size, stride, dilation: as in nn.Conv2d.
        basis_channels: R, the number of trained filters, 1 <= R <= out_channels.
        padding: as in nn.Conv2d, zeros; ``"valid"`` is 0, ``"same"`` is resolved to a number.
        bias: whether a bias is added; off by default, unlike nn.Conv2d's.
        include_basis: whether the trained filters' outputs are the first R channels of y.

    Attributes:
        basis: parameter [R, in_channels, kh, kw].
        coeff: parameter [out_channels - R, R], or [out_channels, R] without the basis.
        bias: parameter [out_channels], or None.

    Raises:
        ValueError: sizes that are no convolution, R out of range, "same" with a stride or with an
            even extent of the kernel (its two sides need different padding).
    """

    weight_matrices = ("basis", "coeff")
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        basis_channels: int,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        bias: bool = False,
        include_basis: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.basis_channels = basis_channels
        self.kernel_size = pair("kernel_size", kernel_size, 1)
        self.stride = pair("stride", stride, 1)
        self.dilation = pair("dilation", dilation, 1)
        self.include_basis = include_basis
        if in_channels < 1 or out_channels < 1:
            raise ValueError(
                f"in_channels is {in_channels} and out_channels is {out_channels}; both must be at "
                "least 1."
            )
        check_basis_channels(basis_channels, out_channels)
        if isinstance(padding, str):
            self.padding = _named_padding(padding, self.kernel_size, self.stride, self.dilation)
        else:
            self.padding = pair("padding", padding, 0)
        mixed = out_channels - basis_channels if include_basis else out_channels
        shape = (basis_channels, in_channels, *self.kernel_size)
        self.basis = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.coeff = nn.Parameter(torch.empty(mixed, basis_channels, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random values whose equivalent full kernel has the variance of nn.Conv2d's.

        basis and bias are uniform in +-1/sqrt(fan_in) with fan_in = in_channels kh kw, as in
        nn.Conv2d; coeff is uniform with variance 1/R, so the mixed filters have the variance
        1/(3 fan_in) of the others. For He's variance 2/fan_in multiply the basis by sqrt(6).
        """
        bound = (self.in_channels * math.prod(self.kernel_size)) ** -0.5
        self.basis.uniform_(-bound, bound, generator=generator)
        wide = (3.0 / self.basis_channels) ** 0.5
        self.coeff.uniform_(-wide, wide, generator=generator)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound, generator=generator)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        basis_channels: int,
        init: str = "svd",
        include_basis: bool | None = None,
    ) -> BasisConv2d:
        """The basis convolution nearest to a convolution; a new module with values of its own.

        Sizes, dtype, device, memory format, bias, training mode and requires_grad are conv's.
        "Nearest" is in the squares of the differences between the kernels, and the errors below
        are such sums. A kernel of rank <= R, as a matrix [out_channels, in_channels kh kw], is
        reproduced to the precision of its dtype by every choice but the exception named.

        ``init="svd"`` starts from the best approximation of rank R.

        * ``include_basis=False`` is that approximation, split evenly between the factors.
        * ``include_basis=True`` (the default) takes its first R filters as the basis, as long as
          the coefficients then stay small. Where they would not, because those R filters are
          nearly dependent, its filters are turned as little as makes the coefficients' spectral
          norm 1, 2, 4, ..., the first that costs at most 1 % more error; large coefficients would
          magnify every step of the training. The exception: kernels that need coefficients
          above 1/sqrt(eps), for instance of rank R with dependent first R filters.

        ``init="select"`` keeps R of the existing filters, chosen by pivoting (each is the one
        farthest from the span of those before it), with the least-squares optimal coefficients for
        the others. The chosen filters lie anywhere among the channels, and moving them to the front
        would take a permutation of the output; so they are unit rows of the coefficients, and the
        form is ``include_basis=False``.

        Raises:
            TypeError: not an nn.Conv2d that computes what nn.Conv2d does.
            ValueError: groups, a padding mode other than zeros, an uninitialised, reparametrised,
                meta or not finite weight, R out of range, an unknown init, "select" with
                ``include_basis=True``.
        """
        check_replaceable(conv)
        check_basis_channels(basis_channels, conv.out_channels)
        if init not in ("svd", "select"):
            raise ValueError(f"Unknown init {init!r}; choose 'svd' or 'select'.")
        if init == "select" and include_basis:
            raise ValueError(
                "init='select' keeps filters from anywhere among the channels, which the form with "
                "the basis in front cannot hold; use include_basis=False or init='svd'."
            )
        front = init == "svd" if include_basis is None else include_basis
        matrix = as_matrix(conv.weight)
        if not bool(matrix.isfinite().all()):
            raise ValueError(
                "The convolution's weight contains NaN or infinity, so there is no nearest basis "
                "convolution; use finite weights."
            )
        if front:
            eps = torch.finfo(conv.weight.dtype).eps
            basis, coeff = leading_rows_factors(matrix, basis_channels, eps)
        elif init == "svd":
            basis, coeff = low_rank_factors(matrix, basis_channels)
        else:
            basis, coeff = selected_rows_factors(matrix, basis_channels)
        new = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            basis_channels,
            conv.stride,
            conv.padding,
            conv.dilation,
            bias=conv.bias is not None,
            include_basis=front,
            device="meta",
        )
        new.basis = _like(conv.weight, basis.view(new.basis.shape))
        new.coeff = _like(conv.weight, coeff)
        if conv.bias is not None:
            new.bias = _copy(conv.bias)
        return new.train(conv.training)

    @torch.no_grad()
    def to_conv(self) -> nn.Conv2d:
        """The nn.Conv2d that computes the same; a new module with values of its own."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=self.bias is not None,
            device="meta",
        )
        matrix = kernel_matrix(as_matrix(self.basis), as_matrix(self.coeff), self.include_basis)
        conv.weight = _like(self.basis, matrix.view(conv.weight.shape))
        if self.bias is not None:
            conv.bias = _copy(self.bias)
        return conv.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        return _of_image_or_batch(
            input,
            self.basis,
            self.coeff,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.include_basis,
        )

    def extra_repr(self) -> str:
        taps = self.in_channels * math.prod(self.kernel_size)
        now = weight_count(taps, self.out_channels, self.basis_channels, self.include_basis)
        full = taps * self.out_channels
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        parts += [f"basis_channels={self.basis_channels}, stride={self.stride}"]
        parts += [f"padding={self.padding}"] if self.padding != (0, 0) else []
        parts += [f"dilation={self.dilation}"] if self.dilation != (1, 1) else []
        parts += [] if self.bias is None else ["bias=True"]
        parts += [] if self.include_basis else ["include_basis=False"]
        change = f"{abs(1 - now / full):.1%} {'fewer' if now <= full else 'more'}"
        return f"{', '.join(parts)}, {now:,} weights and MACs per pixel ({change} than {full:,})"


@torch.fx.wrap  # a symbolic trace does not know the number of dimensions, so it takes this whole
def _of_image_or_batch(
    x: Tensor,
    basis: Tensor,
    coeff: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    include_basis: bool,
) -> Tensor:
    """basis_conv2d of a batch, or of one image [Cin, H, W]."""
    batch = x[None] if x.dim() == 3 else x
    y = basis_conv2d(batch, basis, coeff, bias, stride, padding, dilation, include_basis)
    return y[0] if x.dim() == 3 else y


def weight_count(taps: int, out_channels: int, basis_channels: int, include_basis: bool) -> int:
    """Weights of a basis convolution, bias aside; `taps` is in_channels kh kw.

    It is also the number of multiplications per output pixel. The full kernel has
    taps * out_channels of both.
    """
    mixed = out_channels - basis_channels if include_basis else out_channels
    return basis_channels * (taps + mixed)


def check_basis_channels(basis_channels: int, out_channels: int) -> None:
    """Raise ValueError unless 1 <= basis_channels <= out_channels."""
    if not 1 <= basis_channels <= out_channels:
        raise ValueError(
            f"basis_channels is {basis_channels}; a convolution with {out_channels} output "
            f"channels takes 1 to {out_channels}."
        )


def check_replaceable(conv: nn.Module) -> None:
    """Raise unless a BasisConv2d can compute what this module does (from_conv says what raises)."""
    kind = type(conv)
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"A {kind.__name__} is not a Conv2d; only an nn.Conv2d can be replaced.")
    if isinstance(conv.weight, UninitializedParameter):
        raise ValueError(
            "The convolution is lazy and has no weights yet; call the model once on a batch first."
        )
    if reason := why_computed(conv):
        raise ValueError(
            f"Of the convolution's parameters one is computed from other parameters: {reason}; "
            "make it an ordinary parameter first."
        )
    steps = ("forward", "_conv_forward")
    if any(getattr(kind, s) is not getattr(nn.Conv2d, s) or s in vars(conv) for s in steps):
        raise TypeError(
            f"A {kind.__name__} has a forward of its own, which a basis convolution would not "
            "keep; only a plain nn.Conv2d can be replaced."
        )
    if not conv.weight.numel():
        raise ValueError(
            f"The convolution's weight is empty (shape {list(conv.weight.shape)}), so there is "
            "nothing to approximate; leave it as it is."
        )
    if conv.groups != 1:
        raise ValueError(
            f"The convolution has groups={conv.groups}; a basis convolution mixes all channels, so "
            "only groups=1 can be replaced."
        )
    if conv.padding_mode != "zeros":
        raise ValueError(
            f"The convolution has padding_mode={conv.padding_mode!r}; a basis convolution pads "
            "with zeros only."
        )
    if isinstance(conv.padding, str):
        _named_padding(conv.padding, conv.kernel_size, conv.stride, conv.dilation)
    if not conv.weight.is_floating_point():
        raise ValueError(
            f"The convolution's weight is {conv.weight.dtype}; real floating-point values are "
            "needed."
        )


def zeros_like_exchanged(
    layer: nn.Conv2d | BasisConv2d, basis_channels: int, init: str
) -> nn.Conv2d | BasisConv2d:
    """What `from_conv` (or, with all filters, `to_conv`) makes of a layer, with weights of 0.

    It has no bias yet. Sizes, dtype, device, memory format, mode and requires_grad are the layer's.
    """
    like = layer.basis if isinstance(layer, BasisConv2d) else layer.weight
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
    places = (layer.stride, layer.padding, layer.dilation)
    new: nn.Conv2d | BasisConv2d
    if basis_channels == layer.out_channels:
        new = nn.Conv2d(*sizes, *places, bias=False, device="meta")  # type: ignore[arg-type]
    else:
        new = BasisConv2d(
            *sizes[:2],
            layer.kernel_size,
            basis_channels,
            *places,  # type: ignore[arg-type]
            include_basis=init == "svd",
            device="meta",
        )
    for name, parameter in list(new.named_parameters()):
        zeros = torch.zeros(parameter.shape, dtype=like.dtype, device=like.device)
        setattr(new, name, _like(like, zeros))
    return new.train(layer.training)


def as_matrix(tensor: Tensor) -> Tensor:
    """The values as a float64 matrix [rows, everything else] on the CPU; meta has none to give."""
    if tensor.is_meta:
        raise ValueError("The layer is on the meta device; give it values on another one first.")
    return tensor.detach().to("cpu", torch.float64).flatten(1)


def _like(parameter: Tensor, values: Tensor) -> nn.Parameter:
    """A parameter of these values; dtype, device, requires_grad and layout of another."""
    moved = values.to(parameter.device, parameter.dtype)
    if values.dim() == 4 and not parameter.is_contiguous():
        moved = moved.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(moved.clone(), requires_grad=parameter.requires_grad)


def _copy(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def _named_padding(
    padding: str, kernel_size: Size, stride: Size, dilation: Size
) -> tuple[int, int]:
    if padding == "valid":
        return 0, 0
    if padding != "same":
        raise ValueError(f"padding is {padding!r}; give a number, a pair, 'same' or 'valid'.")
    kernel, steps = pair("kernel_size", kernel_size, 1), pair("stride", stride, 1)
    total = [d * (k - 1) for d, k in zip(pair("dilation", dilation, 1), kernel, strict=True)]
    if steps != (1, 1):
        raise ValueError(
            f"padding='same' needs stride 1, not {steps}; give the padding as numbers."
        )
    if any(t % 2 for t in total):
        raise ValueError(
            f"padding='same' with kernel_size {kernel} needs more zeros on one side than on the "
            "other, which basis_conv2d cannot do; use an odd kernel_size or padding as numbers."
        )
    return total[0] // 2, total[1] // 2
