"""An op library that is missing, damaged or built for another torch is one sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
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


# Torch takes longer to import than all of the rest: every program is the fork of one interpreter
# that has done it, and starts like a new one otherwise.
FORKS = f"""{START}
import json, os, torch
for line in sys.stdin:
    program, told = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(told, os.O_CREAT | os.O_WRONLY), 2)
        try:
            exec(program, {{}})
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
Ask = Callable[..., str]


@pytest.fixture(scope="module")
def import_error(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Gives the last line that `import growkernels` leaves on stderr, of this copy of it."""
    told = tmp_path_factory.mktemp("told") / "stderr"
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", FORKS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as forks:
        assert forks.stdin is not None
        assert forks.stdout is not None

        def of(package: Path, prelude: str = "") -> str:
            told.unlink(missing_ok=True)
            place = f"import sys; sys.path.insert(0, {str(package.parent)!r}); "
            request = json.dumps([f"{place}{prelude}import growkernels", str(told)])
            print(request, file=forks.stdin, flush=True)
            status = forks.stdout.readline()
            assert status == "1\n", told.read_text()
            assert "During handling" not in told.read_text()
            return told.read_text().strip().splitlines()[-1]

        yield of
        forks.stdin.close()


REINSTALL = (
    "`pip install --no-build-isolation --no-deps --force-reinstall --no-binary growkernels "
    "growkernels`"
)


def libraries(package: Path) -> list[Path]:
    return sorted(package.glob("libgrowkernels*"))


def test_missing_library(package: Path, import_error: Ask) -> None:
    for path in libraries(package):
        path.unlink()
    message = import_error(package)
    assert message == f"ImportError: growkernels: {package} holds no op library; run {REINSTALL}"


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"torch_version": 3}'])
def test_missing_build_information(package: Path, import_error: Ask, text: str | None) -> None:
    (beside,) = package.glob("libgrowkernels*.json")
    beside.unlink() if text is None else beside.write_text(text)
    message = import_error(package)
    assert f"the build information {beside} is missing or damaged; run {REINSTALL}" in message


@pytest.mark.parametrize(
    ("running", "nearest"),
    [("2.99.0", "2.15"), ("2.9.1+cpu", "2.11"), ("2.14.0", "2.11"), ("3.0.0a0", "2.15")],
)
def test_an_unknown_torch_is_told_the_nearest_known_one(
    package: Path, import_error: Ask, running: str, nearest: str
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


def test_library_with_a_symbol_that_torch_lacks(
    package: Path, import_error: Ask, tmp_path: Path
) -> None:
    source = tmp_path / "needy.c"
    source.write_text("void gone(void); __attribute__((constructor)) void start(void) { gone(); }")
    target = package / library.library_path().name
    command = ["cc", "-shared", "-fPIC", "-Wl,-z,now", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    message = import_error(package)
    assert f"does not load beside torch {torch.__version__} (undefined symbol: gone)" in message
    assert REINSTALL in message


def test_damaged_library(package: Path, import_error: Ask) -> None:
    (package / library.library_path().name).write_bytes(b"no ELF file")
    assert "does not load beside torch" in import_error(package)


def test_in_a_checkout_the_remedy_is_make(package: Path, import_error: Ask) -> None:
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
