"""One wheel for all supported versions of torch, and every Python: `make wheel`, `make test-wheel`.

The op library is built once per minor version of torch, against a torch that is installed for its
headers and libraries alone, and all of them go into one wheel. The package loads the one that fits.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCHES = ROOT / "build" / "torch"
DIST = ROOT / "dist"
# Any release of a minor version serves them all: torch keeps its C++ interface within it.
VERSIONS = ("2.11.0", "2.12.1", "2.13.0", "2.14.1")
# What is linked against. The rest, gigabytes of CUDA's, is removed again.
LINKED = ("libc10.so", "libtorch.so", "libtorch_cpu.so")
# They come with torch, which is loaded first.
OF_TORCH = ("libc10.so", "libtorch.so", "libtorch_cpu.so")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", nargs="+", default=VERSIONS, help="versions to build for")
    options = parser.parse_args()
    folders = [headers_of(version) for version in options.torch]
    built = build(folders)
    print(f"{relabelled(built)} is for torch {', '.join(options.torch)}")
    return 0


def headers_of(version: str) -> Path:
    """A folder with the headers and libraries of this torch, installed where it is missing."""
    folder = TORCHES / version
    complete = folder / ".complete"
    if not complete.exists():
        shutil.rmtree(folder, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        alone = ["--no-deps", "--no-compile", "--target", str(folder), f"torch=={version}"]
        subprocess.run([*pip, *alone], check=True)
        for path in (folder / "torch" / "lib").iterdir():
            if path.is_file() and path.name not in LINKED:
                path.unlink()
        complete.touch()
    return folder


def build(torches: list[Path]) -> Path:
    """The wheel as setuptools names it. A compiler cache, where there is one, serves rebuilds."""
    environment = {
        "GROWKERNELS_CUDA": "0",
        **os.environ,
        "GROWKERNELS_TORCHES": os.pathsep.join(map(str, torches)),
    }
    if shutil.which("ccache"):
        environment.setdefault("CMAKE_CXX_COMPILER_LAUNCHER", "ccache")
        # Precompiled headers are not cached otherwise.
        environment.setdefault("CCACHE_SLOPPINESS", "pch_defines,time_macros")
    target = ROOT / "build" / "wheel"
    shutil.rmtree(target, ignore_errors=True)
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [sys.executable, *command, "--wheel-dir", str(target), str(ROOT)],
        env=environment,
        check=True,
    )
    (wheel,) = target.glob("*.whl")
    return wheel


def relabelled(wheel: Path) -> Path:
    """The wheel under the oldest manylinux whose glibc and libstdc++ it can run with."""
    excluded = [argument for name in OF_TORCH for argument in ("--exclude", name)]
    auditwheel = [sys.executable, "-m", "auditwheel"]
    for leftover in DIST.glob("growkernels-*.whl"):
        leftover.unlink()
    repair = [*auditwheel, "repair", *excluded, "--wheel-dir", str(DIST), str(wheel)]
    subprocess.run(repair, check=True)
    (repaired,) = DIST.glob("growkernels-*.whl")
    subprocess.run([*auditwheel, "show", str(repaired)], check=True)
    return repaired


if __name__ == "__main__":
    raise SystemExit(main())
