"""An op library that is missing, damaged or built for another torch is one sentence."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import growkernels
from growkernels.ops import library

PACKAGE = Path(growkernels.__file__).parent


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the installed package, without its checkout."""
    copy = tmp_path / "site" / "growkernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


# Without `site` no .pth file is read, so an editable install does not stand in for the copy.
START = f"import sys; sys.path += [{str(Path(torch.__file__).parents[1])!r}]; "


def import_error(package: Path, prelude: str = "") -> str:
    """The last line that `import growkernels` leaves on stderr in a new interpreter."""
    program = f"{START}sys.path.insert(0, {str(package.parent)!r}); {prelude}import growkernels"
    finished = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True
    )
    assert finished.returncode == 1, finished.stderr
    assert "During handling" not in finished.stderr
    return finished.stderr.strip().splitlines()[-1]


REINSTALL = "run `pip install --no-build-isolation --no-deps --force-reinstall growkernels`"


def test_missing_library(package: Path) -> None:
    (package / library.LIBRARY_NAME).unlink()
    message = import_error(package)
    assert message.startswith("ImportError: growkernels: ")
    assert f"{library.LIBRARY_NAME} is missing; {REINSTALL}" in message


def test_missing_build_information(package: Path) -> None:
    for path in package.glob("_build_info*.so"):
        path.unlink()
    message = import_error(package)
    assert "is missing or was built for another Python" in message
    assert REINSTALL in message


def test_library_for_another_torch(package: Path) -> None:
    prelude = "import torch; torch.__version__ = '2.99.0'; "
    message = import_error(package, prelude)
    built_for = ".".join(torch.__version__.split(".")[:2])
    assert f"was built for torch {built_for}, but torch 2.99 (2.99.0) is running" in message
    assert REINSTALL in message


def test_library_with_a_symbol_that_torch_lacks(package: Path, tmp_path: Path) -> None:
    source = tmp_path / "needy.c"
    source.write_text("void gone(void); __attribute__((constructor)) void start(void) { gone(); }")
    target = package / library.LIBRARY_NAME
    command = ["cc", "-shared", "-fPIC", "-Wl,-z,now", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    message = import_error(package)
    assert f"does not load beside torch {torch.__version__} (undefined symbol: gone)" in message
    assert REINSTALL in message


def test_damaged_library(package: Path) -> None:
    (package / library.LIBRARY_NAME).write_bytes(b"no ELF file")
    assert "does not load beside torch" in import_error(package)


def test_in_a_checkout_the_remedy_is_make(package: Path) -> None:
    (package.parent / "Makefile").touch()
    (package.parent / "setup.py").touch()
    (package / library.LIBRARY_NAME).unlink()
    assert import_error(package).endswith("is missing; run `make setup`")


def test_command_prints_the_sentence_alone(package: Path) -> None:
    (package / library.LIBRARY_NAME).unlink()
    command = Path(sys.executable).parent / "growkernels"
    program = (
        f"{START}import runpy; sys.path.insert(0, {str(package.parent)!r}); "
        f"runpy.run_path({str(command)!r}, run_name='__main__')"
    )
    finished = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, "info"], capture_output=True, text=True
    )
    assert finished.returncode == 1
    assert finished.stderr.count("\n") == 1, finished.stderr
    assert finished.stderr.startswith("growkernels: ")


def test_library_has_no_python_in_it() -> None:
    needed = subprocess.run(
        ["readelf", "--dynamic", str(PACKAGE / library.LIBRARY_NAME)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "libtorch_cpu" in needed
    assert "python" not in needed


def test_one_openmp_runtime_per_process() -> None:
    """A second libgomp would start a second pool of threads beside torch's."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
    assert len(runtimes) == 1, runtimes
