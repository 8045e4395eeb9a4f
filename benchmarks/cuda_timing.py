"""Timers for a GPU: events on its own clock around calls that it finds waiting in its queue.

A call that takes long enough has its own pair of events, and before it the level-2 cache is filled
with other data, as between the layers of a training step. The events themselves take some
microseconds, so short calls are captured in a CUDA graph instead, many in a row, on inputs that
stay in the cache; nothing of the host is in that time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from benchmarks.case import Call
from benchmarks.interleave import Timer

SHORT_SECONDS = 100e-6
COLD = "events around each call, the cache flushed before it"
WARM = "calls in a row in a CUDA graph, inputs in the cache"
_NOT_CAPTURED = "queued instead of captured"

# Cycles that the GPU sleeps while the host fills its queue: some 5 ms at first, 0.1 s at most.
_SHORTEST_BACKLOG = 10_000_000
_LONGEST_BACKLOG = 160_000_000


class Event(Protocol):
    def record(self) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Any, /) -> float: ...


class Gpu(Protocol):
    """What the timers use of a GPU."""

    def event(self) -> Event:
        """A new event that takes the time, in milliseconds, when the GPU comes by."""

    def sleep(self, cycles: int) -> None:
        """Queue a kernel that does nothing for so many cycles."""

    def flush_cache(self) -> None:
        """Queue a kernel after which the level-2 cache holds none of the calls' data."""

    def capture(self, call: Call, calls: int) -> Call:
        """Queues, when called, `calls` calls at once. Raises RuntimeError if it cannot."""


class CudaDevice:
    """The GPU of `device`, through torch."""

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._other_data = torch.zeros(2 * cache // 4, device=device)
        self._sum = torch.zeros((), device=device)

    def event(self) -> Event:
        return torch.cuda.Event(enable_timing=True)

    def sleep(self, cycles: int) -> None:
        torch.cuda._sleep(cycles)

    def flush_cache(self) -> None:
        # Read, not written: written lines would still be on their way to memory afterwards.
        torch.sum(self._other_data, dim=0, out=self._sum)

    def capture(self, call: Call, calls: int) -> Call:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                call()
        return graph.replay


class QueuedTimer:
    """Times calls that wait in the GPU's queue behind a sleeping kernel.

    Where the host was too slow and the GPU woke up first, it sleeps longer from then on.
    """

    def __init__(self, gpu: Gpu, *, flush: bool) -> None:
        self._gpu = gpu
        self._flush = flush
        self._cycles = _SHORTEST_BACKLOG

    def __call__(self, call: Call, calls: int) -> float:
        """The seconds that `calls` calls took together."""
        repeats, calls_each = (calls, 1) if self._flush else (1, calls)
        pairs = [(self._gpu.event(), self._gpu.event()) for _ in range(repeats)]
        self._gpu.sleep(self._cycles)
        for start, end in pairs:
            if self._flush:
                self._gpu.flush_cache()
            start.record()
            for _ in range(calls_each):
                call()
            end.record()
        if pairs[0][0].query():
            self._cycles = min(2 * self._cycles, _LONGEST_BACKLOG)
        pairs[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / 1e3


class GraphTimer:
    """Times graphs of calls; a call that cannot be captured is queued, without a flush.

    `not_captured` holds those calls. A graph is kept until a call is timed with another number.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._queued = QueuedTimer(gpu, flush=False)
        self._graphs: dict[Call, tuple[int, Call]] = {}
        self.not_captured: list[Call] = []

    def __call__(self, call: Call, calls: int) -> float:
        """The seconds that `calls` calls took together."""
        if call not in self.not_captured and self._graphs.get(call, (0,))[0] != calls:
            self._graphs.pop(call, None)
            try:
                self._graphs[call] = (calls, self._gpu.capture(call, calls))
            except RuntimeError:
                self.not_captured.append(call)
        if call in self.not_captured:
            return self._queued(call, calls)
        _, replay = self._graphs[call]
        return self._queued(replay, 1)


def choose_timer(calls: Mapping[str, Call], gpu: Gpu) -> tuple[Timer, Callable[[], str]]:
    """The timer for all variants of a case, and a function that says afterwards how it timed.

    One way for all of them, or one would find its inputs in the cache and another not. Each
    variant is called twice, the first time to warm up.
    """
    cold = QueuedTimer(gpu, flush=True)
    fastest = min(min(cold(call, 1) for _ in range(2)) for call in calls.values())
    if fastest >= SHORT_SECONDS:
        return cold, lambda: COLD
    warm = GraphTimer(gpu)

    def description() -> str:
        queued = [name for name, call in calls.items() if call in warm.not_captured]
        return f"{WARM}; {', '.join(queued)} {_NOT_CAPTURED}" if queued else WARM

    return warm, description
