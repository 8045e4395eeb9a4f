"""The measured example of learning rates after a growth, in a few steps."""

from __future__ import annotations

import pytest

from benchmarks import learning_rate_after_growth as example


def test_all_ways_share_the_steps_before_the_growth(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "STEPS", 8)
    monkeypatch.setattr(example, "GROWTH", 4)
    monkeypatch.setattr(example, "RUNS", 2)
    assert len({tuple(example.rate(way, step) for step in range(4)) for way in example.WAYS}) == 1
    assert example.rate("again from its peak", 4) == example.PEAK
    assert example.rate("a tenth of its peak", 4) == pytest.approx(0.1 * example.PEAK)
    example.main()
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| {way}" for way in example.WAYS]
