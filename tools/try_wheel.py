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
PYTHONS = ("python3.14", "python3.13", "python3.12", "python3.11", "python3.10")
TORCHES = ("2.13.0", "2.14.1")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "pairs",
        nargs="*",
        metavar="PYTHON:TORCH",
        help="such as python3.12:2.14.1; none: the newest two Pythons there are, with "
        f"{' and '.join(TORCHES)}",
    )
    options = parser.parse_args()
    pairs = options.pairs or default_pairs()
    missing = [python for python, _, _ in (p.partition(":") for p in pairs) if not works(python)]
    if missing:
        sys.exit(
            f"growkernels: {' and '.join(missing)} cannot be started here; install it, or name "
            'Pythons that are there, such as TRY="python3.11:2.13.0"'
        )
    (wheel,) = (ROOT / "dist").glob("growkernels-*.whl")
    for pair in pairs:
        python, _, torch = pair.partition(":")
        print(f"== {wheel.name} beside torch {torch} on {python}", flush=True)
        try_wheel(wheel, python, torch)
    return 0


def works(python: str) -> bool:
    """Whether a Python of that name starts: a version manager's stand-in for one may not."""
    try:
        started = subprocess.run([python, "-c", ""], capture_output=True, check=False)
    except OSError:
        return False
    return started.returncode == 0


def default_pairs() -> list[str]:
    """The older torch with the older of the two newest Pythons, which may be one."""
    found = [python for python in PYTHONS if works(python)][:2] or [sys.executable]
    return [
        f"{python}:{torch}" for python, torch in zip((found[-1], found[0]), TORCHES, strict=True)
    ]


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
