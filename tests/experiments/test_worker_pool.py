import os
import signal
import subprocess
import sys
import time

import pool_work
import pytest

from growkernels.experiments.worker_pool import run_parts


def test_every_part_is_done_once_and_progress_arrives(tmp_path):
    events = list(run_parts(pool_work.touch, [tmp_path / str(n) for n in range(5)], workers=2))
    assert sorted(i for kind, i, _ in events if kind == "done") == [0, 1, 2, 3, 4]
    assert ("progress", 3, 7) in events
    assert len(list(tmp_path.iterdir())) == 5


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
    deadline = time.monotonic() + 60
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
