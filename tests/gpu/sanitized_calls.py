"""`python tests/gpu/sanitized_calls.py cuda`: small calls of all kernels, for compute-sanitizer.

Whether results are right is for the tests to say; here they only have to be finite, so that memory
that was read before it was written may show.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import growkernels as gk

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from op_samples import OPS, Op, Sample
from op_samples.basis_conv import CHOSEN
from op_samples.splitting import product

# With less work, or with narrower rows, other libraries' kernels are chosen.
BESIDE_THE_FEW: dict[str, list[Sample]] = {
    "basis_conv2d": [shape.sample() for shape in CHOSEN[1:]],
    "splitting_hvp": [product(197, 67, 3, 96), product(197, 67, 1, 580)],
}


def calls(op: Op, device: str, dtype: torch.dtype) -> Iterator[Tensor]:
    for sample in (*op.few, *BESIDE_THE_FEW.get(op.name, [])):
        yield from op.with_gradients(op.function, sample.tensors(dtype, device), sample)


def eigenpairs(device: str) -> Iterator[Tensor]:
    x, w = (t.to(device) for t in (torch.randn(197, 96), torch.randn(197, 5)))
    yield from gk.splitting_eigs(x, w, k=2)[:2]


def report(name: str, results: list[Tensor]) -> None:
    if not all(bool(result.isfinite().all()) for result in results):
        sys.exit(f"{name}: a result is not finite")
    print(f"{name}: {len(results)} tensors")


def main(device: str) -> None:
    torch.manual_seed(0)
    # What is compiled already comes first: Triton's compiler takes long under the sanitizer.
    for op in reversed(OPS.values()):
        for dtype in (torch.float32, torch.bfloat16):
            report(f"{op} {dtype}", list(calls(op, device, dtype)))
    report("splitting_eigs", list(eigenpairs(device)))


if __name__ == "__main__":
    main(*sys.argv[1:])
