"""Finds the families: every file `benchmarks/*/bench_FAMILY.py`."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

_FOLDER = Path(__file__).resolve().parent
_PREFIX = "bench_"


def family_files() -> dict[str, Path]:
    """Family name -> file, ordered by name."""
    paths = sorted(_FOLDER.glob(f"*/{_PREFIX}*.py"), key=lambda path: path.name)
    return {path.stem[len(_PREFIX) :]: path for path in paths}


def load_family(path: Path) -> ModuleType:
    """The family's module, which declares FAMILY, CASES and TABLE."""
    return importlib.import_module(f"benchmarks.{path.parent.name}.{path.stem}")
