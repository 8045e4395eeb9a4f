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


REINSTALL = (
    "`pip install --no-build-isolation --no-deps --force-reinstall --no-binary growkernels "
    "growkernels`"
)


def libraries(package: Path) -> list[Path]:
    return sorted(package.glob("libgrowkernels*"))


def test_missing_library(package: Path) -> None:
    for path in libraries(package):
        path.unlink()
    message = import_error(package)
    assert message == f"ImportError: growkernels: {package} holds no op library; run {REINSTALL}"


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"torch_version": 3}'])
def test_missing_build_information(package: Path, text: str | None) -> None:
    (beside,) = package.glob("libgrowkernels*.json")
    beside.unlink() if text is None else beside.write_text(text)
    message = import_error(package)
    assert f"the build information {beside} is missing or damaged; run {REINSTALL}" in message


@pytest.mark.parametrize(
    ("running", "nearest"),
    [("2.99.0", "2.15"), ("2.9.1+cpu", "2.11"), ("2.14.0", "2.11"), ("3.0.0a0", "2.15")],
)
def test_an_unknown_torch_is_told_the_nearest_known_one(
    package: Path, running: str, nearest: str
) -> None:
    for path in libraries(package):
        path.rename(path.with_name("libgrowkernels-torch2.11" + path.suffix))
        (package / ("libgrowkernels-torch2.15" + path.suffix)).touch()
    message = import_error(package, f"import torch; torch.__version__ = {running!r}; ")
    assert message == (
        "ImportError: growkernels: its libraries are for torch 2.11, 2.15, but torch "
        f"{running} is running; install torch=={nearest}.*, or build for the running one by "
        f"{REINSTALL}"
    )


def test_the_library_of_the_running_torch_is_loaded_among_several(package: Path) -> None:
    name = library.library_path().name
    for other in ("2.1", "2.11", "3.2"):
        (package / f"libgrowkernels-torch{other}.so").write_bytes(b"none of ours")
    program = (
        f"{START}sys.path.insert(0, {str(package.parent)!r}); "
        "import growkernels.ops.library as it; "
        "print(it.load_library().name, it.build_info().torch_version)"
    )
    finished = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True
    )
    assert finished.stdout.split() == [name, torch.__version__], finished.stderr


def test_library_with_a_symbol_that_torch_lacks(package: Path, tmp_path: Path) -> None:
    source = tmp_path / "needy.c"
    source.write_text("void gone(void); __attribute__((constructor)) void start(void) { gone(); }")
    target = package / library.library_path().name
    command = ["cc", "-shared", "-fPIC", "-Wl,-z,now", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    message = import_error(package)
    assert f"does not load beside torch {torch.__version__} (undefined symbol: gone)" in message
    assert REINSTALL in message


def test_damaged_library(package: Path) -> None:
    (package / library.library_path().name).write_bytes(b"no ELF file")
    assert "does not load beside torch" in import_error(package)


def test_in_a_checkout_the_remedy_is_make(package: Path) -> None:
    (package.parent / "Makefile").touch()
    (package.parent / "setup.py").touch()
    for path in libraries(package):
        path.unlink()
    assert import_error(package).endswith("holds no op library; run `make setup`")


def test_command_prints_the_sentence_alone(package: Path) -> None:
    for path in libraries(package):
        path.unlink()
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
        ["readelf", "--dynamic", str(library.library_path())],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "libtorch_cpu" in needed
    assert "python" not in needed
    assert "gomp" not in needed  # whose file is named by torch, differently in every build


def test_one_openmp_runtime_per_process() -> None:
    """A second libgomp would start a second pool of threads beside torch's."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
    assert len(runtimes) == 1, runtimes
