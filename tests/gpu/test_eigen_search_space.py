"""The Lanczos solver's step in one kernel, on a GPU, beside the same step in plain torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from op_samples.eigen import symmetric
from torch import Tensor

from growkernels.solvers.search_space import SearchSpace

pytestmark = pytest.mark.gpu

STATE = ("_basis", "_images", "_projected", "_previous", "_dead", "norms", "unit")


@pytest.mark.parametrize(("n", "d"), [(1, 12), (300, 97), (1536, 384), (20, 1500)])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_takes_the_steps_of_plain_torch(k: int, n: int, d: int, dtype: torch.dtype) -> None:
    if n * d * d * dtype.itemsize > 2**30:
        n = 64
    a = symmetric(n, d, dtype, "cuda")
    start = torch.randn(n, k, d, dtype=dtype, device="cuda")
    plain, fused = SearchSpace(start), SearchSpace(start)
    error = 1e3 * torch.finfo(dtype).eps * a.abs().amax()
    for _ in range(9 if d > 12 else 5):
        product = fused.direction @ a
        expected = plain.extend(plain.direction @ a)
        found = copy.deepcopy(fused).extend(product)
        assert (found.values - expected.values).abs().max() <= error
        plain.add(expected.residuals)
        fused.advance(product)
        assert fused.count == plain.count
    assert (fused.norms - plain.norms).abs().max() <= error


@pytest.mark.parametrize("k", [1, 2])
def test_converges_and_repeats_its_bits(k: int) -> None:
    a = symmetric(500, 64, torch.float32, "cuda")
    start = torch.randn(500, k, 64, device="cuda")
    spaces = SearchSpace(start), SearchSpace(start)
    for _ in range(60):
        for space in spaces:
            space.advance(space.direction @ a)
    for name in STATE:
        one, other = (getattr(space, name).nan_to_num(7.0) for space in spaces)
        assert one.equal(other), name
    values = spaces[0].extend(spaces[0].direction @ a).values.double().cpu()
    exact = torch.linalg.eigvalsh(a.double().cpu())
    missed = (values - exact[:, :k]).abs() > 1e-4 * exact.abs().amax(1, keepdim=True)
    # A neuron may settle for a neighbouring eigenpair, see smallest_eigenpairs.
    assert missed.any(1).sum() <= 2


def test_nan_stays_with_its_neuron() -> None:
    a = symmetric(3, 20, torch.float32, "cuda")
    space = SearchSpace(torch.randn(3, 1, 20, device="cuda"))
    for step in range(9):
        product = space.direction @ a
        if step == 2:
            product[1, 0, 7] = math.nan
        space.advance(product)
    values = space.extend(space.direction @ a).values
    assert values.isnan().flatten().tolist() == [False, True, False]


def test_wants_the_state_it_knows() -> None:
    space = SearchSpace(torch.randn(3, 1, 20, device="cuda"))
    with pytest.raises(ValueError, match="k of 1 or 2"):
        space.advance(torch.randn(3, 0, 20, device="cuda"))
    with pytest.raises(RuntimeError, match="basis of shape"):
        space.advance(torch.randn(2, 1, 20, device="cuda"))


@pytest.mark.parametrize("k", [1, 2])
def test_nothing_waits_and_a_graph_replays_it(
    k: int,
    no_host_sync: Callable[[], AbstractContextManager[None]],
    replayed: Callable[[Callable[[], Any]], Any],
) -> None:
    a = symmetric(40, 50, torch.float32, "cuda")
    start = torch.randn(40, k, 50, device="cuda")

    def steps() -> tuple[Tensor, Tensor]:
        space = SearchSpace(start)
        for _ in range(8):
            space.advance(space.direction @ a)
        pairs = space.extend(space.direction @ a)
        return pairs.values, pairs.vectors

    with no_host_sync():
        expected = steps()
    for got, want in zip(replayed(steps), expected, strict=True):
        assert got.equal(want)
