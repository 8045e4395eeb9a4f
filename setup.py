"""Builds growkernels: CMake and Ninja make the op library and the build-info module."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "tools"))

from toolchain import Torch, find_cuda, require_torch, torch_requirement  # noqa: E402


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


def pybind11_include() -> str:
    try:
        import pybind11
    except ImportError:
        raise SystemExit(
            "growkernels: building needs pybind11; run `pip install pybind11`"
        ) from None
    return str(pybind11.get_include())


class CMakeBuild(build_ext):
    """Configures, builds and installs the CMake targets into the package's folder."""

    def run(self) -> None:
        torch = require_torch()
        in_place = self.inplace or self.editable_mode
        package_folder = (ROOT if in_place else Path(self.build_lib).resolve()) / "growkernels"
        folder = self.configure(torch)
        cmake = program("cmake", "CMAKE_BIN_DIR")
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        self.call([cmake, "--build", str(folder), "--parallel", jobs])
        self.call([cmake, "--install", str(folder), "--prefix", str(package_folder)])

    def configure(self, torch: Torch) -> Path:
        cuda = find_cuda(torch, has_sources=any((ROOT / "csrc").glob("*/cuda*.cu")))
        print(f"growkernels: torch {torch.version} in {torch.folder}; {cuda.note}", flush=True)
        kind = f"cuda{torch.cuda}" if cuda.toolkit else "cpu"
        sanitize = os.environ.get("GROWKERNELS_SANITIZE") == "1"
        strict = os.environ.get("GROWKERNELS_WERROR") == "1" and not sanitize
        tag = f"{sys.implementation.cache_tag}-torch{torch.minor_version}-{kind}"
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
            "GK_OPENMP_LIBRARY": str(torch.openmp_library or ""),
            "GK_PYTHON_INCLUDE": sysconfig.get_paths()["include"],
            "GK_PYTHON_SUFFIX": str(sysconfig.get_config_var("EXT_SUFFIX")),
            "GK_PYBIND11_INCLUDE": pybind11_include(),
            "GK_CUDA": "ON" if cuda.toolkit else "OFF",
            "GK_CUDA_VERSION": (torch.cuda or "") if cuda.toolkit else "",
            "GK_CUDA_NOTE": cuda.note,
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


setup(
    ext_modules=[Extension("growkernels._build_info", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    install_requires=[torch_requirement()],
    license="MIT",
)
