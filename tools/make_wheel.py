"""One wheel for all supported versions of torch, and every Python: `make wheel`, `make test-wheel`.

The op library is built once per minor version of torch, against a torch that is installed for its
headers and libraries alone, and all of them go into one wheel. The package loads the one that fits.
`make wheel CUDA=1` compiles the CUDA sources too, with the toolkit that is found, for the releases
of torch that were built with its major version; that wheel's version ends in "+cu130" or the like.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from toolchain import cuda_release, find_cuda_toolkit

ROOT = Path(__file__).resolve().parent.parent
TORCHES = ROOT / "build" / "torch"
BUILT = ROOT / "build" / "wheel"
DIST = ROOT / "dist"
# Setuptools writes the last one.
WRITTEN = (DIST, ROOT / "build", TORCHES, BUILT, ROOT / "growkernels.egg-info")
# Any release of a minor version serves them all: torch keeps its C++ interface within it.
VERSIONS = ("2.11.0", "2.12.1", "2.13.0", "2.14.1")
# What is linked against, and comes with torch, which is loaded first. The rest of it, gigabytes, is
# removed again.
LINKED = ("libc10.so", "libtorch.so", "libtorch_cpu.so")
LINKED_CUDA = ("libc10_cuda.so", "libtorch_cuda.so")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", nargs="+", default=VERSIONS, help="versions to build for")
    parser.add_argument("--cuda", action="store_true", help="compile the CUDA sources too")
    options = parser.parse_args()
    if obstacle := unwritable():
        sys.exit(f"growkernels: {obstacle}")
    toolkit = find_cuda_toolkit() if options.cuda else None
    if options.cuda and toolkit is None:
        sys.exit("growkernels: no CUDA toolkit is found; put its nvcc on PATH, or set CUDA_HOME")
    linked = LINKED + (LINKED_CUDA if toolkit else ())
    folders = [headers_of(version, linked) for version in options.torch]
    wheel = relabelled(build(folders, toolkit), linked, toolkit)
    print(f"{wheel} is for torch {', '.join(options.torch)}")
    return 0


def unwritable() -> str | None:
    """What stands in the way of writing all that a wheel takes, before anything is begun."""
    for folder in WRITTEN:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            return (
                f"a wheel is made in {folder}, and nothing can be written to {existing} "
                f"({error.strerror}); allow it, or make the wheel in another clone"
            )
    return None


def headers_of(version: str, linked: tuple[str, ...]) -> Path:
    """A folder with the headers and libraries of this torch, installed where it is missing."""
    folder = TORCHES / (version + ("-cuda" if LINKED_CUDA[0] in linked else ""))
    complete = folder / ".complete"
    if not complete.exists():
        shutil.rmtree(folder, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        # "===": the release itself, which is for CUDA, before one of a local version such as +cpu.
        alone = ["--no-deps", "--no-compile", "--target", str(folder), f"torch==={version}"]
        subprocess.run([*pip, *alone], check=True)
        for path in (folder / "torch" / "lib").iterdir():
            if path.is_file() and path.name not in linked:
                path.unlink()
        complete.touch()
    return folder


def build(torches: list[Path], toolkit: Path | None) -> Path:
    """The wheel as setuptools names it. A compiler cache, where there is one, serves rebuilds."""
    environment = {
        **os.environ,
        "GROWKERNELS_CUDA": "1" if toolkit else "0",
        "GROWKERNELS_TORCHES": os.pathsep.join(map(str, torches)),
    }
    if toolkit:
        settings = ROOT / "build" / "cuda-wheel.cfg"  # setuptools': what the version ends in
        release = cuda_release(toolkit).replace(".", "")
        settings.write_text(f"[egg_info]\ntag_build = +cu{release}\n")
        environment["DIST_EXTRA_CONFIG"] = str(settings)
    if shutil.which("ccache"):
        environment.setdefault("CMAKE_CXX_COMPILER_LAUNCHER", "ccache")
        # Precompiled headers are not cached otherwise.
        environment.setdefault("CCACHE_SLOPPINESS", "pch_defines,time_macros")
    shutil.rmtree(BUILT, ignore_errors=True)
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [sys.executable, *command, "--wheel-dir", str(BUILT), str(ROOT)],
        env=environment,
        check=True,
    )
    (wheel,) = BUILT.glob("*.whl")
    return wheel


def relabelled(wheel: Path, linked: tuple[str, ...], toolkit: Path | None) -> Path:
    """The wheel under the oldest manylinux whose glibc and libstdc++ it can run with."""
    of_torch = [*linked, "libcudart.so.*"] if toolkit else linked
    excluded = [argument for name in of_torch for argument in ("--exclude", name)]
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
