"""A wheel with CUDA sources needs a toolkit, and says so before anything is downloaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_toolkit_is_one_sentence(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "CUDA_HOME": ""}
    command = [sys.executable, "tools/make_wheel.py", "--cuda", "--torch", "0.0"]
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("growkernels: no CUDA toolkit is found; ")
