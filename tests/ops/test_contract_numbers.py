"""What every op promises about its numbers, over all samples of all ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from op_samples import DTYPES, OPS, Op, Sample
from op_samples.contract import assert_at_most_twice_plain_torch, assert_oracle, over, tolerance
from op_samples.numbers import LAYOUTS, doubled, largest, threads
from torch import Tensor

import growkernels as gk

LOW = [torch.float32, torch.bfloat16, torch.float16]
CHANNELS_LAST = LAYOUTS["channels_last"]


@pytest.fixture(autouse=True)
def algorithm() -> Iterator[Callable[[str], None]]:
    """Sets the algorithm of convolutions for one test."""
    before = gk.conv_algorithm()
    yield gk.set_conv_algorithm
    gk.set_conv_algorithm(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over("samples")
def test_error_is_at_most_twice_plain_torch(
    op: Op, sample: Sample, dtype: torch.dtype, algorithm: Callable[[str], None]
) -> None:
    """The results and every gradient, of contiguous tensors and of images in channels_last."""
    algorithm("direct")
    tensors = sample.tensors(dtype)
    assert_at_most_twice_plain_torch(op, tensors, sample, Tensor.contiguous)
    if any(len(shape) == 4 for shape in sample.shapes):
        assert_at_most_twice_plain_torch(op, tensors, sample, CHANNELS_LAST)


@pytest.mark.parametrize("name", ["auto", "winograd"])
@over("convolved")
def test_error_of_other_algorithms(
    op: Op, sample: Sample, name: str, algorithm: Callable[[str], None]
) -> None:
    algorithm(name)
    for arrange in (Tensor.contiguous, CHANNELS_LAST):
        assert_oracle(op, sample.tensors(torch.float32), sample, arrange)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["auto", "winograd"])
@over("few")
def test_error_of_other_algorithms_in_16_bit(
    op: Op, sample: Sample, name: str, dtype: torch.dtype, algorithm: Callable[[str], None]
) -> None:
    algorithm(name)
    assert_oracle(op, sample.tensors(dtype), sample)


@pytest.mark.parametrize("name", ["auto", "winograd"])
@over("few")
def test_float64_is_never_winograd(
    op: Op, sample: Sample, name: str, algorithm: Callable[[str], None]
) -> None:
    tensors = sample.tensors(torch.float64)
    algorithm("direct")
    expected = op.with_gradients(op.function, tensors, sample)
    algorithm(name)
    assert all(map(torch.equal, op.with_gradients(op.function, tensors, sample), expected))


@pytest.mark.parametrize("layout", LAYOUTS)
@over("few")
def test_strides_do_not_matter(op: Op, sample: Sample, layout: str) -> None:
    """Of no tensor, nor of the gradients of the results."""
    for dtype in LOW:
        assert_oracle(op, sample.tensors(dtype), sample, LAYOUTS[layout])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over("empty")
def test_zero_sizes(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    assert_oracle(op, sample.tensors(dtype), sample)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over("empty_for_torch")
def test_zero_sizes_that_torch_refuses(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    tensors = sample.tensors(dtype)
    y, *gradients = op.with_gradients(op.function, tensors, sample)
    assert [g.shape for g in (y, *gradients)] == [t.shape for t in (tensors[-1], *tensors)]
    assert not any(g.any() for g in (y, *gradients))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over("large")
def test_same_bits_every_time_and_threads_only_regroup_the_sums(
    op: Op, sample: Sample, dtype: torch.dtype, algorithm: Callable[[str], None]
) -> None:
    tensors = sample.tensors(dtype)
    expected = op.with_gradients(op.oracle, doubled(tensors), sample)
    for name in ("direct", "winograd") if tensors[0].dim() == 4 else ("auto",):
        algorithm(name)
        for count in (1, 2, 5):
            with threads(count):
                first = op.with_gradients(op.function, tensors, sample)
                again = op.with_gradients(op.function, tensors, sample)
                assert all(map(torch.equal, first, again))
                alone = op.results(op.function, tensors, sample)
                for _ in range(3):
                    assert all(map(torch.equal, alone, op.results(op.function, tensors, sample)))
            for mine, exact in zip(first, expected, strict=True):
                assert largest(mine, exact) <= tolerance(op, dtype)


@pytest.mark.parametrize("name", ["direct", "winograd"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@over("poisoned")
def test_nan_and_inf_propagate(
    op: Op, sample: Sample, value: float, name: str, algorithm: Callable[[str], None]
) -> None:
    """Wherever plain torch gives no finite value; Winograd may spread it over a tile."""
    algorithm(name)
    for poisoned in range(len(sample.shapes)):
        tensors = sample.tensors(torch.float32)
        if op.takes_lists:  # what a ReLU hides may be anything
            tensors = [t.abs() for t in tensors]
        tensors[poisoned].view(-1)[3 % tensors[poisoned].numel()] = value
        actual = op.results(op.function, tensors, sample)
        expected = op.results(op.plain, tensors, sample)
        finite = [y.isfinite() for y in expected]
        assert value == torch.inf or not all(bool(f.all()) for f in finite)
        for mine, right in zip(actual, finite, strict=True):
            assert not mine[~right].isfinite().any()
            if name == "direct" and poisoned not in op.spreads:
                assert torch.equal(mine.isfinite(), right)


@pytest.mark.parametrize("name", ["direct", "winograd"])
@over("poisoned")
def test_nan_in_a_gradient_propagates(
    op: Op, sample: Sample, name: str, algorithm: Callable[[str], None]
) -> None:
    if op.takes_lists:
        pytest.skip("what a ReLU hides of it may be anything")
    algorithm(name)

    def poison(weights: Tensor) -> Tensor:
        weights = weights.clone()
        weights.view(-1)[weights.numel() // 2] = torch.nan
        return weights

    tensors = sample.tensors(torch.float32)
    actual = op.with_gradients(op.function, tensors, sample, poison)
    expected = op.with_gradients(op.plain, tensors, sample, poison)
    assert not all(bool(y.isfinite().all()) for y in expected)
    for mine, plain in zip(actual, expected, strict=True):
        assert not mine[~plain.isfinite()].isfinite().any()


@pytest.mark.parametrize("op", OPS.values(), ids=str)
@hypothesis.given(data=st.data())
def test_any_shapes(op: Op, data: st.DataObject) -> None:
    sample = data.draw(op.drawn)
    dtype = data.draw(st.sampled_from(DTYPES))
    gk.set_conv_algorithm(data.draw(st.sampled_from(["auto", "direct", "winograd"])))
    tensors = sample.tensors(dtype)
    assert_oracle(op, tensors, sample, CHANNELS_LAST if data.draw(st.booleans()) else Tensor.clone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@over("samples")
def test_composed_form_for_other_devices(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    """What runs on devices without kernels of their own, called in place of the CPU's kernels."""
    composed = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    registered = getattr(torch.ops.growkernels, op.name).default
    tensors = sample.tensors(dtype)
    found = registered.redispatch(composed, *op.registered(tensors, sample.arguments))
    actual = [found] if isinstance(found, Tensor) else found
    expected = op.results(op.oracle, doubled(tensors), sample)
    for mine, exact in zip(actual, expected, strict=True):
        assert largest(mine, exact) <= tolerance(op, dtype)
