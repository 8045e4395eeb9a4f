"""What a wheel needs, a CUDA toolkit or folders to write, is said before anything is downloaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from write_rights import NOT_GIVEN_UP, without_the_right_to_write_anywhere

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


@pytest.mark.parametrize("made", ["dist", "build", "build/torch", "growkernels.egg-info"])
@pytest.mark.parametrize("kind", ["read-only", "file", "in a read-only folder"])
def test_where_nothing_can_be_written_is_one_sentence(made: str, kind: str, tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    (root / "tools").mkdir(parents=True)
    for name in ("make_wheel.py", "toolchain.py"):
        shutil.copy(ROOT / "tools" / name, root / "tools")
    folder = root / made
    folder.parent.mkdir(exist_ok=True)
    if kind == "read-only":
        folder.mkdir(mode=0o555)
    elif kind == "file":
        folder.write_text("mine")
    else:
        folder.parent.chmod(0o555)
    before = sorted(tmp_path.rglob("*"))
    ended = subprocess.run(
        [sys.executable, "-B", str(root / "tools" / "make_wheel.py"), "--torch", "0.0"],
        preexec_fn=without_the_right_to_write_anywhere,
        capture_output=True,
        text=True,
        check=False,
    )
    folder.parent.chmod(0o755)
    if ended.returncode == NOT_GIVEN_UP:
        pytest.skip("root may write anywhere here, and cannot give that up")
    assert ended.returncode == 1
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    written = folder.parent if kind == "in a read-only folder" else folder
    assert f"nothing can be written to {written} (" in line
    assert line.startswith("growkernels: a wheel is made in ")
    assert line.endswith("allow it, or make the wheel in another clone")
    assert sorted(tmp_path.rglob("*")) == before
    assert not folder.is_file() or folder.read_text() == "mine"
