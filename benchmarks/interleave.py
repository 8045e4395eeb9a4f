"""Times the variants of a case in turn, round by round, so that each round's times are a pair.

On a shared machine speed drifts by tens of percent within seconds. Times taken next to each other
drift together, so the ratio within one round is far steadier than the ratio of two medians.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

from benchmarks.case import OURS, Call

# time_calls(call, n) runs `call` n times and returns the seconds all of them took together.
Timer = Callable[[Call, int], float]


def wall_timer(clock: Callable[[], float] = time.perf_counter) -> Timer:
    """Timer for calls that have finished when they return."""

    def time_calls(call: Call, calls: int) -> float:
        start = clock()
        for _ in range(calls):
            call()
        return clock() - start

    return time_calls


def noise_floor(
    call: Call, timer: Timer, calibration: Mapping[str, float], rounds: int = 15
) -> list[float]:
    """The ratios that one call against itself gives: no speed-up nearer to 1 means anything.

    `calibration` is for `RoundRobin.calibrate`.
    """
    again = "the same again"
    both = RoundRobin({again: call, OURS: call}, (again, OURS), timer)
    both.calibrate(**calibration)
    for _ in range(rounds):
        both.opponents()
        both.ours()
    pairs = zip(both.seconds[again], both.seconds[OURS], strict=True)
    return [first / second for first, second in pairs]


class RoundRobin:
    """Interleaved timing of `calls` in the order `variants`, which must end with ours.

    One round is `opponents()`, which times every opponent and then the ceiling, followed by
    `ours()`. The two are separate so that pytest-benchmark can time `ours()` itself.
    `ceiling`, when given, measures a rate (per second) on its own.
    """

    def __init__(
        self,
        calls: Mapping[str, Call],
        variants: Sequence[str],
        timer: Timer,
        ceiling: Callable[[], float] | None = None,
    ) -> None:
        if not variants or variants[-1] != OURS:
            raise ValueError(f"the order {list(variants)} must end with {OURS!r}")
        self._calls = calls
        self._variants = tuple(variants)
        self._timer = timer
        self._ceiling = ceiling
        self.calls_per_timing = dict.fromkeys(variants, 1)
        self.seconds: dict[str, list[float]] = {name: [] for name in variants}
        self.ceilings: list[float] = []

    def calibrate(self, seconds_per_timing: float = 0.02) -> float:
        """Choose how often each variant is called per timing; returns the length of a round [s].

        Every variant runs once first, so that warm-up is over. Short calls are repeated until one
        timing lasts about `seconds_per_timing`.
        """
        round_seconds = 0.0
        for name in self._variants:
            call = self._calls[name]
            self._timer(call, 1)
            calls, elapsed = 1, self._timer(call, 1)
            while elapsed < seconds_per_timing / 2:
                calls = math.ceil(calls * min(10.0, seconds_per_timing / max(elapsed, 1e-9)))
                elapsed = self._timer(call, calls)
            self.calls_per_timing[name] = calls
            round_seconds += elapsed
        return round_seconds

    def opponents(self) -> None:
        """The first part of a round: every opponent in order, then the ceiling."""
        for name in self._variants[:-1]:
            self._time(name)
        if self._ceiling is not None:
            self.ceilings.append(self._ceiling())

    def ours(self) -> None:
        """The second part of a round: growkernels."""
        self._time(OURS)

    def _time(self, name: str) -> None:
        calls = self.calls_per_timing[name]
        self.seconds[name].append(self._timer(self._calls[name], calls) / calls)
