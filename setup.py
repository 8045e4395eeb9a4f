"""Builds growkernels: CMake and Ninja make the op library, for one version of torch or several."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "tools"))

from toolchain import Torch, find_cuda, torch_requirement, torches_to_build_for  # noqa: E402


def program(name: str, folder_attribute: str) -> str:
    """The path of a build tool, from its PyPI package if installed, else from PATH."""
    try:
        package = importlib.import_module(name)
        candidate = Path(getattr(package, folder_attribute)) / name
        if candidate.is_file():
            return str(candidate)
    except ImportError:
        pass
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"growkernels: building needs {name}; run `pip install {name}`")
    return found


class CMakeBuild(build_ext):
    """Configures, builds and installs the CMake targets into the package's folder."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        package_folder = (ROOT if in_place else Path(self.build_lib).resolve()) / "growkernels"
        cmake = program("cmake", "CMAKE_BIN_DIR")
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        for torch in torches_to_build_for():
            folder = self.configure(torch)
            self.call([cmake, "--build", str(folder), "--parallel", jobs])
            self.call([cmake, "--install", str(folder), "--prefix", str(package_folder)])

    def configure(self, torch: Torch) -> Path:
        cuda = find_cuda(torch, has_sources=any((ROOT / "csrc").glob("*/cuda*.cu")))
        print(f"growkernels: torch {torch.version} in {torch.folder}; {cuda.note}", flush=True)
        kind = f"cuda{torch.cuda}" if cuda.toolkit else "cpu"
        sanitize = os.environ.get("GROWKERNELS_SANITIZE") == "1"
        strict = os.environ.get("GROWKERNELS_WERROR") == "1" and not sanitize
        # A torch of its own, which would make everything of the installed one's be compiled again.
        purpose = "-wheel" if os.environ.get("GROWKERNELS_TORCHES") else ""
        tag = f"torch{torch.minor_version}-{kind}{purpose}"
        if toolchain := os.environ.get("CMAKE_TOOLCHAIN_FILE"):  # CMake's: for another processor
            tag += f"-{Path(toolchain).stem}"
        folder = (
            ROOT
            / "build"
            / f"cmake-{tag}{'-strict' if strict else '-sanitize' if sanitize else ''}"
        )
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": program("ninja", "BIN_DIR"),
            "GK_TORCH_VERSION": torch.version,
            "GK_TORCH_INCLUDE": ";".join(map(str, torch.include_folders)),
            "GK_TORCH_LIB": str(torch.library_folder),
            "GK_CUDA": "ON" if cuda.toolkit else "OFF",
            "GK_CUDA_VERSION": (torch.cuda or "") if cuda.toolkit else "",
            "GK_CUDA_NOTE": json.dumps(cuda.note)[1:-1],
            "GK_WERROR": "ON" if strict else "OFF",
            "GK_SANITIZE": "ON" if sanitize else "OFF",
        }
        if cuda.toolkit:
            options["CMAKE_CUDA_COMPILER"] = str(cuda.toolkit / "bin" / "nvcc")
            options["CMAKE_CUDA_ARCHITECTURES"] = cuda.architectures
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        cmake = program("cmake", "CMAKE_BIN_DIR")
        self.call([cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *definitions])
        return folder

    def call(self, command: list[str]) -> None:
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"growkernels: the build stopped at `{' '.join(command[:3])} …` "
                f"with status {error.returncode}; the compiler's messages are above"
            ) from None


def commands() -> dict[str, type]:
    """What is done here instead of by setuptools."""
    try:
        from setuptools.command.bdist_wheel import bdist_wheel
    except ImportError:  # before setuptools 70.1, which makes no wheels but builds in place
        return {"build_ext": CMakeBuild}

    class AnyPythonWheel(bdist_wheel):
        """The library holds no Python, so one wheel serves all versions of it."""

        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    return {"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel}


setup(
    # Nothing of setuptools' own is compiled: it makes a package of its machine's kind out of this.
    ext_modules=[Extension("growkernels.libgrowkernels", sources=[])],
    cmdclass=commands(),
    install_requires=[torch_requirement()],
    license="MIT",
)
