"""What the build finds out about torch and CUDA, and its one-sentence refusals."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import build_backend  # noqa: E402
import toolchain  # noqa: E402

CPU_TORCH = toolchain.Torch(Path("/somewhere/torch"), "2.13.0+cpu", None)
CUDA_TORCH = toolchain.Torch(Path("/somewhere/torch"), "2.14.1", "13.0")


@pytest.fixture(autouse=True)
def no_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "TORCH"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CUDA", "TORCHES", "ANY_TORCH"):
        monkeypatch.delenv(f"GROWKERNELS_{name}", raising=False)


def make_torch(site_packages: Path, version: str, cuda: str | None = None) -> None:
    folder = site_packages / "torch"
    folder.mkdir(parents=True)
    text = f"__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\n"
    (folder / "version.py").write_text(text)


def make_nvcc(folder: Path, script: str) -> Path:
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return nvcc


def test_torch_is_read_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_torch(tmp_path, "2.12.1+cu130", "13.0")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    torch = toolchain.find_torch()
    assert torch == toolchain.Torch(tmp_path / "torch", "2.12.1+cu130", "13.0")
    assert torch.minor_version == "2.12"
    assert toolchain.torch_requirement() == "torch==2.12.*"


def test_torch_of_the_interpreter_is_found_from_an_isolated_build(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", [])
    torch = toolchain.find_torch()
    assert torch is not None
    assert torch.include_folders[0].is_dir()
    assert list(torch.library_folder.glob("libtorch_cpu.*"))


@pytest.mark.parametrize("version", ["2.10.0", "2.15.0+cpu", "3.0.0"])
def test_unsupported_torch_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    make_torch(tmp_path, version)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(SystemExit, match=rf"torch {re.escape(version)} .* install torch 2\.11 to"):
        toolchain.require_torch()


def test_an_unsupported_torch_can_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_torch(tmp_path, "2.15.0")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setenv("GROWKERNELS_ANY_TORCH", "1")
    assert toolchain.require_torch().version == "2.15.0"


def test_a_wheel_for_several_torches_needs_one_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / version for version in ("2.13.0", "2.11.0+cpu")]
    for folder in folders:
        make_torch(folder, folder.name)
    monkeypatch.setenv("GROWKERNELS_TORCHES", ":".join(map(str, folders)))
    assert [torch.version for torch in toolchain.torches_to_build_for()] == [
        "2.13.0",
        "2.11.0+cpu",
    ]
    assert toolchain.torch_requirement() == "torch>=2.11,<2.14"
    monkeypatch.setenv("GROWKERNELS_TORCHES", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"nowhere, where no torch is installed; run `pip install"):
        toolchain.torches_to_build_for()


def test_without_torch_the_build_asks_for_the_pinned_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(need.startswith("torch") for need in build_backend._build_requires())
    monkeypatch.setattr(build_backend, "find_torch", lambda: None)
    assert build_backend.DEFAULT_TORCH in build_backend.get_requires_for_build_wheel()
    monkeypatch.setenv("TORCH", "torch==2.14.1")
    assert "torch==2.14.1" in build_backend.get_requires_for_build_editable()


def test_makefile_and_backend_name_the_same_torch() -> None:
    requirement = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert requirement is not None
    assert requirement[1] == build_backend.DEFAULT_TORCH


def test_old_setuptools_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    oldest = build_backend.OLDEST_SETUPTOOLS
    assert f'requires = ["setuptools>={oldest}"]' in (ROOT / "pyproject.toml").read_text()
    monkeypatch.setattr("setuptools.__version__", "65.5.0")
    with pytest.raises(SystemExit, match=rf"needs setuptools {oldest} or newer, not 65\.5\.0;"):
        importlib.reload(build_backend)


def test_the_licence_is_stated_where_every_setuptools_reads_it() -> None:
    # As a string in [project] it stops `setup.py build_ext` under the setuptools of many a machine.
    assert not re.search(r"^license", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    stated = subprocess.run(
        [sys.executable, "setup.py", "--license"], cwd=ROOT, capture_output=True, text=True
    )
    assert stated.stdout.splitlines()[-1:] == ["MIT"], stated.stderr


def test_build_is_refused_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "find_torch", lambda: None)
    with pytest.raises(SystemExit, match=r"finds none .* run `make setup`"):
        toolchain.require_torch()
    assert toolchain.torch_requirement() == "torch>=2.11,<2.15"


def test_nvcc_is_asked_where_its_toolkit_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit = tmp_path / "cuda-13.0"
    make_nvcc(toolkit, f"echo '#$ TOP={toolkit}/bin/..' >&2")
    wrapper = make_nvcc(tmp_path / "wrapper", f'exec {toolkit}/bin/nvcc "$@"')
    monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
    assert toolchain.find_cuda_toolkit() == toolkit
    other = tmp_path / "cuda-12.9"
    make_nvcc(other, "exit 1")
    monkeypatch.setenv("CUDA_HOME", str(other))
    assert toolchain.find_cuda_toolkit() == other
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="has no bin/nvcc; set CUDA_HOME"):
        toolchain.find_cuda_toolkit()


@pytest.mark.parametrize(
    ("torch", "release", "has_sources", "note"),
    [
        (CPU_TORCH, "13.0", True, "CUDA off: torch 2.13.0+cpu is a CPU build"),
        (CUDA_TORCH, "13.0", False, "CUDA off: this source tree has no CUDA sources"),
        (CUDA_TORCH, None, True, "CUDA off: no CUDA toolkit (no CUDA_HOME and no nvcc on PATH)"),
        (CUDA_TORCH, "12.9", True, "CUDA off: {} is CUDA 12.9, but torch 2.14.1 is for 13.0"),
        (CUDA_TORCH, "13.1", True, "CUDA on: {}, architectures 80-real;90"),
    ],
)
def test_cuda_is_on_only_when_everything_is_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    torch: toolchain.Torch,
    release: str | None,
    has_sources: bool,
    note: str,
) -> None:
    if release:
        make_nvcc(tmp_path, f"echo 'Cuda compilation tools, release {release}, V{release}.88'")
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    note = note.format(tmp_path)
    cuda = toolchain.find_cuda(torch, has_sources)
    assert cuda.note == note
    assert (cuda.toolkit is not None) == note.startswith("CUDA on")
    monkeypatch.setenv("GROWKERNELS_CUDA", "1")
    if note.startswith("CUDA on"):
        assert toolchain.find_cuda(torch, has_sources) == cuda
    else:
        obstacle = re.escape(note.removeprefix("CUDA off: "))
        with pytest.raises(SystemExit, match=f"GROWKERNELS_CUDA=1 cannot be met: {obstacle};"):
            toolchain.find_cuda(torch, has_sources)
    monkeypatch.setenv("GROWKERNELS_CUDA", "0")
    assert toolchain.find_cuda(torch, has_sources).note == "CUDA off: GROWKERNELS_CUDA=0"
    monkeypatch.setenv("GROWKERNELS_CUDA", "yes")
    with pytest.raises(SystemExit, match="GROWKERNELS_CUDA=yes is not understood"):
        toolchain.find_cuda(torch, has_sources)


def test_wrong_cuda_home_matters_only_to_a_build_with_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert toolchain.find_cuda(CPU_TORCH, has_sources=True).toolkit is None
    assert toolchain.find_cuda(CUDA_TORCH, has_sources=False).toolkit is None
    with pytest.raises(SystemExit, match="has no bin/nvcc; set CUDA_HOME"):
        toolchain.find_cuda(CUDA_TORCH, has_sources=True)
    make_nvcc(tmp_path, "exit 1")
    with pytest.raises(SystemExit, match="--version` states no release; set CUDA_HOME"):
        toolchain.find_cuda(CUDA_TORCH, has_sources=True)


@pytest.mark.parametrize(
    ("arch_list", "expected"),
    [
        ("", "80-real;90"),
        ("8.0;9.0+PTX", "80-real;90"),
        ("9.0a", "90a-real"),
        ("8.6, 10.0", "86-real;100-real"),
    ],
)
def test_architectures_in_cmakes_words(arch_list: str, expected: str) -> None:
    assert toolchain.cuda_architectures(arch_list) == expected


def test_unknown_architecture_is_one_sentence() -> None:
    with pytest.raises(SystemExit, match="holds 'hopper', which is not an architecture"):
        toolchain.cuda_architectures("8.0;hopper")
