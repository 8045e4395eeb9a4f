"""What a build needs to know about this machine: the installed torch and the CUDA toolkit.

torch is read from its files and never imported: inside an isolated build its own dependencies are
out of sight, and a CUDA build of torch can be compiled against where its CUDA libraries are absent.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

OLDEST_TORCH = (2, 11)
NEWEST_TORCH = (2, 14)


@dataclass(frozen=True)
class Torch:
    """An installed torch: its folder, its version and the CUDA version it was built with."""

    folder: Path
    version: str
    cuda: str | None

    @property
    def minor_version(self) -> str:
        """The `major.minor` part, within which torch keeps its C++ interface."""
        return ".".join(self.version.split(".")[:2])

    @property
    def include_folders(self) -> list[Path]:
        include = self.folder / "include"
        return [include, include / "torch" / "csrc" / "api" / "include"]

    @property
    def library_folder(self) -> Path:
        return self.folder / "lib"


@dataclass(frozen=True)
class Cuda:
    """Whether CUDA sources are compiled; `note` is the one line that says so, or why not."""

    toolkit: Path | None
    architectures: str
    note: str


def find_torch() -> Torch | None:
    """The torch of this interpreter, also from inside an isolated build; None if there is none."""
    candidates = [Path(entry) for entry in sys.path if entry]
    for base in (sys.prefix, sys.base_prefix):
        paths = sysconfig.get_paths(vars={"base": base, "platbase": base})
        candidates += [Path(paths["purelib"]), Path(paths["platlib"])]
    for candidate in candidates:
        version_file = candidate / "torch" / "version.py"
        if version_file.is_file():
            return _read_torch(version_file)
    return None


def _read_torch(version_file: Path) -> Torch:
    text = version_file.read_text()
    version = re.search(r"^__version__[^=\n]*= *['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    cuda = re.search(r"^cuda[^=\n]*= *['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    if version is None:
        raise RuntimeError(f"{version_file} states no version; reinstall torch")
    return Torch(version_file.parent, version[1], cuda[1] if cuda else None)


def require_torch() -> Torch:
    """The installed torch, or a SystemExit with one sentence where none fits."""
    torch = find_torch()
    if torch is None:
        raise SystemExit(
            f"growkernels: building needs torch {_supported()} and finds none for "
            f"{sys.executable}; run `make setup`, or `pip install torch` first"
        )
    _check_supported(torch)
    return torch


def torches_to_build_for() -> list[Torch]:
    """The torch in each of the folders that GROWKERNELS_TORCHES names, or the installed one.

    A wheel can hold libraries for several; see tools/make_wheel.py. As in PATH, colons are between.
    """
    folders = os.environ.get("GROWKERNELS_TORCHES")
    if not folders:
        return [require_torch()]
    torches = []
    for folder in folders.split(os.pathsep):
        version_file = Path(folder).resolve() / "torch" / "version.py"
        if not version_file.is_file():
            raise SystemExit(
                f"growkernels: GROWKERNELS_TORCHES names {folder}, where no torch is installed; "
                f"run `pip install --no-deps --target {folder} torch==…`"
            )
        torches.append(_read_torch(version_file))
        _check_supported(torches[-1])
    return torches


def torch_requirement() -> str:
    """What an installed growkernels needs: a torch it is built for, or any supported one."""
    if os.environ.get("GROWKERNELS_TORCHES"):
        versions = sorted(_minor(torch) for torch in torches_to_build_for())
        return _between(versions[0], versions[-1])
    torch = find_torch()
    if torch is not None:
        return f"torch=={torch.minor_version}.*"
    return _between(OLDEST_TORCH, NEWEST_TORCH)


def _check_supported(torch: Torch) -> None:
    if os.environ.get("GROWKERNELS_ANY_TORCH") == "1":
        return
    if not OLDEST_TORCH <= _minor(torch) <= NEWEST_TORCH:
        raise SystemExit(
            f"growkernels: torch {torch.version} in {torch.folder} is not supported; "
            f"install torch {_supported()} and build again, or set GROWKERNELS_ANY_TORCH=1 to "
            "build for it untested"
        )


def _minor(torch: Torch) -> tuple[int, int]:
    major, minor = torch.minor_version.split(".")
    return int(major), int(minor)


def _supported() -> str:
    return f"{_dotted(OLDEST_TORCH)} to {_dotted(NEWEST_TORCH)}"


def _between(oldest: tuple[int, int], newest: tuple[int, int]) -> str:
    return f"torch>={_dotted(oldest)},<{newest[0]}.{newest[1] + 1}"


def find_cuda(torch: Torch, has_sources: bool) -> Cuda:
    """Decides whether CUDA sources are compiled. GROWKERNELS_CUDA=0|1 forces the decision."""
    wish = os.environ.get("GROWKERNELS_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(
            f"growkernels: GROWKERNELS_CUDA={wish} is not understood; set it to 0 or 1, or unset it"
        )
    if wish == "0":
        return Cuda(None, "", "CUDA off: GROWKERNELS_CUDA=0")
    toolkit, obstacle = _usable_toolkit(torch, has_sources)
    if toolkit:
        architectures = cuda_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
        return Cuda(toolkit, architectures, f"CUDA on: {toolkit}, architectures {architectures}")
    if wish == "1":
        raise SystemExit(
            f"growkernels: GROWKERNELS_CUDA=1 cannot be met: {obstacle}; "
            "remove this obstacle or unset GROWKERNELS_CUDA"
        )
    return Cuda(None, "", f"CUDA off: {obstacle}")


def _usable_toolkit(torch: Torch, has_sources: bool) -> tuple[Path | None, str]:
    """The toolkit that compiles for this torch; else None and what stands in the way.

    The toolkit is looked for last: a wrong CUDA_HOME must not stop a build without CUDA.
    """
    if torch.cuda is None:
        return None, f"torch {torch.version} is a CPU build"
    if not has_sources:
        return None, "this source tree has no CUDA sources"
    return _toolkit_for(torch.cuda, f"torch {torch.version}")


def _toolkit_for(cuda: str, torch: str) -> tuple[Path | None, str]:
    toolkit = find_cuda_toolkit()
    if toolkit is None:
        return None, "no CUDA toolkit (no CUDA_HOME and no nvcc on PATH)"
    # Within a major version the CUDA runtime that torch loads serves both.
    release = cuda_release(toolkit)
    if release.split(".")[0] != cuda.split(".")[0]:
        return None, f"{toolkit} is CUDA {release}, but {torch} is for {cuda}"
    return toolkit, ""


def second_environment_obstacle(torch: str, cuda: str) -> str:
    """Why `make test` does not build for the CUDA build of torch it knows; "" where it does."""
    return _toolkit_for(cuda, torch)[1] if torch else "TORCH_CUDA is empty"


def find_cuda_toolkit() -> Path | None:
    """The toolkit's folder: CUDA_HOME if set, else what the nvcc on PATH itself says.

    The nvcc on PATH may be a script that starts another one, so its own location proves nothing.
    """
    home = os.environ.get("CUDA_HOME")
    if home:
        if not (Path(home) / "bin" / "nvcc").is_file():
            raise SystemExit(
                f"growkernels: CUDA_HOME={home} has no bin/nvcc; "
                "set CUDA_HOME to a CUDA toolkit or unset it"
            )
        return Path(home).resolve()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull],
        capture_output=True,
        text=True,
    )
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else None


def cuda_release(toolkit: Path) -> str:
    """The toolkit's version, such as "13.0", as its nvcc states it."""
    nvcc = toolkit / "bin" / "nvcc"
    stated = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", stated)
    if release is None:
        raise SystemExit(
            f"growkernels: `{nvcc} --version` states no release; "
            "set CUDA_HOME to a working CUDA toolkit or set GROWKERNELS_CUDA=0"
        )
    return release[1]


def cuda_architectures(arch_list: str) -> str:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") in CMake's words ("80-real;90")."""
    entries = re.split(r"[;,\s]+", arch_list.strip()) if arch_list.strip() else ["8.0", "9.0+PTX"]
    architectures = []
    for entry in entries:
        parts = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if parts is None:
            raise SystemExit(
                f"growkernels: TORCH_CUDA_ARCH_LIST holds {entry!r}, which is not an architecture; "
                'write for example "8.0;9.0+PTX"'
            )
        name = parts[1] + parts[2] + parts[3]
        architectures.append(name if parts[4] else f"{name}-real")
    return ";".join(architectures)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


if __name__ == "__main__":
    print(second_environment_obstacle(*sys.argv[1:]))
