"""Work for the worker pool's tests, and a pool without workers.

As a program, a parent whose one worker never ends.
"""

import os
import pickle
import signal
import sys
import time
from pathlib import Path


def touch(part, report):
    report(7)
    part.touch()


def fail(part, report):
    raise RuntimeError("the disk is full")


def die(part, report):
    os.kill(os.getpid(), signal.SIGKILL)


def endless(part, report):
    new = Path(f"{part}.new")
    new.write_text(str(os.getpid()))
    new.rename(part)
    while True:
        report(1)
        time.sleep(0.01)


CLOCK = [0.0]


def ten_seconds_a_step(part, report):
    """Works in the test's own process, on a clock that stands still in between."""
    for step in range(part):
        CLOCK[0] += 10
        if report(step):
            return "stopped here"
    return "finished"


def in_this_process(work, parts, workers, after=None):
    """Instead of `run_parts`, whose processes take seconds to start; parents come first.

    What travels to them by pickle does so here.
    """
    for index, part in enumerate(parts):
        assert after is None or after[index] is None or after[index] < index
        work_there, part_there = pickle.loads(pickle.dumps((work, part)))
        yield "done", index, pickle.loads(pickle.dumps(work_there(part_there, lambda step: False)))


if __name__ == "__main__":
    # Under its importable name, so that the worker finds it too.
    from pool_work import endless as work

    from growkernels.experiments.pool import run_parts

    for _ in run_parts(work, [sys.argv[1]], workers=1):
        pass
