"""Finds the families: every file `benchmarks/*/bench_FAMILY.py`."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from benchmarks.case import Case

_FOLDER = Path(__file__).resolve().parent
_PREFIX = "bench_"


def family_files() -> dict[str, Path]:
    """Family name -> file, ordered by name."""
    paths = sorted(_FOLDER.glob(f"*/{_PREFIX}*.py"), key=lambda path: path.name)
    return {path.stem[len(_PREFIX) :]: path for path in paths}


def load_family(path: Path) -> ModuleType:
    """The family's module: FAMILY, KERNELS, CASES, TABLE and, for a GPU, GPU_CASES."""
    return importlib.import_module(f"benchmarks.{path.parent.name}.{path.stem}")


def cases_on(device_type: str, family: ModuleType) -> list[Case]:
    """What the family compares on "cpu" or "cuda": sizes that suit the one do not suit the other.

    Empty for a family that declares no GPU_CASES on "cuda".
    """
    cases: list[Case] = family.CASES if device_type == "cpu" else getattr(family, "GPU_CASES", [])
    return cases
