"""The op library under AddressSanitizer and UBSan: `make sanitize`, or `make sanitize SHORT=1`.

Builds it in a folder of its own, copies the package's Python files beside it, and runs the tests of
ops and solvers and random calls (tests/ops/fuzzing.py) there; the short form runs some thousand
random calls, the same ones on every machine. The first report of either sanitizer ends the run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from build_beside import build_beside

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "sanitized"
SHORT = ["--seed", "0", "--calls", "4500"]  # half a minute's
# What is left out needs no C++ of ours, measures memory that the sanitizers change, or compiles.
TESTS = "not triton and not emulated and not on_host and not memory and not compile and not export"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="some thousand random calls alone")
    parser.add_argument("--minutes", type=float, default=3, help="of random calls in the long form")
    options = parser.parse_args()
    build_beside(BUILT, {"GROWKERNELS_SANITIZE": "1"})
    extent = SHORT if options.short else ["--minutes", str(options.minutes)]
    status = run("tests/ops/fuzzing.py", *extent)
    if status == 0 and not options.short:
        status = run(
            "-m", "pytest", "-q", "-x", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider",
            "tests/ops", "tests/solvers", "-k", TESTS,
        )  # fmt: skip
    return status


def run(*arguments: str) -> int:
    """Python with the sanitizers' libraries loaded before all others, on the package built here."""
    compiler = os.environ.get("CXX", "c++")
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(libraries),
        "PYTHONPATH": str(BUILT),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python leaks by design
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main())
