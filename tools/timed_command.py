"""Runs a command for a limited time, with everything that it prints in a log."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["passed", "failed", "out of time"]

LOG_LIMIT = 12 * 2**20  # bytes; a log of this size has said what there is to say
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Outcome:
    """How a command ended. `returncode` is negative for a signal, as in `subprocess`."""

    status: Status
    returncode: int
    seconds: float


class Log:
    """A file that takes lines up to LOG_LIMIT and is complete on disk after each of them."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._room = LOG_LIMIT

    def write(self, line: str) -> None:
        data = line.encode(errors="replace") + b"\n"
        if len(data) <= self._room:
            self._file.write(data)
        self._room -= len(data)


def run_timed(
    command: Sequence[str],
    seconds: float,
    log: Log,
    *,
    folder: Path,
    environment: Mapping[str, str],
    on_line: Callable[[str], None] = lambda line: None,
    on_poll: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run `command` in `folder` with `environment` added to this process's own.

    `on_line` gets every line of its output and errors, `on_poll` is called about twice a second.
    After `seconds` the command and its children are interrupted, so that it can still say what it
    has, and 10 seconds later killed. So they are where this process itself is interrupted.
    """
    started = time.monotonic()
    log.write(f"\n$ {' '.join(command)}")
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # its children can be signalled together
    )
    try:
        in_time = _follow(process, started + seconds, log, on_line, on_poll)
        if not in_time:
            os.killpg(process.pid, signal.SIGINT)
            _follow(process, time.monotonic() + _GRACE_SECONDS, log, on_line, on_poll)
    finally:
        _kill(process)
    on_poll()
    elapsed = time.monotonic() - started
    status: Status = "out of time"
    if in_time:
        status = "passed" if process.returncode == 0 else "failed"
    log.write(f"[{status}, exit status {process.returncode}, {elapsed:.1f} s]")
    return Outcome(status, process.returncode, elapsed)


def _follow(
    process: subprocess.Popen[bytes],
    deadline: float,
    log: Log,
    on_line: Callable[[str], None],
    on_poll: Callable[[], None],
) -> bool:
    """Passes the output on until the command has ended; False where the deadline came first."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None
            if selector.select(0 if ended else _POLL_SECONDS):
                chunk = process.stdout.read() or b""
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    text = line.decode(errors="replace").rstrip("\r")
                    log.write(text)
                    on_line(text)
            if ended:
                if rest:
                    log.write(rest.decode(errors="replace"))
                return True
            if time.monotonic() > deadline:
                return False
            on_poll()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of the command and of its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
