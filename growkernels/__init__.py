"""growkernels: fast ops and drivers for neural networks that grow while they train."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from growkernels import ops
from growkernels.ops import (
    basis_conv2d,
    conv_algorithm,
    set_conv_algorithm,
    splitting_hvp,
    splitting_hvp_conv2d,
    splitting_weight,
    virtual_grad_norms,
    virtual_grads,
)

if TYPE_CHECKING:
    from growkernels import checkpoint, distributed, growth, integrations, nn, solvers
    from growkernels.solvers import splitting_eigs

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "basis_conv2d",
    "checkpoint",
    "conv_algorithm",
    "distributed",
    "growth",
    "integrations",
    "nn",
    "ops",
    "set_conv_algorithm",
    "solvers",
    "splitting_eigs",
    "splitting_hvp",
    "splitting_hvp_conv2d",
    "splitting_weight",
    "virtual_grad_norms",
    "virtual_grads",
]

# Imported when they are first asked for: who calls the ops alone does not wait for the drivers.
_FLOORS_ABOVE = ("checkpoint", "distributed", "growth", "integrations", "nn", "solvers")


def __getattr__(name: str) -> Any:
    if name in _FLOORS_ABOVE:
        return importlib.import_module(f"growkernels.{name}")
    if name == "splitting_eigs":
        return importlib.import_module("growkernels.solvers").splitting_eigs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
