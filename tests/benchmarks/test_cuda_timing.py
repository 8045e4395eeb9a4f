"""Timing on a GPU, on one made up here: a queue that the host fills while the GPU works on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.case import OURS, Call
from benchmarks.cuda_timing import COLD, WARM, GraphTimer, QueuedTimer, choose_timer
from benchmarks.interleave import RoundRobin

CYCLES_PER_SECOND = 1e9
FLUSH_SECONDS = 40e-6


class Gpu:
    """Works through its queue in order, never before the host has queued the work.

    The host needs `launch` seconds to queue anything. A call is `work(seconds)`: so long it takes
    with its inputs in the cache, and twice as long where the cache was flushed before it.
    """

    def __init__(self, launch: float = 5e-6) -> None:
        self.host = self.done = 0.0
        self.launch = launch
        self.cold = self.capturing = False
        self.sleeps: list[int] = []
        self.captured: list[int] = []
        self.queued: list[tuple[float, bool]] = []

    def _queue(self, seconds: float) -> None:
        self.host += self.launch
        self.done = max(self.done, self.host) + seconds

    def work(self, seconds: float, capturable: bool = True) -> Call:
        def call() -> None:
            if self.capturing:
                if not capturable:
                    raise RuntimeError("operation not permitted when stream is capturing")
                self._graph += seconds
                return
            self.queued.append((seconds, self.cold))
            self._queue(2 * seconds if self.cold else seconds)
            self.cold = False

        return call

    def event(self) -> Event:
        return Event(self)

    def sleep(self, cycles: int) -> None:
        self.sleeps.append(cycles)
        self._queue(cycles / CYCLES_PER_SECOND)

    def flush_cache(self) -> None:
        self._queue(FLUSH_SECONDS)
        self.cold = True

    def capture(self, call: Call, calls: int) -> Callable[[], None]:
        self._graph, self.capturing = 0.0, True
        try:
            for _ in range(calls):
                call()
        finally:
            self.capturing = False
        self.captured.append(calls)
        seconds = self._graph
        return lambda: self._queue(seconds)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.time: float | None = None

    def record(self) -> None:
        self.time = max(self.gpu.done, self.gpu.host)

    def query(self) -> bool:
        assert self.time is not None
        return self.gpu.host >= self.time

    def synchronize(self) -> None:
        assert self.time is not None
        self.gpu.host = max(self.gpu.host, self.time)

    def elapsed_time(self, end: Event) -> float:
        assert self.time is not None
        assert end.time is not None
        return 1e3 * (end.time - self.time)


def test_a_long_call_is_timed_cold_and_without_its_launch_and_flush() -> None:
    gpu = Gpu()
    timer = QueuedTimer(gpu, flush=True)
    call = gpu.work(1e-3)
    assert timer(call, 3) == pytest.approx(3 * 2e-3)
    assert gpu.queued == [(1e-3, True)] * 3


def test_the_backlog_grows_until_the_host_is_ahead_of_the_gpu() -> None:
    gpu = Gpu(launch=200e-6)  # three launches a call: 60 ms for the hundred below
    timer = QueuedTimer(gpu, flush=False)
    call = gpu.work(50e-6)
    first = timer(call, 100)
    assert first == pytest.approx(100 * 200e-6, rel=0.5)  # the host was timed
    for _ in range(6):
        last = timer(call, 100)
    assert last == pytest.approx(100 * 50e-6)
    assert gpu.sleeps == sorted(gpu.sleeps)
    assert gpu.sleeps[-1] == gpu.sleeps[-2]


def test_a_case_of_long_calls_is_timed_call_by_call() -> None:
    gpu = Gpu()
    calls = {"eager": gpu.work(3e-3), OURS: gpu.work(1e-3)}
    timer, description = choose_timer(calls, gpu)
    rounds = RoundRobin(calls, list(calls), timer)
    rounds.calibrate()
    rounds.opponents()
    rounds.ours()
    assert rounds.seconds["eager"] == pytest.approx([6e-3])
    assert rounds.seconds[OURS] == pytest.approx([2e-3])
    assert not gpu.captured
    assert description() == COLD


def test_one_short_variant_lets_all_of_them_be_timed_in_graphs() -> None:
    gpu = Gpu()
    calls = {"eager": gpu.work(300e-6), OURS: gpu.work(4e-6)}
    timer, description = choose_timer(calls, gpu)
    rounds = RoundRobin(calls, list(calls), timer)
    rounds.calibrate(seconds_per_timing=0.002)
    captures = len(gpu.captured)
    for _ in range(3):
        rounds.opponents()
        rounds.ours()
    assert rounds.seconds["eager"] == pytest.approx([300e-6] * 3)
    assert rounds.seconds[OURS] == pytest.approx([4e-6] * 3)
    assert rounds.calls_per_timing[OURS] >= 250
    assert len(gpu.captured) == captures  # rounds replay what was captured before them
    assert description() == WARM


def test_a_call_that_cannot_be_captured_is_queued_and_named() -> None:
    gpu = Gpu()
    calls = {"eager": gpu.work(20e-6, capturable=False), OURS: gpu.work(4e-6)}
    timer, description = choose_timer(calls, gpu)
    assert isinstance(timer, GraphTimer)
    assert timer(calls["eager"], 10) == pytest.approx(200e-6)
    assert timer(calls[OURS], 10) == pytest.approx(40e-6)
    assert gpu.captured == [10]
    assert description() == f"{WARM}; eager queued instead of captured"
