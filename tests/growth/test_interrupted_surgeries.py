"""An exception at any line of a surgery leaves model, optimizer and driver as they were.

Every line of growkernels that a surgery runs raises once, in a run of its own.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import growkernels
from growkernels.growth import LayerInsertion, NeuronScaling, insertions, rebuild
from growkernels.nn import convert, separate_attention

ROOT = str(Path(growkernels.__file__).parent)
Place = tuple[str, int]


class Injected(BaseException):
    """As unlikely to be handled as a KeyboardInterrupt."""


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)),
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(1),
        nn.Unflatten(1, (6, 4)),
        Attending(),
        nn.Flatten(1),
        nn.Linear(24, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )


def loss(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(6, 8, generator=generator)
    return F.cross_entropy(model(x), torch.arange(6) % 3)


Surgery = Callable[[], object]
Driver = LayerInsertion | NeuronScaling | None


def converting(model: nn.Module, optimizer: Optimizer) -> tuple[Surgery, Driver]:
    return lambda: convert(model, {"1": 2}, optimizer), None


def converting_back(model: nn.Module, optimizer: Optimizer) -> tuple[Surgery, Driver]:
    convert(model, {"1": 2}, optimizer)
    return lambda: convert(model, {"1": 1.0}, optimizer), None


def separating(model: nn.Module, optimizer: Optimizer) -> tuple[Surgery, Driver]:
    return lambda: separate_attention(model, optimizer), None


def inserting(model: nn.Module, optimizer: Optimizer) -> tuple[Surgery, Driver]:
    driver = LayerInsertion(model)
    with driver.recording():
        loss(model).backward()
    return lambda: driver.insert("8", optimizer, sample=torch.ones(2, 8)), driver


def growing(model: nn.Module, optimizer: Optimizer) -> tuple[Surgery, Driver]:
    driver = NeuronScaling(
        model, layers=["1", "7"], kinds=("linear", "conv2d"), widen=("fc1",), rows=8
    )
    with driver.recording():
        loss(model).backward()
    chosen = driver.select(driver.scores(iters=1), budget=300, min_eligible=1)
    assert set(chosen.neurons) == {"1", "7"}
    return lambda: driver.grow(chosen, optimizer, sample=torch.ones(2, 8)), driver


@functools.cache
def records() -> list[dict[str, Any]]:
    other = network()
    for prepare in (growing, inserting):
        surgery, driver = prepare(other, torch.optim.SGD(other.parameters(), lr=0.1))
        surgery()
        assert driver is not None
        driver.close()
    return insertions(other)


def rebuilding(model: nn.Module, optimizer: Optimizer) -> tuple[Surgery, Driver]:
    repeated = records()
    return lambda: rebuild(model, repeated, optimizer), None


SURGERIES = [converting, converting_back, separating, inserting, growing, rebuilding]


def prepared(prepare: Callable[..., tuple[Surgery, Driver]]) -> tuple[Any, ...]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss(model).backward()
    optimizer.step()
    return (model, optimizer, *prepare(model, optimizer))


def contents(model: nn.Module, optimizer: Optimizer, driver: Driver) -> list[Any]:
    found: list[Any] = []
    for path, module in model.named_modules():
        found.append((path, id(module)))
        for name, value in vars(module).items():
            entries = list(value.items()) if isinstance(value, dict) else value
            found.append((path, name, _by_identity(entries)))
    for parameter in model.parameters():
        grad = None if parameter.grad is None else parameter.grad.tolist()
        found.append((id(parameter), parameter.tolist(), grad))
    for group in optimizer.param_groups:
        found.append({key: _by_identity(value) for key, value in group.items()})
    for parameter, state in optimizer.state.items():
        found.append((id(parameter), {key: value.tolist() for key, value in state.items()}))
    found.append(_by_identity(list(vars(driver).items())) if driver is not None else None)
    return found


def _by_identity(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_by_identity(entry) for entry in value]
    plain = value is None or isinstance(value, str | int | float)
    return value if plain else id(value)


def traced(surgery: Surgery, raise_at: tuple[Place, int] | None) -> list[Place]:
    """The lines that a surgery runs; raises at the given one, the n-th time that it runs."""
    lines: list[Place] = []
    times = 0

    def local(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal times
        if event == "line":
            place = (frame.f_code.co_filename, frame.f_lineno)
            if raise_at is None:
                lines.append(place)
            elif place == raise_at[0]:
                times += 1
                if times == raise_at[1]:
                    sys.settrace(None)
                    raise Injected
        return local

    def calls(frame: FrameType, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(ROOT) else None

    previous = sys.gettrace()
    sys.settrace(calls)
    try:
        surgery()
    finally:
        sys.settrace(previous)
        # A line that leaves `with torch.no_grad()` can only be interrupted by a tracer.
        torch.set_grad_enabled(True)
    return lines


@pytest.mark.parametrize("prepare", SURGERIES)
def test_an_exception_at_any_line_is_undone(prepare: Callable[..., Any]) -> None:
    *_, surgery, driver = prepared(prepare)
    lines = traced(surgery, None)
    assert len(set(lines)) > 50
    points = [(line, 1) for line in dict.fromkeys(lines)]
    # Loops: their last turn too, when part of the work is done.
    counts = Counter(lines)
    points += [point for point in counts.items() if point[1] > 1]
    points = points[:: 1 + len(points) // 200]  # a long surgery at every second or third line
    not_undone = []
    for number, point in enumerate(points):
        model, optimizer, surgery, driver = prepared(prepare)
        before = contents(model, optimizer, driver)
        with pytest.raises(Injected):
            traced(surgery, point)
        if contents(model, optimizer, driver) != before:
            not_undone.append(point)
        elif number % 10 == 0:
            surgery()
            loss(model).backward()
            optimizer.step()
            if driver is not None:
                driver.close()
                assert not any(module._forward_hooks for module in model.modules())
    assert not_undone == []
