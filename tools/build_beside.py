"""The op library in a folder of its own, with the package's Python files beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build_beside(folder: Path, settings: Mapping[str, str]) -> None:
    """``settings`` are variables of the environment, which setup.py and CMake read."""
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(folder)],
        cwd=ROOT,
        env={**os.environ, **settings},
        check=True,
    )
    for source in (ROOT / "growkernels").rglob("*.py"):
        target = folder / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
