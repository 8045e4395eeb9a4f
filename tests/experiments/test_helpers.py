"""A reproduction over torchrun's processes is that of one process, and survives kill -9."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import helped_study
import pytest
from pool_work import in_this_process

from growkernels.experiments import runner, team
from growkernels.experiments.sensli import spirals_conclusion


def unmeasured(summary: Any) -> Any:
    """Without what depends on time."""
    if isinstance(summary, dict):
        return {
            key: unmeasured(value)
            for key, value in summary.items()
            if not any(word in key for word in ("seconds", "time", "environment"))
        }
    return summary


def test_the_same_numbers_over_two_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "run_parts", in_this_process)
    monkeypatch.setattr(spirals_conclusion, "_plots", lambda evidence: {})
    alone, together, notes = tmp_path / "alone", tmp_path / "together", tmp_path / "notes"
    notes.mkdir()
    helped_study.run("quick", "fc", None, "cpu", alone, False, "plain")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=1", helped_study.__file__, "reproduce", "sensli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NOTES": str(notes)}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    ran = subprocess.run(
        [*command, f"--out={together}"],
        env=environment,
        timeout=1800,  # a process that waits forever
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert (together / "metrics.jsonl").read_text() == (alone / "metrics.jsonl").read_text()
    mine, other = (json.loads((out / "summary.json").read_text()) for out in (alone, together))
    assert unmeasured(mine["overview"]) == unmeasured(other["overview"])
    # Two before it was killed, and others when torchrun had started all again.
    assert len(list(notes.glob("0-*"))) == 2
    assert list(notes.glob("1-*"))
    together = json.loads((notes / "together.json").read_text())
    assert together == {"first": [3.0] * 2, "then": [3.0] * 3, "other": [3.0]}


def test_training_together_needs_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(ValueError, match="--ddp is for several processes; start them by torchrun"):
        team.together(True).__enter__()
