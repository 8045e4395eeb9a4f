"""When insertions are tried."""

from __future__ import annotations

import math

import pytest
import torch

from growkernels.growth import FixedStep, Interval, LossPlateau, MeritRatio, Merits, Trigger


def merits(value: float, base: float) -> Merits:
    return Merits(("a",), torch.tensor([value]).double(), base, None, 1, "frobenius")


def test_fixed_step() -> None:
    trigger = FixedStep([3, 5])
    assert [step for step in range(8) if trigger.due(step, 1.0)] == [3, 5]
    assert trigger.accept(merits(0.0, 1.0))


def test_interval() -> None:
    trigger = Interval(warmup=50, every=30)
    due = [epoch for epoch in range(300) if trigger.due(epoch, 1.0)]
    assert due == [50, 80, 110, 140, 170, 200, 230, 260, 290]
    assert trigger.accept(merits(0.0, 1.0))
    for warmup, every in ((-1, 30), (50, 0)):
        with pytest.raises(ValueError, match="at least 0 and at least 1 steps"):
            Interval(warmup, every)


def test_loss_plateau() -> None:
    trigger = LossPlateau(patience=2, threshold=0.1)
    losses = [1.0, 0.8, 0.79, 0.78, 0.77, 0.75, 0.5, 0.49, 0.6]
    due = [step for step, loss in enumerate(losses) if trigger.due(step, loss)]
    # 0.79 and 0.78 are within 10 % of 0.8; then 0.77, 0.75 within 10 % of 0.78; then a fall.
    assert due == [3, 5, 8]


def test_a_resumed_plateau_fires_at_the_same_step() -> None:
    losses = [1.0, 0.99, 0.98, 0.97, 0.96, 0.5, 0.5, 0.5]
    whole, first = LossPlateau(3, 0.2), LossPlateau(3, 0.2)
    expected = [whole.due(step, loss) for step, loss in enumerate(losses)]
    got = [first.due(step, loss) for step, loss in enumerate(losses[:3])]
    second = LossPlateau(3, 0.2)
    second.load_state_dict(first.state_dict())
    got += [second.due(step, loss) for step, loss in enumerate(losses[3:], 3)]
    assert got == expected
    assert any(expected)


def test_merit_ratio() -> None:
    trigger = MeritRatio(tau=2.0, every=4)
    assert [step for step in range(10) if trigger.due(step, 1.0)] == [4, 8]
    assert trigger.accept(merits(2.0, 1.0))
    assert not trigger.accept(merits(1.9, 1.0))


@pytest.mark.parametrize("trigger", [FixedStep([1]), LossPlateau(2), MeritRatio(1.0, 2)])
def test_one_protocol(trigger: Trigger) -> None:
    trigger.due(1, 0.5)
    state = trigger.state_dict()
    trigger.load_state_dict(state)
    assert trigger.state_dict() == state


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="patience is 0"):
        LossPlateau(0)
    with pytest.raises(ValueError, match="threshold is 1"):
        LossPlateau(1, threshold=1)
    with pytest.raises(ValueError, match="The loss at step 4 is NaN"):
        LossPlateau(1).due(4, math.nan)
    with pytest.raises(ValueError, match="every is 0"):
        MeritRatio(1.0, 0)
    with pytest.raises(ValueError, match="tau is 0"):
        MeritRatio(0, 1)
