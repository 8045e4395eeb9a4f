"""Finds and loads the compiled op library that was built for the running torch.

Libraries for several versions of torch may lie side by side, named after them, and beside each in
JSON what it was built for. Nothing of it depends on the version of Python.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

PACKAGE_FOLDER = Path(__file__).resolve().parents[1]


class BuildInfo(NamedTuple):
    """What an op library was built for.

    Attributes:
        torch_version: the release it was compiled against; it serves all of that minor version.
        cuda_version: None where no CUDA sources were compiled.
        cuda_architectures: in CMake's words, such as "80-real"; see `gpu_support.compiled_for`.
        cuda_families: the op families that have CUDA C++ kernels in it.
        cuda_note: one line that says whether CUDA sources were compiled, or why not.
        compiler: its name and version.
    """

    torch_version: str
    cuda_version: str | None
    cuda_architectures: tuple[str, ...]
    cuda_families: tuple[str, ...]
    cuda_note: str
    compiler: str


def library_path(folder: Path = PACKAGE_FOLDER) -> Path:
    """The op library in `folder` for the running torch; for C++ programs, too, that link it.

    Raises ImportError with one sentence, the remedy included, where there is none.
    """
    libraries = {_versions(path.name): path for path in folder.glob("libgrowkernels-torch*.so")}
    running = _minor(torch.__version__)
    if path := libraries.get(running):
        return path
    if not libraries:
        raise ImportError(f"growkernels: {folder} holds no op library; run `{remedy(folder)}`")
    built_for = [_dotted(version) for version in sorted(libraries)]
    older = [version for version in libraries if version < running]
    nearest = max(older, default=min(libraries))
    raise ImportError(
        f"growkernels: its libraries are for torch {', '.join(built_for)}, but torch "
        f"{torch.__version__} is running; install torch=={_dotted(nearest)}.*, or build for the "
        f"running one by `{remedy(folder)}`"
    )


def load_library(folder: Path = PACKAGE_FOLDER) -> Path:
    """Loads the op library in `folder` that fits the running torch and returns its path.

    Raises ImportError with one sentence, the remedy included, when there is none for this torch,
    its build information is missing, or it does not load.
    """
    path = library_path(folder)
    build_info(path)
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        # torch puts the linker's own words into the cause.
        cause = str(error.__cause__ or error).removeprefix(f"{path}: ")
        raise ImportError(
            f"growkernels: {path} does not load beside torch {torch.__version__} ({cause}); "
            f"run `{remedy(folder)}`"
        ) from None
    return path


@lru_cache
def build_info(path: Path | None = None) -> BuildInfo:
    """What the op library at `path` was built for; None: the one that the running torch needs.

    Raises ImportError with one sentence where the file beside it cannot be read.
    """
    path = path or library_path()
    beside = path.with_suffix(".json")
    try:
        stated = json.loads(beside.read_text())
        return BuildInfo(
            stated["torch_version"],
            stated["cuda_version"] or None,
            tuple(filter(None, stated["cuda_architectures"].split(","))),
            tuple(filter(None, stated["cuda_families"].split(","))),
            stated["cuda_note"],
            stated["compiler"],
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ImportError(
            f"growkernels: the build information {beside} is missing or damaged; "
            f"run `{remedy(path.parent)}`"
        ) from None


def remedy(folder: Path = PACKAGE_FOLDER) -> str:
    """The command that builds the library anew: in a checkout, or for an installed package."""
    if (folder.parent / "Makefile").is_file() and (folder.parent / "setup.py").is_file():
        return "make setup"
    return (
        "pip install --no-build-isolation --no-deps --force-reinstall --no-binary growkernels "
        "growkernels"
    )


def _versions(name: str) -> tuple[int, int]:
    """Of torch, in the name of a library."""
    found = re.fullmatch(r"libgrowkernels-torch(\d+)\.(\d+)\.so", name)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _minor(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
