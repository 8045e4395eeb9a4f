"""Calls take turns, warm-up rounds are run and not timed, and progress counts them all."""

from __future__ import annotations

import pytest
import torch

from growkernels import timing


def test_every_call_has_its_turn_in_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order, progress = 0.0, [], []

    def call(name: str, seconds: float) -> None:
        nonlocal clock
        order.append(name)
        clock += seconds * len(order)

    monkeypatch.setattr(timing, "now", lambda device: clock)
    found = timing.interleaved_seconds(
        {"a": lambda: call("a", 1.0), "b": lambda: call("b", 10.0)},
        rounds=2,
        device=torch.device("cpu"),
        warm_up=1,
        progress=lambda done, of: progress.append((done, of)),
    )
    assert order == ["a", "b"] * 3
    assert found == {"a": [3.0, 5.0], "b": [40.0, 60.0]}  # the calls 3 to 6, at 1 or 10 times that
    assert progress == [(0, 3), (1, 3), (2, 3), (3, 3)]
