"""Kernels of CUDA's dialect, compiled for the host and run under the launch shim.

A test's C++ source includes `cuda_on_host.h`, then the kernel header, and exports functions
(CUDA_ON_HOST_EXPORT) whose parameters are pointers, int64_t and double.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
# Hidden and not unique: a kernel template keeps its shared memory to its own library. `common` is
# found here before it is in csrc.
FLAGS = [
    *("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-gnu-unique"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *(f"-I{HERE}", f"-I{CSRC}"),
]


class HostLibrary:
    """Kernels of one source; `call` runs one of its exported functions."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.cuda_on_host_error.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: torch.Tensor | int | float | None) -> None:
        """Runs the function on tensors' memory (None is a null pointer), integers and floats.

        Raises RuntimeError with what went wrong in a launch: threads that never meet, a shuffle
        from a lane that takes no part, a write beyond dynamic shared memory.
        """
        function = getattr(self._library, name)
        function.restype = None
        function(*(_passed(argument) for argument in arguments))
        self._raise_error()

    @contextmanager
    def backwards(self) -> Iterator[None]:
        """Lets the last thread of a block go first: with a missing barrier results differ."""
        self._library.cuda_on_host_backwards(1)
        try:
            yield
        finally:
            self._library.cuda_on_host_backwards(0)

    def _raise_error(self) -> None:
        error = self._library.cuda_on_host_error()
        if error is not None:
            raise RuntimeError(error.decode())


class HostCompiler:
    """Compiles each source once into `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._libraries: dict[tuple[str, ...], HostLibrary] = {}

    def __call__(self, source: Path, flags: Sequence[str] = ()) -> HostLibrary:
        """The library made of `source`; a compiler's complaint is raised as RuntimeError."""
        key = (str(source), *flags)
        if key not in self._libraries:
            path = self._folder / f"{source.stem}-{len(self._libraries)}.so"
            command = [cpp_compiler(), *FLAGS, *flags, str(source), "-o", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
            self._libraries[key] = HostLibrary(path)
        return self._libraries[key]


def cpp_compiler() -> str:
    """The compiler CXX names, else c++ or g++."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++"]:
        path = shutil.which(name)
        if path is not None:
            return path
    looked_for = (
        f"CXX names {named}, which is not there" if named else "neither c++ nor g++ is on PATH"
    )
    raise RuntimeError(f"no C++ compiler: {looked_for} is not there; install one or name it in CXX")


def _passed(argument: torch.Tensor | int | float | None) -> object:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_double(argument)
