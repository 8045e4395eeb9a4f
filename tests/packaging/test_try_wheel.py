"""The Pythons that a wheel is tried with: there, or named in one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_python_that_does_not_start_is_one_sentence(tmp_path: Path) -> None:
    stand_in = tmp_path / "python3.99"
    stand_in.write_text("#!/bin/sh\nexit 127\n")
    stand_in.chmod(0o755)
    for name in (str(stand_in), str(tmp_path / "missing")):
        command = [sys.executable, "tools/try_wheel.py", f"{sys.executable}:1", f"{name}:2.13.0"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert ended.returncode == 1
        assert ended.stdout == ""
        (line,) = ended.stderr.splitlines()
        assert line.startswith(f"growkernels: {name} cannot be started here; ")
