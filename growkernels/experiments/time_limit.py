"""A limit on how long a command computes: it stops at a checkpoint, to be resumed later."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar


class TimeLimitError(RuntimeError):
    """The limit was reached; everything up to the last checkpoint is on disk."""

    def __init__(self) -> None:
        super().__init__("Stopped at the time limit; continue with --resume.")


# Of `time.monotonic`; None: there is no limit.
_end: ContextVar[float | None] = ContextVar("end of the time limit", default=None)


@contextlib.contextmanager
def time_limit(minutes: float | None) -> Iterator[None]:
    """Inside, `run_parts` works for so long and then raises TimeLimitError; None: no limit.

    Raises ValueError for a negative number or NaN.
    """
    if minutes is not None and not minutes >= 0:
        raise ValueError(f"--minutes is {minutes:g}; give a number of minutes from 0 up.")
    token = _end.set(None if minutes is None else time.monotonic() + 60 * minutes)
    try:
        yield
    finally:
        _end.reset(token)


def seconds_left() -> float | None:
    """How long there is time, or None; what another machine's clock can be told."""
    end = _end.get()
    return None if end is None else end - time.monotonic()


def end_in(seconds: float | None) -> float | None:
    """When so many seconds are over, as `time.monotonic` counts here."""
    return None if seconds is None else time.monotonic() + seconds


class Laps:
    """Tells before each step whether there is time for one as long as the last."""

    def __init__(self, end: float | None) -> None:
        self._end = end
        self._last = time.monotonic()
        self.over = False

    def time_is_up(self) -> bool:
        """Call between steps: whether the next, taking what the last took, would end too late."""
        now = time.monotonic()
        if self._end is not None and now + (now - self._last) > self._end:
            self.over = True
        self._last = now
        return self.over
