"""Parts of an experiment in a few worker processes, one torch thread each.

Small networks do not profit from more than one thread, so the cores are shared out among parts.
Workers end by themselves when the parent is gone, also after ``kill -9``: their pipe breaks, which
they notice in the middle of a part. That, reports of progress, a limit of time, and a caller's
program without an ``if __name__ == "__main__"`` are what the pools of joblib and of the standard
library do not have together.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Literal

import torch

from growkernels.experiments.time_limit import Laps, TimeLimitError, end_in, seconds_left

Report = Callable[[int], bool]
Event = tuple[Literal["progress", "done"], int, Any]
ENDED = "A worker process ended unexpectedly (killed, or out of memory); continue with --resume."
# Workers of other processes of torchrun, with those processes' ranks; ``helpers.py`` fills it.
helpers: list[tuple[Connection, int]] = []


def workers_on(device: str) -> int:
    """As many as there are cores, which torchrun's processes on this machine share; a GPU is one
    device, whose trainings follow one another.
    """
    if torch.device(device).type != "cpu":
        return 1
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def run_parts(
    work: Callable[[Any, Report], Any],
    parts: Sequence[Any],
    workers: int,
    after: Sequence[int | None] | None = None,
) -> Iterator[Event]:
    """Calls ``work(part, report)`` for every part, ``workers`` at a time, and as many in each other
    process of torchrun.

    Parts begin in order, each after the part with the index that ``after`` has for it, if any.
    ``work``, the parts and what ``work`` returns travel by pickle; ``work`` calls ``report(n)``
    often, n being how far it is; where that returns True, the time is up: ``work`` then saves what
    it has and returns. Yields ("progress", index of the part, n) and ("done", index, what
    work returned) as they come.
    Raises RuntimeError with the worker's own message if a part fails, or if a worker dies, and
    TimeLimitError after all workers have stopped at a time limit.
    """
    waiting = list(range(len(parts)))
    done: set[int] = set()
    idle: list[Connection] = []
    processes: dict[Connection, subprocess.Popen[bytes]] = {}
    crew: dict[Connection, int] = {}  # of other processes
    stopped = finished = False

    def next_part() -> int | None:
        for place, index in enumerate(waiting):
            if after is None or after[index] is None or after[index] in done:
                return waiting.pop(place)
        return None

    def join(connection: Connection) -> None:
        connection.send((work, seconds_left()))
        idle.append(connection)

    def occupy() -> None:
        for helper, rank in list(helpers):
            if helper not in crew and list(crew.values()).count(rank) < workers:
                crew[helper] = rank
                join(helper)
        while not stopped and (idle or len(processes) < workers):
            index = next_part()
            if index is None:
                return
            if not idle:
                here, process = _start_worker()
                processes[here] = process
                join(here)
            idle.pop().send((index, parts[index]))

    try:
        occupy()
        while len(idle) < len(processes) + len(crew):
            for connection in wait([c for c in (*processes, *crew) if c not in idle]):
                assert isinstance(connection, Connection)
                kind, index, value = connection.recv()
                if kind == "error":
                    raise RuntimeError(value)
                stopped |= kind == "stopped"
                if kind != "progress":
                    idle.append(connection)
                if kind == "done":
                    done.add(index)
                if kind != "stopped":
                    yield kind, index, value
            occupy()
        if stopped or waiting:
            raise TimeLimitError
        for connection in (*processes, *crew):
            connection.send(None)
        for process in processes.values():
            process.wait()
        finished = True
    except (EOFError, ConnectionError):
        raise RuntimeError(ENDED) from None
    finally:
        for connection, process in processes.items():
            process.terminate()
            process.wait()
            connection.close()
        if not finished:
            for connection in crew:
                connection.close()
            helpers[:] = [helper for helper in helpers if helper[0] not in crew]


def run_in_step(
    work: Callable[[Any, Report], Any], parts: Sequence[Any], processes: int
) -> Iterator[Event]:
    """Like ``run_parts``, but all processes of torchrun work on each part, one part after another.

    What they report is told of the first one alone. Raises RuntimeError where the others do not
    come within five minutes, and what ``run_parts`` raises.
    """
    end = time.monotonic() + 300
    while len({rank for _, rank in helpers}) < processes - 1:
        if time.monotonic() > end:
            raise RuntimeError("Not all processes of torchrun have come within five minutes.")
        time.sleep(0.05)
    of_rank = {rank: helper for helper, rank in helpers}
    here, process = _start_worker()
    crew = [here, *of_rank.values()]
    stopped = finished = False
    try:
        for connection in crew:
            connection.send((work, seconds_left()))
        for index, part in enumerate(parts):
            if stopped:
                break
            for connection in crew:
                connection.send((index, part))
            busy = list(crew)
            while busy:
                for ready in wait(busy):
                    connection = busy[busy.index(ready)]  # type: ignore[arg-type]
                    kind, _, value = connection.recv()
                    if kind == "error":
                        raise RuntimeError(value)
                    stopped |= kind == "stopped"
                    if kind != "progress":
                        busy.remove(connection)
                    elif connection is here:
                        yield kind, index, value
            if not stopped:
                yield "done", index, None
        if stopped:
            raise TimeLimitError
        for connection in crew:
            connection.send(None)
        process.wait()
        finished = True
    except (EOFError, ConnectionError):
        raise RuntimeError(ENDED) from None
    finally:
        process.terminate()
        process.wait()
        here.close()
        if not finished:
            for helper, _ in helpers:
                helper.close()
            helpers.clear()


def _start_worker() -> tuple[Connection, subprocess.Popen[bytes]]:
    # Not multiprocessing.Process: its children run the caller's main program a second time, which
    # a script without an `if __name__ == "__main__"` does not survive.
    here, there = Pipe()
    with there:
        process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(there.fileno())],
            pass_fds=(there.fileno(),),
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
    return here, process


_WORKER = "import sys; from growkernels.experiments import pool; pool.serve(sys.argv[1])"


def serve(descriptor: str) -> None:
    """A worker's life: parts come in through the pipe with this descriptor, reports go out."""
    _serve_a_run(Connection(int(descriptor)))


def serve_runs(connection: Connection) -> None:
    """A helper's life: as a worker's, through one run of parts after the other."""
    while _serve_a_run(connection):
        pass


def _serve_a_run(connection: Connection) -> bool:
    """Whether the run has ended and another one may follow."""
    torch.set_num_threads(1)
    try:
        work, left = connection.recv()
        laps = Laps(end_in(left))
        for index, part in iter(connection.recv, None):

            def report(value: int, index: int = index) -> bool:
                connection.send(("progress", index, value))
                return laps.time_is_up()

            if laps.time_is_up():
                connection.send(("stopped", index, None))
                continue
            try:
                result = work(part, report)
            except (ConnectionError, KeyboardInterrupt):
                return False
            except Exception as error:
                sentence = str(error) if isinstance(error, RuntimeError) else repr(error)
                connection.send(("error", index, sentence))
                return False
            connection.send(("stopped" if laps.over else "done", index, result))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return False  # the parent is gone
    return True
