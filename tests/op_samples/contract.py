"""What is asserted of an op over its samples, on whichever device their tensors are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from op_samples import OPS
from op_samples.numbers import doubled, largest, relative
from op_samples.table import Bad, Op, Sample


def over(part: str) -> pytest.MarkDecorator:
    """Parametrizes a test over one of the lists of samples of every op."""
    return pytest.mark.parametrize(
        ("op", "sample"),
        [
            pytest.param(op, sample, id=f"{op} {sample}")
            for op in OPS.values()
            for sample in getattr(op, part)
        ],
    )


BAD_CALLS = [
    pytest.param(bad, id=f"{op} {name}") for op in OPS.values() for name, bad in op.bad.items()
]


def tolerance(op: Op, dtype: torch.dtype) -> float:
    """Of the largest value of a result, whatever the algorithm."""
    default = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.03, torch.float16: 4e-3}
    return op.tolerance.get(dtype, default[dtype])


def rounding_of_sum(terms: int, dtype: torch.dtype) -> float:
    """How far a float32 sum of so many terms may be off, relative to it; 0 for other dtypes.

    Each of n additions rounds by at most u = eps / 2 of the whole sum; signs are as good as random,
    so n of them make sqrt(n) u (Higham and Mary 2019) in the worst order, one after another. In how
    many partial sums a vendor adds is its own.
    """
    return math.sqrt(terms) * torch.finfo(dtype).eps / 2 if dtype == torch.float32 else 0.0


def assert_oracle(
    op: Op,
    tensors: list[Tensor],
    sample: Sample,
    arrange: Callable[[Tensor], Tensor] = Tensor.contiguous,
) -> None:
    """Results and gradients are those of the oracle, within the tolerance.

    Where the definition itself cancels, plain torch errs by more, and so may the op.
    """
    tensors = [arrange(t) for t in tensors]
    actual = op.with_gradients(op.function, tensors, sample, arrange)
    expected = op.with_gradients(op.oracle, doubled(tensors), sample, arrange)
    results = len(expected) - len(tensors)
    for index, (mine, exact) in enumerate(zip(actual, expected, strict=True)):
        assert mine.shape == exact.shape
        error = largest(mine, exact)
        allowed = tolerance(op, tensors[0].dtype)
        if index < results:
            allowed += rounding_of_sum(op.squares(sample), mine.dtype)
        if not error <= allowed:
            plain = op.with_gradients(op.plain, tensors, sample, arrange)[index]
            assert error <= 2 * largest(plain, exact), f"error {error:.1e} of number {index}"


def assert_at_most_twice_plain_torch(
    op: Op, tensors: list[Tensor], sample: Sample, arrange: Callable[[Tensor], Tensor]
) -> None:
    dtype = tensors[0].dtype
    expected = op.with_gradients(op.oracle, doubled(tensors), sample)
    theirs = op.with_gradients(op.plain, tensors, sample)
    actual = op.with_gradients(op.function, [arrange(t) for t in tensors], sample, arrange)
    results = len(expected) - len(tensors)
    for i, (mine, plain, exact) in enumerate(zip(actual, theirs, expected, strict=True)):
        assert mine.shape == exact.shape
        assert mine.dtype == (op.dtype(dtype) if i < results else dtype)
        assert op.keeps_layout or i >= results or mine.is_contiguous()
        # float64 has no finer oracle: both sides carry rounding errors of this size.
        roundings = 64 if dtype == torch.float64 else 1.0
        roundings *= op.slack if i < results else op.gradient_slack
        slack = roundings * torch.finfo(mine.dtype).eps
        slack += rounding_of_sum(op.summands(sample), mine.dtype)
        if i < results:
            slack += rounding_of_sum(op.squares(sample), mine.dtype)
        if exact.numel() < 10:  # of so few values one may be a small difference
            slack += torch.finfo(dtype).eps / 2
        assert relative(mine, exact) <= 2 * relative(plain, exact) + slack, i


def assert_refused_on(device: str, bad: Bad) -> None:
    """In the words for the CPU, whose tensors are copied to the device."""
    if any(word in bad.message for word in ("on meta", "share memory", "not contiguous")):
        pytest.skip("says something of devices or memory that copies do not keep")

    def moved(argument: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), argument)

    with pytest.raises(bad.error, match=bad.message):
        bad.function(*moved(bad.arguments), **moved(dict(bad.options)))
