"""Memory that a process keeps after many calls of different shapes.

    python -m benchmarks.memory_growth

A growing network has new sizes at every step. Each family runs in a process of its own, all dtypes
one after the other, first on some shapes of the largest size, which fill the buffers that are kept,
then on `--shapes` random ones. What the process holds more at the end than after the warm-up is
printed, in MB, beside the same for the product of matrices or the convolution of torch itself.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LARGEST = 256
_WARM_UP = 40

Family = Callable[[random.Random, torch.dtype, int], None]


def _pick(rng: random.Random, least: int, most: int) -> int:
    return most if most == least else rng.randint(least, most)


def _splitting_hvp(rng: random.Random, dtype: torch.dtype, least: int) -> None:
    import growkernels as gk

    rows, width, neurons = (_pick(rng, least, _LARGEST) for _ in range(3))
    k = _pick(rng, 1, 3)
    x, w = torch.ones(rows, width, dtype=dtype), torch.ones(rows, neurons, dtype=dtype)
    gk.splitting_hvp(x, w, torch.ones(neurons, k, width, dtype=dtype))


def _virtual_grads(rng: random.Random, dtype: torch.dtype, least: int) -> None:
    import growkernels as gk

    layer = rng.choice(["linear_relu", "residual"])
    h = torch.ones(_pick(rng, least, _LARGEST), _pick(rng, least, _LARGEST), dtype=dtype)
    gk.virtual_grad_norms([h], [h], layer)


def _images(rng: random.Random, dtype: torch.dtype, least: int) -> torch.Tensor:
    sizes = (_pick(rng, min(least, 4), 4), _pick(rng, min(least, 48), 48), 12, 12)
    return torch.ones(sizes, dtype=dtype).contiguous(memory_format=torch.channels_last)


def _splitting_hvp_conv2d(rng: random.Random, dtype: torch.dtype, least: int) -> None:
    import growkernels as gk

    x, neurons = _images(rng, dtype, least), _pick(rng, min(least, 48), 48)
    w, v = (
        torch.ones(s, dtype=dtype) for s in ((len(x), neurons, 12, 12), (neurons, x.shape[1], 3, 3))
    )
    gk.set_conv_algorithm(rng.choice(["winograd", "direct"]))
    gk.splitting_hvp_conv2d(x, w, v, padding=1)


def _basis_conv2d(rng: random.Random, dtype: torch.dtype, least: int) -> None:
    import growkernels as gk

    x, filters = _images(rng, dtype, least), _pick(rng, min(least, 24), 24)
    kernel = rng.choice([1, 3])
    basis = torch.ones(filters, x.shape[1], kernel, kernel, dtype=dtype, requires_grad=True)
    coeff = torch.ones(_pick(rng, min(least, 32), 32), filters, dtype=dtype, requires_grad=True)
    gk.set_conv_algorithm("winograd")
    y = gk.basis_conv2d(x.requires_grad_(), basis, coeff, padding=kernel // 2)
    y.backward(torch.ones_like(y))


def _torch_mm(rng: random.Random, dtype: torch.dtype, least: int) -> None:
    rows, width, neurons = (_pick(rng, least, _LARGEST) for _ in range(3))
    x, w = torch.ones(rows, width, dtype=dtype), torch.ones(rows, neurons, dtype=dtype)
    torch.mm(x.t(), w)


def _torch_conv2d(rng: random.Random, dtype: torch.dtype, least: int) -> None:
    x, filters = _images(rng, dtype, least), _pick(rng, min(least, 24), 24)
    kernel = torch.ones(filters, x.shape[1], 3, 3, dtype=dtype, requires_grad=True)
    y = F.conv2d(x.requires_grad_(), kernel, padding=1)
    y.backward(torch.ones_like(y))


FAMILIES: dict[str, Family] = {
    "splitting_hvp": _splitting_hvp,
    "splitting_hvp_conv2d": _splitting_hvp_conv2d,
    "virtual_grads": _virtual_grads,
    "basis_conv2d": _basis_conv2d,
    "torch.mm": _torch_mm,
    "torch.conv2d": _torch_conv2d,
}


def growth(family: str, shapes: int, dtypes: tuple[torch.dtype, ...]) -> float:
    """MB that this process holds more after `shapes` calls, some warm-up of large ones apart."""
    rng, run = random.Random(0), FAMILIES[family]
    for dtype in dtypes:
        for _ in range(_WARM_UP):
            run(rng, dtype, _LARGEST)
    before = _resident()
    for index in range(shapes):
        run(rng, dtypes[index % len(dtypes)], 1)
    return (_resident() - before) / 1e6


def _resident() -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", choices=[[], *FAMILIES], help="all by default")
    parser.add_argument("--shapes", type=int, default=10_000, help="calls of each family")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(
            f"{options.here:24} {growth(options.here, options.shapes, _DTYPES):8.1f} MB", flush=True
        )
        return
    for family in options.families or FAMILIES:
        subprocess.run(
            [
                sys.executable,
                "-m",
                __spec__.name,
                "--here",
                family,
                "--shapes",
                str(options.shapes),
            ],
            check=True,
        )


if __name__ == "__main__":
    main()
