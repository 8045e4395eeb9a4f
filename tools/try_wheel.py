"""The wheel in fresh environments, without a compiler: `make test-wheel`.

For every pair of a Python and a torch an environment is made below build/try-wheel, with torch, the
wheel and pytest alone. The README's first Python snippet and a part of the ops' tests run there.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "try-wheel"
# What shows that the library fits this torch, its dispatcher and its compiler's view of ops.
TESTS = "(any_shapes or opcheck or random_matrices) and not emulated and not triton"
# They import Triton, which CPU builds of torch do not bring.
LEFT_OUT = "--ignore-glob=*triton*"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "pairs", nargs="+", metavar="PYTHON:TORCH", help="such as python3.12:2.14.1"
    )
    options = parser.parse_args()
    (wheel,) = (ROOT / "dist").glob("growkernels-*.whl")
    for pair in options.pairs:
        python, _, torch = pair.partition(":")
        print(f"== {wheel.name} beside torch {torch} on {python}", flush=True)
        try_wheel(wheel, python, torch)
    return 0


def try_wheel(wheel: Path, python: str, torch: str) -> None:
    """Raises CalledProcessError where a step fails; what it printed is above."""
    folder = FOLDER / f"{Path(python).name}-torch{torch}"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    own = str(folder / "bin" / "python")
    install = [own, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*install, f"torch=={torch}", "pytest", "hypothesis", "numpy"], check=True)
    subprocess.run([*install, "--only-binary", "growkernels", str(wheel)], check=True)
    # From elsewhere and isolated: the package in the source tree must not stand in for the wheel.
    environment = {**os.environ, "PATH": str(folder / "bin"), "PYTHONPATH": ""}
    subprocess.run([own, "-I", "-c", first_snippet()], cwd=folder, env=environment, check=True)
    # The program, not `python -m pytest`, which would look for packages in the current folder.
    pytest = [str(folder / "bin" / "pytest"), "-q", "-p", "no:cacheprovider"]
    tests = [*pytest, "ops", LEFT_OUT, "-k", TESTS]
    subprocess.run(tests, cwd=ROOT / "tests", env=environment, check=True)


def first_snippet() -> str:
    """The first Python code of the README, which needs nothing but what is installed."""
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    if found is None:
        sys.exit("growkernels: the README has no Python snippet; write one, or mend this search")
    return found[1]


if __name__ == "__main__":
    raise SystemExit(main())
