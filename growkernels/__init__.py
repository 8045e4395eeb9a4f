"""growkernels: fast ops and drivers for neural networks that grow while they train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from growkernels import distributed, growth, integrations, nn, ops, solvers
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
from growkernels.solvers import splitting_eigs

if TYPE_CHECKING:
    from growkernels import checkpoint

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


def __getattr__(name: str) -> Any:
    # torch's distributed checkpoints take seconds to import.
    if name == "checkpoint":
        import growkernels.checkpoint

        return growkernels.checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
