"""SIGTERM, as from a scheduler or `kill`: everything ends, and the run goes on with --resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import short_study
from pool_work import in_this_process
from test_studies import without_clock

from growkernels import cli
from growkernels.experiments import runner
from growkernels.experiments.sensli import spirals_conclusion


@pytest.fixture(autouse=True)
def one_core() -> Iterator[None]:
    """One worker process: starting them takes longer than what they do here."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


def start(out: Path) -> subprocess.Popen[str]:
    command = ["reproduce", "sensli", "--out", str(out), "--resume"]
    return subprocess.Popen(
        [sys.executable, short_study.__file__, *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(process: subprocess.Popen[str]) -> list[int]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(child) for child in listed.split()]


def end_after_a_state(out: Path) -> None:
    process = start(out)
    while not list(out.glob("state/[a-z]*.pt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    workers = children(process)
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 143, told
    assert told.splitlines()[-1] == "growkernels: Terminated; continue with --resume."
    assert "Traceback" not in told
    assert workers
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]


def test_a_study_ends_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended, whole = tmp_path / "ended", tmp_path / "whole"
    end_after_a_state(ended)
    assert not (ended / "summary.json").exists()
    monkeypatch.setattr(spirals_conclusion, "_plots", lambda evidence: {})
    monkeypatch.setattr(runner, "run_parts", in_this_process)
    for out in (ended, whole):
        short_study.run("quick", "fc", None, "cpu", out, True, None)
    metrics = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (ended, whole)]
    found, expected = ([without_clock(json.loads(line)) for line in each] for each in metrics)
    assert found == expected
    assert not [path.name for path in ended.rglob(".*") if path.name != ".lock"]


WAITING = """
import os, signal, sys, time
from growkernels import cli
from growkernels.growth import offline

def stopped_while_writing(content, file):
    file.write(b"half of it")
    file.flush()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

offline.torch.save = stopped_while_writing
sys.exit(cli.main())
"""


def test_growing_a_file_leaves_no_half_of_it(tmp_path: Path) -> None:
    (tmp_path / "networks.py").write_text(
        "from torch import nn\ndef build(): return nn.Sequential(nn.Linear(2, 2))\n"
    )
    program = (
        "import torch, networks; torch.save(networks.build().state_dict(), 'checkpoint.pt')\n"
        f"{WAITING}"
    )
    (tmp_path / "record.json").write_text("[]")
    (tmp_path / "out").mkdir()
    finished = subprocess.run(
        [
            *(sys.executable, "-c", program, "grow", "checkpoint.pt", "--record", "record.json"),
            *("--out", "out/grown.pt", "--build", "networks:build"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 143, finished.stderr
    assert finished.stderr == "growkernels: Terminated; nothing was left half written.\n"
    assert list((tmp_path / "out").iterdir()) == []


def test_who_calls_the_command_keeps_the_own_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["growkernels", "reproduce", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert signal.getsignal(signal.SIGTERM) is before
