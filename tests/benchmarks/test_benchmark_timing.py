"""Interleaving, calibration, and the agreement of variants, on a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.case import OURS, Call, Case, Workload, check_agreement
from benchmarks.ceilings import measure_all
from benchmarks.interleave import RoundRobin, wall_timer

CPU = torch.device("cpu")


class World:
    """A clock, and calls that take a known time on it and leave a trace."""

    def __init__(self) -> None:
        self.now = 0.0
        self.trace: list[str] = []

    def clock(self) -> float:
        return self.now

    def call(self, name: str, seconds: float) -> Call:
        def run() -> None:
            self.trace.append(name)
            self.now += seconds

        return run

    def ceiling(self) -> float:
        self.trace.append("ceiling")
        self.now += 1.0
        return 100.0


def round_robin(world: World, **seconds: float) -> RoundRobin:
    calls = {name: world.call(name, value) for name, value in seconds.items()}
    return RoundRobin(calls, list(seconds), wall_timer(world.clock), world.ceiling)


def test_rounds_time_the_variants_in_the_declared_order_with_ours_last() -> None:
    world = World()
    rounds = round_robin(world, eager=0.5, compiled=0.25, **{OURS: 0.125})
    for _ in range(3):
        rounds.opponents()
        rounds.ours()
    assert world.trace == ["eager", "compiled", "ceiling", OURS] * 3
    assert rounds.seconds == {"eager": [0.5] * 3, "compiled": [0.25] * 3, OURS: [0.125] * 3}
    assert rounds.ceilings == [100.0] * 3


def test_short_calls_are_repeated_and_reported_per_call() -> None:
    world = World()
    rounds = round_robin(world, eager=1.0, **{OURS: 2**-12})
    round_seconds = rounds.calibrate(seconds_per_timing=0.03125)
    assert rounds.calls_per_timing["eager"] == 1
    assert rounds.calls_per_timing[OURS] >= 64  # at least half of 0.03125 s
    assert round_seconds == 1.0 + rounds.calls_per_timing[OURS] * 2**-12
    world.trace.clear()
    rounds.ours()
    assert world.trace == [OURS] * rounds.calls_per_timing[OURS]
    assert rounds.seconds[OURS] == [2**-12]


def test_ours_must_come_last() -> None:
    with pytest.raises(ValueError, match="must end with 'growkernels'"):
        RoundRobin({}, [OURS, "eager"], wall_timer())


def case_of(calls: dict[str, Call], opponents: tuple[str, ...] = ("eager",)) -> Case:
    def build(device: torch.device) -> Workload:
        return Workload(calls, flops=1.0, bytes=1.0, tolerance=1e-3)

    return Case("toy", "[2]", torch.float32, "contiguous", "norms", opponents, build)


@pytest.mark.parametrize(
    ("theirs", "agrees"), [(1.0005, True), (1.1, False), (float("nan"), False)]
)
def test_variants_that_differ_are_refused(theirs: float, agrees: bool) -> None:
    case = case_of({"eager": lambda: torch.tensor([theirs, 1.0]), OURS: lambda: torch.ones(2)})
    if agrees:
        check_agreement(case, case.prepare(CPU))
    else:
        with pytest.raises(RuntimeError, match="eager and growkernels differ"):
            check_agreement(case, case.prepare(CPU))


def test_every_tensor_of_a_list_is_compared() -> None:
    lists: dict[str, Callable[[], object]] = {
        "eager": lambda: [torch.ones(2), torch.zeros(2)],
        OURS: lambda: [torch.ones(2), torch.ones(2)],
    }
    case = case_of(lists)
    with pytest.raises(RuntimeError, match="differ"):
        check_agreement(case, case.prepare(CPU))


def test_a_variant_without_a_result_is_not_compared() -> None:
    case = case_of({"eager": lambda: None, OURS: lambda: torch.ones(2)})
    check_agreement(case, case.prepare(CPU))


def test_declared_and_built_variants_must_be_the_same() -> None:
    case = case_of({"eager": lambda: None, OURS: lambda: None}, opponents=("eager", "compiled"))
    with pytest.raises(ValueError, match="declares the variants"):
        case.prepare(CPU)


def test_all_ceilings_are_measured_in_torchs_own_setting_afterwards() -> None:
    before = torch.get_float32_matmul_precision()
    ceilings = measure_all(CPU, rounds=1)
    assert set(ceilings) == {"bfloat16", "float32", "copy"}
    assert all(rate > 1e8 for rate in ceilings.values())
    assert torch.get_float32_matmul_precision() == before
