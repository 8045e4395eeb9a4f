"""What every op promises, as on the CPU: of the same samples, against the same oracles."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from op_samples import DTYPES, Bad, Op, Sample
from op_samples.contract import BAD_CALLS, assert_oracle, assert_refused_on, over
from op_samples.numbers import LAYOUTS
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("full_precision")]

DEVICE = "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over("few")
def test_results_and_gradients(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    assert_oracle(op, sample.tensors(dtype, DEVICE), sample)


@pytest.mark.parametrize("layout", LAYOUTS)
@over("few")
def test_strides_do_not_matter(op: Op, sample: Sample, layout: str) -> None:
    """Of no tensor, nor of the gradients of the results; what lies between them is NaN."""
    for dtype in (torch.float32, torch.bfloat16):
        assert_oracle(op, sample.tensors(dtype, DEVICE), sample, LAYOUTS[layout])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@over("empty")
def test_zero_sizes(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    assert_oracle(op, sample.tensors(dtype, DEVICE), sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@over("large")
def test_same_bits_without_waiting_for_the_gpu(
    op: Op,
    sample: Sample,
    dtype: torch.dtype,
    no_host_sync: Callable[[], AbstractContextManager[None]],
) -> None:
    tensors = sample.tensors(dtype, DEVICE)

    def call() -> list[Tensor]:
        return op.results(op.function, tensors, sample)

    first = call()
    with no_host_sync():
        again = call()
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_bad_input_is_refused_in_the_same_words(bad: Bad) -> None:
    assert_refused_on(DEVICE, bad)
