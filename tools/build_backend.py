"""PEP 517 backend: setuptools, with torch asked for only where none is installed.

A fixed `requires = ["torch"]` would download some torch into the isolated build, several GB and
often another version than the one growkernels will run with. The library must be built for the
torch it runs beside, so that one is used when it exists.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import setuptools
from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from toolchain import find_torch

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# Kept equal to the default of TORCH in the Makefile (a test compares them).
DEFAULT_TORCH = "torch==2.13.0"

Settings = Mapping[str, Any] | None

# Without isolation nobody compares what is installed with `requires` in pyproject.toml, and an
# older setuptools makes no wheel by itself. `setup.py build_ext` works with older ones too.
OLDEST_SETUPTOOLS = 71
if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"growkernels: building needs setuptools {OLDEST_SETUPTOOLS} or newer, not "
        f"{setuptools.__version__}; run `pip install 'setuptools>={OLDEST_SETUPTOOLS}'`"
    )


def _build_requires() -> list[str]:
    torch = [] if find_torch() else [os.environ.get("TORCH", DEFAULT_TORCH)]
    return ["cmake>=3.26", "ninja", *torch]


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return _build_requires()


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return _build_requires()


def build_wheel(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    # setuptools packs everything it finds there, modules deleted since the last build included.
    for leftover in [*Path("build").glob("lib*"), *Path("build").glob("bdist*")]:
        shutil.rmtree(leftover)
    return str(build_meta.build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    # setuptools warns, every time, that folders named like the package may shadow it.
    warnings.filterwarnings("ignore", message="Editable installation")
    return str(build_meta.build_editable(wheel_directory, config_settings, metadata_directory))
