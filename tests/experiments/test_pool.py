import contextlib
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Pipe
from types import SimpleNamespace

import pool_work
import pytest

from growkernels.experiments.pool import run_parts, serve
from growkernels.experiments.time_limit import Laps, TimeLimitError, time_limit


def test_every_part_is_done_once_and_progress_arrives(tmp_path):
    events = list(run_parts(pool_work.touch, [tmp_path / str(n) for n in range(5)], workers=2))
    assert sorted(i for kind, i, _ in events if kind == "done") == [0, 1, 2, 3, 4]
    assert ("progress", 3, 7) in events
    assert len(list(tmp_path.iterdir())) == 5


def test_parts_wait_for_what_they_come_after(tmp_path):
    parts = [tmp_path / str(n) for n in range(4)]
    after = [None, 3, 1, 0]
    events = run_parts(pool_work.touch, parts, workers=2, after=after)
    assert [i for kind, i, _ in events if kind == "done"] == [0, 3, 1, 2]


def test_a_failing_part_speaks_through_the_parent(tmp_path):
    with pytest.raises(RuntimeError, match=r"^the disk is full$"):
        list(run_parts(pool_work.fail, [1], workers=1))


def test_a_worker_that_is_killed_is_reported(tmp_path):
    with pytest.raises(RuntimeError, match="ended unexpectedly"):
        list(run_parts(pool_work.die, [1, 2], workers=1))


def test_workers_end_when_their_parent_is_killed(tmp_path):
    parent = subprocess.Popen([sys.executable, pool_work.__file__, str(tmp_path / "pid")])
    while not (tmp_path / "pid").exists():
        assert parent.poll() is None
        time.sleep(0.01)
    worker = int((tmp_path / "pid").read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 600
    while _runs(worker):
        assert time.monotonic() < deadline, "the worker lives on without its parent"
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_nothing_begins_after_the_time_limit(tmp_path):
    def run():
        with time_limit(0):
            list(run_parts(pool_work.touch, [tmp_path / "a", tmp_path / "b"], workers=2))

    with pytest.raises(TimeLimitError, match=r"continue with --resume"):
        run()
    assert not list(tmp_path.iterdir())
    list(run_parts(pool_work.touch, [tmp_path / "c"], workers=1))  # the limit is over
    assert (tmp_path / "c").exists()


@pytest.mark.parametrize("minutes", [-1.0, float("nan")])
def test_a_time_limit_counts_from_zero_up(minutes):
    with pytest.raises(ValueError, match=r"--minutes is .+; give a number"), time_limit(minutes):
        pass


@pytest.mark.parametrize(
    ("end", "events"),
    [
        (None, ["done", "done"]),
        (55.0, ["done", "stopped"]),  # after the second step of the second part
        (33.0, ["stopped", "stopped"]),  # after the third; it does not know that it was the last
        (25.0, ["stopped", "stopped"]),  # after the second
    ],
)
def test_a_worker_stops_between_steps(monkeypatch, end, events):
    monkeypatch.setattr(pool_work, "CLOCK", [0.0])
    clock = SimpleNamespace(monotonic=lambda: pool_work.CLOCK[0])
    monkeypatch.setattr("growkernels.experiments.time_limit.time", clock)
    here, there = Pipe()
    here.send((pool_work.ten_seconds_a_step, end))
    for message in ((0, 3), (1, 3), None):
        here.send(message)
    serve(str(os.dup(there.fileno())))
    there.close()
    replies = []
    with contextlib.suppress(EOFError):
        while True:
            replies.append(here.recv())
    ends = [(kind, value) for kind, _, value in replies if kind != "progress"]
    assert [kind for kind, _ in ends] == events
    steps = {None: 6, 55.0: 5, 33.0: 3, 25.0: 2}[end]
    assert pool_work.CLOCK[0] == 10 * steps


def test_no_part_is_begun_that_would_end_too_late(monkeypatch):
    now = 100.0
    monkeypatch.setattr("growkernels.experiments.time_limit.time.monotonic", lambda: now)
    laps = Laps(110.0)
    now = 104.0
    assert not laps.time_is_up()  # until 108, if the next takes as long
    now = 107.0
    assert not laps.time_is_up()
    now = 109.0
    assert laps.time_is_up()
    now = 109.1
    assert laps.time_is_up()
    assert not Laps(None).time_is_up()
