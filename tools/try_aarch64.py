"""The op library for aarch64, tried on another machine: `make aarch64`.

Debian's cross compiler builds it against torch's wheel for aarch64, and tests of the ops run under
qemu-user with Debian's Python for aarch64. All of that lies below build/aarch64 and takes 5 GB:
those wheels are CUDA builds, whose libraries Python cannot load torch without.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from build_beside import build_beside

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "aarch64"
SYSTEM = FOLDER / "system"
PACKAGES = FOLDER / "packages"
BUILT = FOLDER / "package"
# Debian's packages, and the program of each that is needed here.
PROGRAMS = {
    "g++-aarch64-linux-gnu": "aarch64-linux-gnu-g++",
    "qemu-user-static": "qemu-aarch64-static",
}
# The one that describe_processor describes.
PROCESSOR = "neoverse-n1"
# All ops at all kinds of shapes and dtypes, against float64. Left out is what starts processes or
# compilers, which are not emulated, and the same bits every time, whose many calls of large samples
# take over a minute each.
TESTS = ("ops/test_contract_numbers.py", "ops/test_fuzz_corpus.py", "-k", "not same_bits")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", default="2.13.0", help="the release to build and test with")
    parser.add_argument("--build-only", action="store_true", help="compile and link, run nothing")
    parser.add_argument("tests", nargs="*", default=TESTS, help="what pytest runs, in tests/")
    options = parser.parse_args()
    missing = [package for package, program in PROGRAMS.items() if not shutil.which(program)]
    if missing:
        sys.exit(f"growkernels: aarch64 needs {' and '.join(missing)}; run `apt-get install "
                 f"{' '.join(missing)}`")  # fmt: skip
    version = python_of_debian()
    install_packages(options.torch, version)
    toolchain = str(ROOT / "tools" / "aarch64.cmake")
    build_beside(
        BUILT,
        {
            "CMAKE_TOOLCHAIN_FILE": toolchain,
            "GROWKERNELS_CUDA": "0",
            "GROWKERNELS_TORCHES": str(PACKAGES),
        },
    )
    return 0 if options.build_only else emulated("-m", "pytest", "-q", "-x", *options.tests)


def python_of_debian() -> str:
    """Unpacks it with all that it needs below SYSTEM, where it is missing; its major.minor version.

    Nothing is installed: apt-get works on lists and a status of its own.
    """
    if not (SYSTEM / ".complete").exists():
        shutil.rmtree(SYSTEM, ignore_errors=True)
        lists, archives = FOLDER / "apt" / "lists", FOLDER / "apt" / "archives"
        for folder in (lists, archives):
            (folder / "partial").mkdir(parents=True, exist_ok=True)
        status = FOLDER / "apt" / "status"
        status.touch()
        options = {
            "APT::Architecture": "arm64",
            "APT::Architectures": "arm64",
            "APT::Sandbox::User": "root",
            "Dir::State::lists": lists,
            "Dir::State::status": status,
            "Dir::Cache::archives": archives,
            "Dir::Cache::pkgcache": "",
            "Dir::Cache::srcpkgcache": "",
            "Debug::NoLocking": "1",
        }
        apt = ["apt-get", "--quiet=2", *(f"-o{name}={value}" for name, value in options.items())]
        subprocess.run([*apt, "update"], check=True)
        names = ["python3", "libstdc++6"]
        download = ["install", "--yes", "--download-only", "--no-install-recommends", *names]
        subprocess.run([*apt, *download], check=True)
        for archive in archives.glob("*.deb"):
            subprocess.run(["dpkg-deb", "--extract", str(archive), str(SYSTEM)], check=True)
        describe_processor()
        (SYSTEM / ".complete").touch()
    return (SYSTEM / "usr" / "bin" / "python3").readlink().name.removeprefix("python")


def describe_processor() -> None:
    """Files in which libraries look for the processor's kind, and die where they find x86.

    qemu opens what lies below SYSTEM instead of the machine's own.
    """
    kind = {"implementer": "0x41", "architecture": "8", "variant": "0x3", "part": "0xd0c"}
    text = "Features\t: fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimddp\n"
    text += "".join(f"CPU {name}\t: {value}\n" for name, value in kind.items())
    processors = range(os.cpu_count() or 1)
    (SYSTEM / "proc").mkdir(exist_ok=True)
    (SYSTEM / "proc" / "cpuinfo").write_text(
        "".join(f"processor\t: {number}\n{text}\n" for number in processors)
    )
    for number in processors:
        folder = SYSTEM / f"sys/devices/system/cpu/cpu{number}/regs/identification"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "midr_el1").write_text("0x00000000413fd0c1\n")


def install_packages(torch: str, python: str) -> None:
    """torch and what the tests import, as wheels for aarch64, where they are missing."""
    wanted = [f"torch=={torch}", "numpy", "pytest", "hypothesis"]
    complete = PACKAGES / ".complete"
    if complete.exists() and complete.read_text() == " ".join([*wanted, python]):
        return
    shutil.rmtree(PACKAGES, ignore_errors=True)
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(17, 37)]
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet",
         "--no-compile", "--target", str(PACKAGES), "--only-binary=:all:", *platforms,
         "--platform=manylinux2014_aarch64", "--python-version", python, *wanted],
        check=True,
    )  # fmt: skip
    complete.write_text(" ".join([*wanted, python]))


def emulated(*arguments: str) -> int:
    """The status of Python for aarch64 with these arguments, in tests/."""
    settings = {
        "PYTHONPATH": os.pathsep.join(map(str, (BUILT, PACKAGES))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
        # As in the suite: threads that wait leave the processor to others.
        "OMP_WAIT_POLICY": "passive",
    }
    python = str(SYSTEM / "usr" / "bin" / "python3")
    command = ["qemu-aarch64-static", "-cpu", PROCESSOR, "-L", str(SYSTEM), python, *arguments]
    environment = {**os.environ, **settings}
    return subprocess.run(command, cwd=ROOT / "tests", env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main())
