"""Finds and loads the compiled op library `libgrowkernels.so`."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

LIBRARY_NAME = "libgrowkernels.so"
PACKAGE_FOLDER = Path(__file__).resolve().parents[1]


def load_library(folder: Path = PACKAGE_FOLDER) -> Path:
    """Loads the op library that lies in `folder` and returns its path.

    Raises ImportError with one sentence, the remedy included, when the library or its build
    information is missing, was built for another torch, or does not load.
    """
    path = folder / LIBRARY_NAME
    if not path.is_file():
        raise ImportError(f"growkernels: {path} is missing; run `{remedy(folder)}`")
    try:
        build_info = importlib.import_module("growkernels._build_info")
    except ImportError:
        raise ImportError(
            f"growkernels: the build information beside {path} is missing or was built for "
            f"another Python; run `{remedy(folder)}`"
        ) from None
    built_for, running = (_minor(v) for v in (build_info.torch_version, torch.__version__))
    if built_for != running:
        raise ImportError(
            f"growkernels: {path} was built for torch {built_for}, but torch {running} "
            f"({torch.__version__}) is running; run `{remedy(folder)}`"
        )
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


def remedy(folder: Path = PACKAGE_FOLDER) -> str:
    """The command that rebuilds the library: in a checkout, or for an installed package."""
    if (folder.parent / "Makefile").is_file() and (folder.parent / "setup.py").is_file():
        return "make setup"
    return "pip install --no-build-isolation --no-deps --force-reinstall growkernels"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
