"""Random calls of the public ops: right against a float64 oracle, or one clear error.

    python tests/ops/fuzzing.py --minutes 10
    python tests/ops/fuzzing.py --calls 1000000    # goes on where it was stopped

A call that fails is appended to fuzz_corpus.jsonl beside this file; `test_fuzz_corpus.py` replays
those. What a long run has come to is kept in fuzz_record.json: see fuzz_runs.py.

The oracle's errors are judged element by element by the same sums of absolute values. Where those
leave the range of the dtype nothing is asserted, nor within the reach of a NaN or an infinity: it
is enough there that the call returns.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from fuzz_runs import Calls, Case, command
from torch import Tensor

import growkernels as gk
from growkernels.ops.basis_conv import reference as basis_conv
from growkernels.ops.splitting import reference as splitting
from growkernels.ops.virtual_grad import reference as virtual_grad

FOLDER = Path(__file__).parent
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LAYOUTS = ("plain", "sliced", "stepped", "transposed", "expanded", "channels_last")
VALUES = ("normal", "normal", "normal", "tiny", "huge", "mixed", "subnormal", "nan", "inf", "zeros")
SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 50, 64, 65, 100)
ACTIVATIONS = ("tanh", "relu", "gelu", "silu", "sigmoid")
CURVED = ("gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "softplus", "relu")


def make_case(rng: random.Random) -> Case:
    """A family and everything that its call is made of."""
    family = rng.choice(list(FAMILIES))
    return {
        "family": family,
        "dtype": rng.choice(list(DTYPES)),
        "sizes": [rng.choice(SIZES) for _ in range(6)],
        "layouts": [rng.choice(LAYOUTS) for _ in range(4)],
        "values": [rng.choice(VALUES) for _ in range(4)],
        "kernel": [rng.choice((1, 1, 2, 3, 3, 5)) for _ in range(2)],
        "stride": [rng.choice((1, 1, 1, 2, 3)) for _ in range(2)],
        "padding": [rng.choice((0, 1, 1, 2, 9)) for _ in range(2)],
        "dilation": [rng.choice((1, 1, 1, 2, 4)) for _ in range(2)],
        "algorithm": rng.choice(("auto", "direct", "winograd")),
        "choice": rng.randrange(1 << 16),
        "seed": rng.randrange(1 << 31),
    }


class Maker:
    """Tensors of a case, one after the other."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.dtype = DTYPES[case["dtype"]]
        self.generator = torch.Generator().manual_seed(case["seed"])
        self.count = 0
        self.largest = 0.0

    def __call__(self, *shape: int) -> Tensor:
        layout = self.case["layouts"][self.count % 4]
        values = self.case["values"][self.count % 4]
        self.count += 1
        stored = list(shape)
        if layout == "sliced" and shape:
            stored[-1] += 3
        elif layout == "stepped" and shape:
            stored[-1] *= 2
        elif layout == "expanded" and shape and shape[0] > 0:
            stored[0] = 1
        elif layout == "transposed" and len(shape) > 1:
            stored[-1], stored[-2] = stored[-2], stored[-1]
        tensor = self.fill(torch.randn(stored, generator=self.generator), values).to(self.dtype)
        finite = tensor[tensor.isfinite()]
        self.largest = max(self.largest, float(finite.abs().max()) if len(finite) else 0.0)
        if layout == "sliced" and shape:
            tensor[..., shape[-1] :] = torch.nan
            return tensor[..., : shape[-1]]
        if layout == "stepped" and shape:
            tensor[..., 1::2] = torch.nan
            return tensor[..., ::2]
        if layout == "expanded" and shape and shape[0] > 0:
            return tensor.expand(shape)
        if layout == "transposed" and len(shape) > 1:
            return tensor.transpose(-1, -2)
        if layout == "channels_last" and len(shape) == 4:
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    def fill(self, tensor: Tensor, values: str) -> Tensor:
        if values == "zeros":
            return torch.zeros_like(tensor)
        if values in ("tiny", "huge", "subnormal"):
            limits = torch.finfo(self.dtype)
            scale = {"tiny": 1e-30, "huge": 1e30, "subnormal": limits.tiny / 8}[values]
            return tensor.double() * min(max(scale, limits.tiny / 8), limits.max / 64)
        if values == "mixed":
            powers = torch.randint(-6, 7, tensor.shape, generator=self.generator)
            return tensor.double() * 10.0 ** powers.double()
        if values in ("nan", "inf") and tensor.numel():
            flat = tensor.view(-1)
            flat[int(torch.randint(len(flat), (), generator=self.generator))] = float(values)
        return tensor


def close(
    ours: Tensor,
    oracle: Tensor,
    scale: Tensor,
    terms: int,
    dtype: torch.dtype,
    largest: float,
    flushes: bool = False,
) -> None:
    """Asserts |ours - oracle| within the rounding errors of sums of `terms` products.

    `scale` are the sums of absolute values. What is subnormal may count as zero where it meets
    values up to `largest`.
    """
    assert ours.shape == oracle.shape, (ours.shape, oracle.shape)
    limits, wide = (
        torch.finfo(dtype),
        torch.finfo(torch.float64 if dtype.itemsize == 8 else torch.float32),
    )
    within = scale.isfinite() & (scale < limits.max / 8)
    allowed = (16 * limits.eps + (16 + terms) * wide.eps) * scale
    # Tiles of bfloat16 take subnormal operands for zero; elsewhere products lose digits there.
    flushed = flushes or dtype == torch.bfloat16
    underflow = wide.tiny * (1 + largest if flushed else wide.eps)
    allowed = allowed + 4 * limits.tiny + 64 * (terms + 1) * underflow * (1 + largest) ** 2
    wrong = within & ~((ours.double() - oracle).abs() <= allowed)
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{ours.dtype} {at} of {list(ours.shape)}: {float(ours[at])!r}, not "
            f"{float(oracle[at])!r}, which is more than {float(allowed[at]):.1e} away"
        )


def widest(scale: Tensor, dtype: torch.dtype, *others: Tensor) -> Tensor:
    """`scale` where all intermediate values lie far below infinity, else infinity."""
    largest = max((float(t.nan_to_num(torch.inf).max()) for t in others if t.numel()), default=0.0)
    limit = min(1e33, torch.finfo(dtype).max / 64)
    return scale if largest < limit else torch.full_like(scale, torch.inf)


def greatest(size: Tensor) -> Tensor:
    return size.max() if size.numel() else size.sum()


def in_tiles(scale: Tensor, winograd: bool) -> Tensor:
    """Winograd's errors are those of the largest value nearby."""
    if not winograd or not scale.numel():
        return scale
    return torch.full_like(scale, 64 * float(scale.max()))


def _splitting_hvp(case: Case, make: Maker) -> None:
    rows, width, neurons, k = *case["sizes"][:3], case["choice"] % 4
    x, w = make(rows, width), make(rows, neurons)
    v = make(neurons, width) if k == 0 else make(neurons, k, width)
    y = gk.splitting_hvp(x, w, v)
    wide = [t.double() for t in (x, w, v)]
    size = [t.abs() for t in wide]
    products = size[0] @ size[2].flatten(0, -2).T
    scale = splitting.splitting_hvp(*size)
    scale = widest(scale, torch.float32, scale, products, greatest(products) * greatest(size[1]))
    if make.dtype == torch.bfloat16:
        scale = scale * 2  # the weighted products are rounded
    close(y, splitting.splitting_hvp(*wide), scale, rows + width, make.dtype, make.largest)


def _distances(case: Case) -> dict[str, tuple[int, int]]:
    return {name: tuple(case[name]) for name in ("stride", "padding", "dilation")}


def _output(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _images(case: Case) -> tuple[int, int, int, int, int, int]:
    batch, channels, height, width = (
        min(s, m) for s, m in zip(case["sizes"][:4], (4, 50, 17, 17), strict=True)
    )
    parameters = (case[name] for name in ("kernel", "stride", "padding", "dilation"))
    sides = zip((height, width), *parameters, strict=True)
    return batch, channels, height, width, *(max(0, _output(*side)) for side in sides)


def _splitting_hvp_conv2d(case: Case, make: Maker) -> None:
    batch, channels, height, width, out_height, out_width = _images(case)
    neurons, k = min(case["sizes"][4], 33), case["choice"] % 3
    x, w = make(batch, channels, height, width), make(batch, neurons, out_height, out_width)
    shape = (neurons, channels, *case["kernel"])
    v = make(*shape) if k == 0 else make(shape[0], k, *shape[1:])
    distances = _distances(case)
    y = gk.splitting_hvp_conv2d(x, w, v, **distances)
    if not y.numel() or not w.numel() or not x.numel():
        assert not y.nan_to_num(0).any()  # padding alone, which an infinite weight makes NaN
        return
    wide = [t.double() for t in (x, w, v)]
    size = [t.abs() for t in wide]
    scale = splitting.splitting_hvp_conv2d(*size, **distances)
    filters = size[2].reshape(shape) if k == 0 else size[2].flatten(0, 1)
    products = torch.nn.functional.conv2d(size[0], filters, None, *distances.values())
    scale = widest(scale, torch.float32, scale, products, greatest(products) * greatest(size[1]))
    winograd = case["algorithm"] != "direct" and make.dtype == torch.float32
    terms = channels * case["kernel"][0] * case["kernel"][1] + batch * out_height * out_width
    oracle = splitting.splitting_hvp_conv2d(*wide, **distances)
    close(y, oracle, in_tiles(2 * scale, winograd), terms, make.dtype, make.largest)


def _splitting_weight(case: Case, make: Maker) -> None:
    shape = case["sizes"][: 1 + case["choice"] % 3]
    grad, preact = make(*shape), make(*shape)
    activation = CURVED[case["choice"] // 7 % len(CURVED)]
    beta = 3.0 if activation == "relu" else None
    w = gk.splitting_weight(grad, preact, activation, beta=beta)
    z = preact.double().clamp(-1e3, 1e3)
    oracle = splitting.splitting_weight(grad.double(), z, activation, beta=beta)
    close(
        w,
        oracle,
        64 * grad.double().abs().nan_to_num(torch.inf) + 0 * z,
        1,
        make.dtype,
        make.largest,
    )


def _virtual_grads(case: Case, make: Maker) -> None:
    layer = ("linear_relu", "residual", "conv2d_relu", "linear")[case["choice"] % 4]
    activation = ACTIVATIONS[case["choice"] // 3 % 5]
    h, g = [], []
    for position in range(1 + case["choice"] // 16 % 3):
        a, b, c, d = (case["sizes"][(position + i) % 6] for i in range(4))
        shape = (min(a, 4), min(b, 33), min(c, 9), min(d, 9)) if layer == "conv2d_relu" else (a, b)
        h.append(make(*shape))
        g.append(make(a, min(c, 65)) if layer == "linear" else make(*shape))
    kind = {"activation": activation, "scale": 1.5}
    gradients = gk.virtual_grads(h, g, layer, **kind)
    sums = [torch.ones_like(gradient) for gradient in gradients]
    norms = gk.virtual_grad_norms(h, g, layer, sums, **kind)
    assert len(norms) == len(h)
    winograd = layer == "conv2d_relu" and case["algorithm"] != "direct"
    for activations, grads, gradient, total in zip(h, g, gradients, sums, strict=True):
        wide_h, wide_g = activations.double(), grads.double()
        oracle = virtual_grad.virtual_grads([wide_h], [wide_g], layer, **kind)[0]
        masked = torch.where(wide_h <= 0, 0, wide_g) if layer.endswith("_relu") else wide_g
        size_h = wide_h.abs() + 1 if layer == "residual" else wide_h.abs()
        # |h| has no mask of its own: it is taken as positive, with the masked gradient.
        of_sizes = torch.where(size_h == 0, 1e-300, size_h)
        scale = virtual_grad.virtual_grads(
            [of_sizes * 1.5], [masked.abs()], layer, activation="relu"
        )[0]
        scale = in_tiles(
            widest(scale, torch.float32, scale), winograd and make.dtype == torch.float32
        )
        terms = activations.numel() // max(1, gradient.shape[1])
        flushes = make.dtype == torch.bfloat16
        # A vendor's gradient of 16-bit images is rounded to 16 bits.
        dtype = gradient.dtype if layer.startswith("linear") else make.dtype
        close(gradient, oracle, scale, terms, dtype, make.largest, flushes)
        close(total, oracle + 1, scale + 1, terms, dtype, make.largest, flushes)


def _basis_conv2d(case: Case, make: Maker) -> None:
    batch, channels, height, width, out_height, out_width = _images(case)
    filters, mixed = min(case["sizes"][4], 17), min(case["sizes"][5], 33)
    include_basis = case["choice"] % 2 == 0
    x, basis = make(batch, channels, height, width), make(filters, channels, *case["kernel"])
    coeff = make(mixed, filters)
    bias = make(mixed + filters if include_basis else mixed) if case["choice"] // 2 % 2 else None
    distances = _distances(case)
    leaves = [t if t is None else t.detach().requires_grad_() for t in (x, basis, coeff, bias)]
    y = gk.basis_conv2d(*leaves, **distances, include_basis=include_basis)  # type: ignore[arg-type]
    assert y.shape[2:] == (out_height, out_width)
    wide = [t if t is None else t.detach().double() for t in leaves]
    size = [t if t is None else t.abs() for t in wide]
    maps = torch.nn.functional.conv2d(size[0], size[1], None, *distances.values())
    scale = basis_conv.basis_conv2d(*size, **distances, include_basis=include_basis)  # type: ignore[arg-type]
    oracle = basis_conv.basis_conv2d(*wide, **distances, include_basis=include_basis)  # type: ignore[arg-type]
    # Images of 16 bits without tiles are taken in float32, by any algorithm.
    winograd = case["algorithm"] != "direct" and make.dtype != torch.float64
    terms = channels * case["kernel"][0] * case["kernel"][1] + filters
    # Of few channels the filters are mixed, not the maps.
    mixes = size[2] @ size[1].flatten(1)
    scale = widest(scale, make.dtype, scale, maps, mixes)
    close(
        y.detach(),
        oracle,
        in_tiles(2 * scale, winograd),
        terms,
        make.dtype,
        make.largest,
    )
    y.backward(torch.ones_like(y))
    for leaf in leaves:
        assert leaf is None or leaf.grad.shape == leaf.shape


def _splitting_eigs(case: Case, make: Maker) -> None:
    rows, width, neurons = (min(s, 33) for s in case["sizes"][:3])
    x, w = make(rows, width), make(rows, neurons)
    k = 1 + case["choice"] % 3
    values, vectors, _ = gk.splitting_eigs(x, w, k=k, tol=1e-3)
    assert values.shape == (neurons, k)
    assert vectors.shape == (neurons, k, width)
    matrices = torch.einsum("mi,ma,mb->iab", *(t.double() for t in (w, x, x)))
    size = torch.einsum("mi,ma,mb->iab", *(t.double().abs() for t in (w, x, x))).sum((1, 2))
    exact = torch.linalg.eigvalsh(matrices)[:, :k] if neurons else values.double()
    usual = (size < 1e30) & (size > 1e-20)
    error = (values.double() - exact).abs().amax(1) / size.clamp(min=1e-300)
    assert not (usual & (error > 0.05)).any(), float(error.max())


FAMILIES: dict[str, Callable[[Case, Maker], None]] = {
    "splitting_hvp": _splitting_hvp,
    "splitting_hvp_conv2d": _splitting_hvp_conv2d,
    "splitting_weight": _splitting_weight,
    "virtual_grads": _virtual_grads,
    "basis_conv2d": _basis_conv2d,
    "splitting_eigs": _splitting_eigs,
}


def check(case: Case) -> str:
    """ "right", or the one sentence with which the call was refused; AssertionError if neither."""
    before = gk.conv_algorithm()
    gk.set_conv_algorithm(case["algorithm"])
    try:
        FAMILIES[case["family"]](case, Maker(case))
    except (ValueError, TypeError) as error:
        if "\n" in str(error):
            raise AssertionError(f"more than one sentence: {error}") from error
        return str(error)
    finally:
        gk.set_conv_algorithm(before)
    return "right"


CALLS = Calls(
    make_case, check, FOLDER / "fuzz_corpus.jsonl", FOLDER / "fuzz_record.json", of_a_seed=10_000
)


if __name__ == "__main__":
    # Matrices with NaN or infinities never converge, and every message is another one.
    warnings.filterwarnings("ignore", "splitting_eigs: .* have not converged", RuntimeWarning)
    raise SystemExit(command(CALLS, __doc__))
