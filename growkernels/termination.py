"""SIGTERM ends a command as an error does: what it started ends too, nothing stays half done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Terminated(SystemExit):
    """Raised where the process was when SIGTERM came; the exit status is that of shells."""

    code = 128 + signal.SIGTERM

    def __init__(self) -> None:
        super().__init__(self.code)
        self.advice = "nothing was left half written."


@contextlib.contextmanager
def raised_on_sigterm() -> Iterator[None]:
    """Inside, the first SIGTERM raises ``Terminated``; later ones do not disturb the clearing up.

    Only the main thread can take signals; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
