"""Calls that once failed, and some fresh ones: right against float64, or one clear error."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from fuzz_runs import Case, long_run
from fuzzing import CALLS, check, make_case


@pytest.mark.parametrize(
    "case", CALLS.stored(), ids=lambda case: f"{case['family']}-{case['seed']}"
)
def test_what_once_failed(case: Case) -> None:
    check(case)


def test_fresh_calls() -> None:
    """Most calls are computed: what is refused is no test of the kernels."""
    rng = random.Random(0)
    outcomes = [check(make_case(rng)) for _ in range(60)]
    assert outcomes.count("right") >= 30


def test_wrong_results_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import growkernels as gk

    right = gk.splitting_hvp
    monkeypatch.setattr(gk, "splitting_hvp", lambda *a: right(*a) * 1.001)
    rng, found = random.Random(0), 0
    usual = {"family": "splitting_hvp", "dtype": "float32", "values": ["normal"] * 4}
    for _ in range(20):
        try:
            check({**make_case(rng), **usual, "sizes": [33] * 6})
        except AssertionError:
            found += 1
    assert found == 20


def test_a_long_run_goes_on_at_the_next_seed(tmp_path: Path) -> None:
    made: list[Case] = []

    def checked(case: Case) -> str:
        made.append(case)
        if len(made) == 2:
            raise AssertionError("wrong")
        return "right" if len(made) % 4 else "one clear error"

    calls = replace(CALLS, check=checked, of_a_seed=6)
    record = tmp_path / "record.json"
    assert long_run(calls, 12, record, store=False).calls == 12
    assert long_run(calls, 18, record, store=False).calls == 6
    assert long_run(calls, 18, record, store=False).calls == 0
    (entry,) = json.loads(record.read_text())
    assert (entry["first_seed"], entry["last_seed"], entry["calls"]) == (0, 2, 18)
    assert (entry["right"], entry["refused"], entry["failed"]) == (13, 4, [made[1]])
    assert len({json.dumps(case) for case in made}) == 18
