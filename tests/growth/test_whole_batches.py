"""A batch is added to what was recorded whole or not at all, wherever an exception strikes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from small_networks import batches, cnn, mlp
from torch import Tensor, nn
from torch.nn import functional as F

import growkernels
from growkernels.growth import LayerInsertion, NeuronScaling

ROOT = str(Path(growkernels.__file__).parent)
Driver = LayerInsertion | NeuronScaling
BUILDS: list[Callable[[nn.Module], Driver]] = [
    lambda model: LayerInsertion(model),
    lambda model: NeuronScaling(model, kinds=("linear", "conv2d"), generator=torch.Generator()),
    lambda model: NeuronScaling(model, "gradient_sum", kinds=("linear", "conv2d")),
]


class Injected(BaseException):
    """As unlikely to be handled as a KeyboardInterrupt."""


def record(driver: Driver, batch: tuple[Tensor, Tensor], scale: float) -> None:
    x, y = batch
    with driver.recording(loss_scale=scale):
        (scale * F.cross_entropy(driver.model(x), y)).backward()


def numbers(driver: Driver) -> list[Any]:
    if isinstance(driver, LayerInsertion):
        merits = driver.merits()
        return [merits.batches, *merits.values.tolist(), merits.base]
    scores = driver.scores()
    return [scores.batches, *(v for values in scores.values.values() for v in values.tolist())]


def interrupted(run: Callable[[], None], at: int | None) -> int:
    """How many lines of growkernels ran outside of forward passes; raises at one of them."""
    count = 0

    def local(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count == at:
                sys.settrace(None)
                raise Injected
        return local

    def calls(frame: FrameType, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(ROOT) else None

    previous = sys.gettrace()
    sys.settrace(calls)
    try:
        run()
    finally:
        sys.settrace(previous)
        torch.set_grad_enabled(True)  # a line that leaves no_grad() cannot be interrupted otherwise
    return count


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("network", [mlp, cnn])
def test_an_exception_at_any_line_leaves_the_batches_before(
    build: Callable[[nn.Module], Driver], network: Callable[[], nn.Module]
) -> None:
    model = network()
    first, second, third = batches(model, 3, 6)
    driver = build(model)
    record(driver, first, 1.0)
    record(driver, second, 8.0)
    before = numbers(driver)
    plain = build(model)
    for batch in (first, second, third):
        record(plain, batch, 1.0)
    after = numbers(plain)
    plain.close()
    lines = interrupted(lambda: record(build(network()), third, 0.5), None)
    assert lines > 50
    for at in range(1, lines, max(1, lines // 60)):
        with suppress(Injected):
            interrupted(lambda: record(driver, third, 0.5), at)
        found = numbers(driver)
        expected = before if found[0] == before[0] else after
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-9, nan_ok=True), at
        if expected is after:
            driver.reset()
            record(driver, first, 1.0)
            record(driver, second, 8.0)
    record(driver, third, 0.5)
    assert numbers(driver) == pytest.approx(after, rel=1e-3, abs=1e-9, nan_ok=True)
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_failure_while_scales_change_does_not_change_merits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = mlp()
    inserter = LayerInsertion(model)
    first, second = batches(model, 2, 6)
    record(inserter, first, 1.0)
    before = inserter.merits()
    add = Tensor.add_
    for number in range(1, 12):
        count = 0

        def failing(self: Tensor, *args: Any, at: int = number, **options: Any) -> Tensor:
            nonlocal count
            count += 1
            if count == at:
                raise MemoryError
            return add(self, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "add_", failing)
            try:
                record(inserter, second, 1024.0)
            except MemoryError:
                pass
            else:
                break
        after = inserter.merits()
        assert torch.equal(after.values, before.values)
        assert after.base == before.base
        assert after.batches == 1
    assert number > 3
