"""Growth inside the trainers of others; each is imported when it is asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

_TRAINERS = ("lightning", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in _TRAINERS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
